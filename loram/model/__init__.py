"""What a model is: families, sizes, plans, and the index arithmetic between full and pruned. No files."""
