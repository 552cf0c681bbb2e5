"""Closes widgets: ipywidgets keeps each widget, and what its callbacks reference, alive until it is closed."""

from __future__ import annotations

from typing import Any

import ipywidgets as widgets


def close_widgets(root: widgets.Widget) -> None:
    """Close a widget with its parts (children, layouts, styles), and remove all callbacks."""
    open_ones, seen = [root], {id(root)}
    while open_ones:
        widget = open_ones.pop()
        for part in _parts(widget):
            if id(part) not in seen:
                seen.add(id(part))
                open_ones.append(part)
        widget.unobserve_all()
        widget.close()


def _parts(widget: widgets.Widget) -> list[Any]:
    values = [getattr(widget, name) for name in widget.keys]
    flat = [one for value in values for one in (value if isinstance(value, list | tuple) else [value])]
    return [one for one in flat if isinstance(one, widgets.Widget)]
