"""The row browser: ipywidgets to page through, search and mark the rows as the model sees them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from mlx_nb.data.examples.examples import Examples, RowView
from mlx_nb.data.examples.row_finder import ALL, FILTERS, RowFinder, Search
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.data.sources.export import write_rows
from mlx_nb.errors import CommandError, DataError, MlxNbError
from mlx_nb.view.event_loop import call_in_loop, running_loop
from mlx_nb.view.rows.display import RowDisplay, TokenLoss, measured_losses
from mlx_nb.view.rows.editor import RowEditor
from mlx_nb.view.theme import WRAP, visible_html
from mlx_nb.view.widget_cleanup import close_widgets

# A click searches for this long, so that the notebook never waits for a whole split.
SECONDS_PER_CLICK = 1.0
ROLES = ("system", "user", "assistant", "tool", "template")
COLORS = {"mask": "mask", "loss now": "loss", "change against the base": "compare", "nothing": "none"}

# The widgets get one left edge, boxes level with their words, and switches that look different from buttons.
_STYLE = """<style>
.mlx-nb-rows { padding-left: 2px; }
.mlx-nb-rows .jupyter-widgets { margin-left: 0; }
.mlx-nb-rows .widget-label { width: auto !important; min-width: 0; margin-right: 6px; }
.mlx-nb-rows .widget-checkbox { display: flex; align-items: center; }
.mlx-nb-rows .widget-checkbox label { display: flex; align-items: center; gap: 5px; margin: 0; }
.mlx-nb-rows .widget-checkbox input { margin: 0; }
.mlx-nb-rows .jupyter-button { box-shadow: none; }
.mlx-nb-rows .widget-toggle-button { background: none; border-bottom: 2px solid transparent; }
.mlx-nb-rows .widget-toggle-button.mod-active { border-bottom-color: #0072b2; background: rgba(128, 128, 128, 0.18); }
</style>"""


class RowBrowser:
    """The widgets of `%finetune browse`, displayed as `widget`, or as the current row if there are no widgets.

    splits      {split: its Examples}
    losses      split -> {row: loss} for the filter `highest loss`
    token_loss  losses of the tokens of a row, for coloring; may raise MlxNbError
    visits      (split, row) -> text about the losses of earlier visits, or ""; may raise MlxNbError

    Its widgets are closed when it is garbage-collected.
    """

    def __init__(
        self,
        splits: Mapping[str, Examples],
        tokenizer: Tokenizer,
        *,
        losses: Callable[[str], Mapping[int, float]],
        token_loss: TokenLoss,
        visits: Callable[[str, int], str],
    ) -> None:
        self._splits = splits
        self._tokenizer = tokenizer
        self._token_loss = token_loss
        self._visits = visits
        self._finders = {split: RowFinder(examples, partial(losses, split)) for split, examples in splits.items()}
        self.position = 0
        self._page = 0
        self._updating = False
        self._left_out: set[int] = set()
        self._down_weighted: set[int] = set()
        self._build()
        self.search: Search = self._finder.search()
        self._choose(0)

    @property
    def _finder(self) -> RowFinder:
        return self._finders[self.split.value]

    @property
    def row(self) -> int | None:
        """The number of the current row; None if nothing was found."""
        return self.search.found[self.position] if self.position < len(self.search.found) else None

    @property
    def left_out_rows(self) -> list[int]:
        """The training rows marked to be left out, in the form of the setting."""
        return sorted(self._left_out)

    def _edited(self) -> tuple[Examples, int] | None:
        return None if self.row is None else (self._splits[self.split.value], self.row)

    @property
    def down_weighted_rows(self) -> list[int]:
        """The training rows marked for a lower weight, in the form of the setting."""
        return sorted(self._down_weighted)

    def export(self, path: str | Path) -> int:
        """Write the found rows, except those to leave out, to a new jsonl file. Returns their number.

        Raises CommandError if the search is not complete, or if the file cannot be written.
        """
        if not self.search.done:
            raise CommandError(f"{self._summary(len(self.search.found))}: click Search more until all are searched.")
        left = self._left_out if self.split.value == "train" else set()
        rows = (row for row in sorted(self.search.found) if row not in left)
        return write_rows(self._splits[self.split.value].source, rows, Path(path).expanduser())

    def _exported(self) -> None:
        try:
            self.export_note.value = f"{self.export(self.file.value):,} rows were written to {escape(self.file.value)}"
        except (CommandError, DataError) as error:
            self.export_note.value = escape(str(error))

    def _mark(self, marks: Mapping[str, bool]) -> None:
        """Mark the current row to be left out, or to have a lower weight, but not both."""
        if self._updating or self.row is None:
            return
        for marked, name in ((self._left_out, "leave"), (self._down_weighted, "lighter")):
            if name in marks:
                (marked.add if marks[name] else marked.discard)(self.row)
            elif any(marks.values()):
                marked.discard(self.row)
        self._show_marks()
        lines = [f"leave_out: {self.left_out_rows}"] * bool(self._left_out)
        lines += [f"down_weight: {self.down_weighted_rows}"] * bool(self._down_weighted)
        self.setting.value = "in the settings: " + " ".join(f"<code>{line}</code>" for line in lines) if lines else ""

    def _show_marks(self) -> None:
        was_updating, self._updating = self._updating, True
        for box, marked in ((self.leave, self._left_out), (self.lighter, self._down_weighted)):
            box.value = self.row in marked and self.split.value == "train"
            box.disabled = self.row is None or self.split.value != "train"
        self._updating = was_updating

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        # An exported notebook has no kernel for its widgets and shows the row itself.
        bundle = self.widget._repr_mimebundle_(include=include, exclude=exclude)
        plain = f"rows of {self.split.value}: {len(self._finder):,}"
        if self.row is not None:
            row = self._splits[self.split.value].view(self.row)
            plain += f"\n\n{RowDisplay(row, self._tokenizer, self.split.value)!r}"
        return {**bundle, "text/html": self.view.value, "text/plain": plain}

    def _build(self) -> None:
        self.split = widgets.Dropdown(options=list(self._splits), description="split", layout=_width("11em"))
        self.filter = widgets.Dropdown(options=FILTERS, description="show", layout=_width("14em"))
        self.text = widgets.Text(
            placeholder="containing…", continuous_update=False, layout=_width("11em"), tooltip="press Enter to search"
        )
        self.regex = widgets.Checkbox(description="regex", indent=False, layout=_width("auto"))
        self.previous = widgets.Button(description="◀ Previous", tooltip="previous row", layout=_width("auto"))
        self.next = widgets.Button(description="Next ▶", tooltip="next row", layout=_width("auto"))
        self.jump = widgets.BoundedIntText(description="row", min=0, max=0, layout=_width("8em"))
        self.color = widgets.Dropdown(options=list(COLORS), description="color", layout=_width("14em"))
        self.tokens = widgets.Checkbox(description="one cell per token", indent=False, layout=_width("auto"))
        self.roles = {role: _toggle(role) for role in ROLES}
        self.more = widgets.Button(
            description="Search more", tooltip="search the rows that follow", layout=_width("auto")
        )
        self.page_back = widgets.Button(description="◀ page", layout=_width("auto"))
        self.page_next = widgets.Button(description="page ▶", layout=_width("auto"))
        self.leave = widgets.Checkbox(description="leave out", indent=False, layout=_width("auto"))
        self.lighter = widgets.Checkbox(description="down-weight", indent=False, layout=_width("auto"))
        self.lighter.tooltip = "give it less weight in training"
        self.setting = widgets.HTML()
        self.file = widgets.Text(value="selection.jsonl", layout=_width("13em"), tooltip="a new file")
        self.write = widgets.Button(
            description="Export",
            tooltip="write the found rows, except those to leave out",
            layout=_width("auto"),
        )
        self.export_note = widgets.HTML()
        self.status = widgets.HTML()
        self.view = widgets.HTML()
        for box in (self.split, self.filter, self.jump, self.color):
            box.style.description_width = "initial"
        me = weakref.proxy(self)  # ipywidgets keeps the widgets alive; their callbacks must not keep this object alive
        self.editor = RowEditor(self._tokenizer, lambda: me._edited())
        self.leave.observe(lambda change: me._mark({"leave": change["new"]}), "value")
        self.lighter.observe(lambda change: me._mark({"lighter": change["new"]}), "value")
        self.write.on_click(lambda _: me._exported())
        self.previous.on_click(lambda _: me._choose(me.position - 1))
        self.next.on_click(lambda _: me._choose(me.position + 1))
        self.more.on_click(lambda _: me._search_more())
        self.page_back.on_click(lambda _: me._turn(-1))
        self.page_next.on_click(lambda _: me._turn(1))
        for box in (self.split, self.filter, self.text, self.regex):
            box.observe(lambda _: me._search(), "value")
        self.jump.observe(lambda change: me._jump(change["new"]), "value")
        for box in (self.color, self.tokens, *self.roles.values()):
            box.observe(lambda _: me._show(), "value")
        wrap = widgets.Layout(flex_flow="row wrap", align_items="center", grid_gap="2px 8px")
        self.widget = widgets.VBox(
            [
                widgets.HTML(_STYLE, layout=widgets.Layout(height="0", margin="0")),
                widgets.Box([self.split, self.filter, self.text, self.regex], layout=wrap),
                widgets.Box([self.previous, self.next, self.jump, self.color, self.tokens], layout=wrap),
                widgets.Box([widgets.Label("roles"), *self.roles.values()], layout=wrap),
                widgets.Box([self.status, self.more, self.page_back, self.page_next], layout=wrap),
                widgets.Box([self.editor.open, self.leave, self.lighter, self.setting], layout=wrap),
                widgets.Box([self.write, self.file, self.export_note], layout=wrap),
                self.view,
                self.editor.widget,
            ]
        )
        self.widget.add_class("mlx-nb-rows")
        weakref.finalize(self, call_in_loop, running_loop(), partial(close_widgets, self.widget)).atexit = False

    def _search(self) -> None:
        if self._updating:
            return
        try:
            self.search = self._finder.search(self.filter.value, self.text.value, regex=self.regex.value)
        except MlxNbError as error:
            self._set_status(str(error))
            return
        self.position = 0
        self._search_more()

    def _search_more(self) -> None:
        """Search more rows. Keeps the current row selected, except that the first result stays the first."""
        kept = self.row if self.position else None
        self.search.examine(SECONDS_PER_CLICK)
        self._choose(0 if kept is None else self.search.found.index(kept))

    def _jump(self, row: int) -> None:
        if self._updating or row == self.row:
            return
        if self.filter.value != ALL or self.text.value:
            self._updating = True
            self.filter.value, self.text.value = ALL, ""
            self._updating = False
            self.search = self._finder.search()
        self._choose(row)

    def _choose(self, position: int) -> None:
        """Show the found row at `position`."""
        self.position = max(0, min(position, len(self.search.found) - 1))
        self._page = 0
        self._show()

    def _turn(self, pages: int) -> None:
        self._page += pages
        self._show()

    def _show(self) -> None:
        row, found = self.row, len(self.search.found)
        self._updating = True
        self.jump.max = max(0, len(self._finder) - 1)
        if row is not None:
            self.jump.value = row
        self._show_marks()
        self._updating = False
        self.editor.show()
        self.previous.disabled = self.position <= 0
        self.next.disabled = self.position >= found - 1
        self.more.layout.display = "none" if self.search.done else ""
        self._set_status(self._summary(found))
        pages = 1
        if row is None:
            self.view.value = ""
        else:
            view = self._splits[self.split.value].view(row)
            pages = self._show_row(view)
        for button, useful in ((self.page_back, self._page > 0), (self.page_next, self._page < pages - 1)):
            button.layout.display = "" if pages > 1 else "none"
            button.disabled = not useful

    def _show_row(self, view: RowView) -> int:
        """Display one row; returns its number of pages."""
        note, losses = "", {}
        choice = COLORS[self.color.value]
        if choice in ("loss", "compare") and view.conversation is not None:
            try:
                losses = measured_losses(view, self._token_loss, compare=choice == "compare")
            except MlxNbError as error:
                losses, note = {}, str(error)
        display = RowDisplay(
            view,
            self._tokenizer,
            self.split.value,
            per_token=self.tokens.value,
            page=self._page,
            show_mask=choice != "none",
            hidden_roles=[role for role, toggle in self.roles.items() if not toggle.value],
            **losses,
        )
        try:
            visits = self._visits(self.split.value, view.row)
        except MlxNbError as error:
            visits = str(error)
        self.view.value = display._repr_html_() + _note(note) + _note(visits)
        return display.pages

    def _summary(self, found: int) -> str:
        search, total = self.search, len(self._finder)
        if self.filter.value == ALL and not self.text.value:
            return f"{total:,} rows"
        if not search.total:
            return "no losses yet; train a few steps, or evaluate this split"
        where = f"{self.position + 1:,} of {found:,} found" if found else "nothing found"
        return f"{where} in {search.read:,} of {search.total:,} rows"

    def _set_status(self, text: str) -> None:
        self.status.value = f'<span style="font-size:.9em;{WRAP}">{escape(text)}</span>&ensp;'


def _width(width: str) -> widgets.Layout:
    return widgets.Layout(width=width)


def _toggle(role: str) -> widgets.ToggleButton:
    return widgets.ToggleButton(True, description=role, tooltip=f"show or hide {role} messages", layout=_width("auto"))


def _note(text: str) -> str:
    return f'<div style="font-size:.85em;{WRAP}">{visible_html(text)}</div>' if text else ""
