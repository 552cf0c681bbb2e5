"""Access to the IPython shell of this process, without importing IPython."""

from __future__ import annotations

import sys
from typing import Any


def shell() -> Any:
    """The shell of a notebook kernel or terminal; None in a plain process, and while IPython is being imported.

    Safe in a signal handler, which may run in the middle of that import.
    """
    kind = getattr(sys.modules.get("IPython.core.interactiveshell"), "InteractiveShell", None)
    return kind.instance() if kind is not None and kind.initialized() else None


def in_ipython() -> bool:
    """Whether this process is a notebook kernel or an IPython shell, where commands are typed as magics."""
    return shell() is not None
