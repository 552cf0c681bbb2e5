"""Rows, examples (tokens and loss mask) and batches. Does not import mlx."""
