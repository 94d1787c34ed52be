"""Train an adapter, or weights themselves, on a full or pruned model."""
