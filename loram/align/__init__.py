"""The align stage: a pruned model trained on what the full one predicts."""
