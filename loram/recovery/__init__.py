"""Recover an adapter for the full model, correct it, and polish it there."""
