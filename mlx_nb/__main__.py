"""`python -m mlx_nb` is `mlx-nb`."""

from mlx_nb.cli import main

raise SystemExit(main())
