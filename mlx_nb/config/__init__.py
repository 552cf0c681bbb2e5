"""The settings of a run: declared once, read from YAML, checked, explained."""

from mlx_nb.config.run_config import RunConfig

__all__ = ["RunConfig"]
