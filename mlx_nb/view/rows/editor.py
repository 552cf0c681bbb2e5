"""The row editor of the browser: a text box with the columns of a row, and the resulting tokens."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from html import escape
from typing import Any

import ipywidgets as widgets

from mlx_nb.data.examples.examples import Examples
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.errors import DataError
from mlx_nb.view.rows.display import RowDisplay
from mlx_nb.view.theme import ORANGE, WRAP, tint


class RowEditor:
    """A row editor, displayed as `widget`. The row in the data is not changed.

    `on_show` returns (examples, row) of the row to edit, or None.
    """

    def __init__(self, tokenizer: Tokenizer, on_show: Callable[[], tuple[Examples, int] | None]) -> None:
        self._tokenizer = tokenizer
        self._on_show = on_show
        self.open = widgets.ToggleButton(False, description="Edit", tooltip="try this row with another text")
        self.open.layout.width = "auto"
        self.text = widgets.Textarea(layout=widgets.Layout(width="100%", height="9em"))
        self.try_it = widgets.Button(description="Try", tooltip="what the model would see", layout={"width": "auto"})
        self.view = widgets.HTML()
        self.widget = widgets.VBox([self.text, self.try_it, self.view], layout={"display": "none"})
        me = weakref.proxy(self)
        self.open.observe(lambda _: me.show(), "value")
        self.try_it.on_click(lambda _: me.try_row())

    def show(self) -> None:
        """Load the current row into the editor."""
        there = self._on_show() if self.open.value else None
        self.widget.layout.display = "none" if there is None else ""
        self.view.value = ""
        if there is not None:
            examples, row = there
            try:
                self.text.value = json.dumps(examples.source[row], ensure_ascii=False, indent=1, default=str)
            except DataError as error:
                self.text.value, self.view.value = "", _message_html(str(error))

    def try_row(self) -> None:
        """Show the tokens of the edited row."""
        if (there := self._on_show()) is None:
            return
        examples, row = there
        try:
            record: Any = json.loads(self.text.value)
        except ValueError as error:
            self.view.value = _message_html(f"this is not valid JSON: {error}")
            return
        if not isinstance(record, dict):
            self.view.value = _message_html("a row must be a JSON object: its columns with their values.")
            return
        view = examples.view(row, record)
        self.view.value = RowDisplay(view, self._tokenizer, "edited")._repr_html_()


def _message_html(text: str) -> str:
    return f'<div style="border-left:3px solid {tint(ORANGE, 1)};padding-left:8px;{WRAP}">{escape(text)}</div>'
