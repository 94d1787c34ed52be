"""Export a model into a form that other tools load."""
