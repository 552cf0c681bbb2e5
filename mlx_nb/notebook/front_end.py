"""Information about the current kernel request: its header, and whether a console sent it."""

from __future__ import annotations

from typing import Any

from IPython.core.getipython import get_ipython


def is_console() -> bool:
    """Whether the current request comes from a console, such as jupyter-console, and not from a notebook.

    A console shows output as text and cannot change it later, so there are no widgets. It uses Python's
    jupyter_client, whose message ids begin with the session, and its requests have no cell id.
    """
    kernel: Any = getattr(get_ipython(), "kernel", None)
    header = request_header()
    if header is None or not getattr(kernel, "_allow_stdin", False):
        return False
    is_of_a_cell = "cellId" in (kernel.get_parent("shell").get("metadata") or {})
    return str(header.get("msg_id")).startswith(f"{header.get('session')}_") and not is_of_a_cell


def request_header() -> dict[str, Any] | None:
    """The header of the current request: `msg_id`, `date`, `session`. None outside a kernel.

    A page that is opened again has another `session`. It only shows the outputs that the previous page had saved.
    """
    kernel: Any = getattr(get_ipython(), "kernel", None)
    try:
        header: dict[str, Any] = kernel.get_parent("shell")["header"]
        return header if header else None
    except (AttributeError, KeyError, TypeError):
        return None


def insert_cell(text: str) -> None:
    """Make the front end insert a cell below the current one, or at the next prompt; nothing outside of IPython."""
    from IPython.core.getipython import get_ipython

    shell: Any = get_ipython()
    if shell is not None:
        shell.set_next_input(text)
