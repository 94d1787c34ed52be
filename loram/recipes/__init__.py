"""Recipes and data to start from. In a recipe's paths, `models/` and `data/` are in the working directory."""
