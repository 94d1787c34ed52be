"""How models and adapters lie on disk: files, checkpoints, adapters, and folders that appear whole or not at all."""
