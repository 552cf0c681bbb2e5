"""Files that mlx_nb writes: atomically, with one writer per folder, never over files of others."""
