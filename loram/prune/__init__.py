"""Pruning: score units or weights of a model, choose which to keep, write the smaller checkpoint."""
