"""What a kernel knows of the page that asks it: the request that is executed, and who sent it."""

from __future__ import annotations

from typing import Any

from IPython.core.getipython import get_ipython


def request_header() -> dict[str, Any] | None:
    """The header of the request that is executed: `msg_id`, `date`, `session`. None outside a kernel.

    A page that is opened again is another `session`, which sees nothing of what was displayed to the one before but
    what that had saved.
    """
    kernel: Any = getattr(get_ipython(), "kernel", None)
    try:
        header: dict[str, Any] = kernel.get_parent("shell")["header"]
        return header if header else None
    except (AttributeError, KeyError, TypeError):
        return None
