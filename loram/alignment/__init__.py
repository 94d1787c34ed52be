"""Align a pruned model with the full one, and cache what the full model predicts for that."""
