"""What a kernel knows of the page that asks it: the request that is executed, and who sent it."""

from __future__ import annotations

from typing import Any

from IPython.core.getipython import get_ipython


def is_console() -> bool:
    """Whether the request that is executed is of a console, such as jupyter-console, and of no notebook.

    A console shows what is displayed as text and once: no widgets, and nothing that is changed in place. It speaks
    through Python's jupyter_client, whose messages begin with their session, and its requests are of no cell.
    """
    kernel: Any = getattr(get_ipython(), "kernel", None)
    header = request_header()
    if header is None or not getattr(kernel, "_allow_stdin", False):
        return False
    is_of_a_cell = "cellId" in (kernel.get_parent("shell").get("metadata") or {})
    return str(header.get("msg_id")).startswith(f"{header.get('session')}_") and not is_of_a_cell


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
