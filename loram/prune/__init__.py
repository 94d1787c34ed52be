"""Structured pruning: score the units of a model, choose which to keep, write the smaller checkpoint."""
