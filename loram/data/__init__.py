"""Rows of a data set, as token ids with a loss mask, in padded micro-batches."""
