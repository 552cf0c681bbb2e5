"""mlx_nb: fine-tune language models in a notebook, step by step.

`%load_ext mlx_nb` defines `%%finetune` and `%finetune`; `Run` is the same from Python. Modules are imported on first
use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from mlx_nb.config.dialects.exported import export_settings
    from mlx_nb.config.dialects.imported import import_settings
    from mlx_nb.config.methods import register_objective
    from mlx_nb.config.run_config import RunConfig
    from mlx_nb.experiments.compare import compare
    from mlx_nb.experiments.harness import lm_eval
    from mlx_nb.experiments.sweep import sweep
    from mlx_nb.notebook.new_run import new
    from mlx_nb.objectives.conformance import check_objective
    from mlx_nb.run.rows import rows
    from mlx_nb.run.run import Run
    from mlx_nb.run.saved_model import load

__version__ = "0.1.0"
__all__ = [
    "Run",
    "RunConfig",
    "__version__",
    "check_objective",
    "compare",
    "export_settings",
    "import_settings",
    "lm_eval",
    "load",
    "load_ipython_extension",
    "new",
    "register_objective",
    "rows",
    "sweep",
    "unload_ipython_extension",
]

_PUBLIC = {
    "Run": "mlx_nb.run.run",
    "RunConfig": "mlx_nb.config.run_config",
    "check_objective": "mlx_nb.objectives.conformance",
    "compare": "mlx_nb.experiments.compare",
    "export_settings": "mlx_nb.config.dialects.exported",
    "import_settings": "mlx_nb.config.dialects.imported",
    "lm_eval": "mlx_nb.experiments.harness",
    "load": "mlx_nb.run.saved_model",
    "new": "mlx_nb.notebook.new_run",
    "register_objective": "mlx_nb.config.methods",
    "rows": "mlx_nb.run.rows",
    "sweep": "mlx_nb.experiments.sweep",
}
_COMPUTING = ("Run", "check_objective", "compare", "lm_eval", "load", "new", "rows", "sweep")


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mlx_nb' has no attribute {name!r}")
    if name in _COMPUTING:
        from mlx_nb.model.backend import prepare_backend

        prepare_backend()
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Called by `%load_ext mlx_nb`: registers the magics and Tab completion."""
    from mlx_nb.model.backend import prepare_backend
    from mlx_nb.notebook import extension

    warning = prepare_backend().warning
    if warning is not None:
        print(f"mlx_nb: {warning}")
    extension.load(shell)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Called by `%unload_ext mlx_nb`: removes everything that loading added."""
    from mlx_nb.notebook import extension

    extension.unload(shell)
