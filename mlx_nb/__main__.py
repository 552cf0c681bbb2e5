"""Makes `python -m mlx_nb` the same as `mlx-nb`."""

from mlx_nb.cli import main

raise SystemExit(main())
