"""Files that mlx_nb writes: whole or not at all, one writer, and only over its own."""
