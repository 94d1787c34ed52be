"""Ways to train: what each of them trains, and how its outcome becomes a folder."""
