"""Let a model write: answer prompts in batches, or chat in a terminal, with or without an adapter."""
