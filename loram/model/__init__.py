"""Foundation: families, plans, resizing, checkpoints. Knows no stage."""
