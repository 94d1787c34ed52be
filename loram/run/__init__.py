"""Run a recipe: what it says, what it has done so far, and what it reports."""
