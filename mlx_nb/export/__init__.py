"""Takes a trained model out of mlx_nb, in the formats of other programs."""
