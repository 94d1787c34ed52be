"""Recover an adapter for the full model, and correct it there."""
