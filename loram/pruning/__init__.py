"""Prune a model: score its units or weights, choose which to keep, and write the smaller checkpoint."""
