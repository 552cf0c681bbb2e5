"""Rows, examples (tokens and loss mask) and batches. Nothing here imports mlx."""
