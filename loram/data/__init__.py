"""Data sets: reading them, bringing rows into one form, token ids with a loss mask, padded micro-batches."""
