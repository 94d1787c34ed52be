"""Evaluate a model, with or without an adapter."""
