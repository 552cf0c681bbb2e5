"""Conversion of GGUF files to mlx-lm folders."""
