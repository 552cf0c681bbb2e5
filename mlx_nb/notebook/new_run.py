"""The form of `%finetune new`: model, data, method and settings, the plan, a view of the rows, and the resulting cell.

It trains nothing; its result is the text of a `%%finetune` cell.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from mlx_nb.config.yaml_text import read_words
from mlx_nb.errors import CommandError, MlxNbError
from mlx_nb.notebook.new_run_cell import cell_text, fields_of
from mlx_nb.notebook.new_run_plan import planned_from, pump, shown_plans
from mlx_nb.notebook.templating import fill
from mlx_nb.run.run import Run
from mlx_nb.view.event_loop import call_in_loop, running_loop
from mlx_nb.view.panel.panel import page_part
from mlx_nb.view.reports.check import render_html
from mlx_nb.view.rows.display import RowDisplay
from mlx_nb.view.theme import WRAP
from mlx_nb.view.widget_cleanup import close_widgets

ROWS_CHECKED = 1000  # rows of each split that a click on Check tokenizes
_PAGE = Path(__file__).with_name("page")
EXAMPLE = "data=bees iters=60"


def new(*, namespace: Mapping[str, Any] | None = None, **settings: Any) -> NewRun:
    """A form for a new run: `mlx_nb.new(data="bees")`. It displays itself; `.cell` is the resulting cell.

    `settings` are the initial values of its fields. `namespace` has the variables that may contain rows; the default
    is the notebook's. Raises CommandError for a setting that is not a text or a number.
    """
    from IPython.core.getipython import get_ipython

    shell: Any = get_ipython()
    variables = namespace if namespace is not None else shell.user_ns if shell is not None else {}
    for name, value in settings.items():
        if not isinstance(value, str | int | float):
            raise CommandError(f"mlx_nb.new: `{name}` is not a text or a number. Write it as a string with YAML in it.")
    return NewRun({name: _text_of(value) for name, value in settings.items()}, variables)


def given_in(words: list[str]) -> dict[str, str]:
    """The settings of `key=value` arguments as typed. Raises CommandError."""
    read_words(words, "%finetune new", EXAMPLE)
    return {key: text for key, _, text in (word.partition("=") for word in words)}


def _text_of(value: str | float) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def checked_run(given: Mapping[str, str], namespace: Mapping[str, Any]) -> Run:
    """The run that the cell would create, not loaded. Raises the errors of the cell that do not need loading."""
    body = cell_text(given).partition("\n")[2]
    run = Run.from_yaml(fill(body, namespace) + "\n", name=given.get("name") or "run", namespace=namespace)
    run.inputs.check_names()
    return run


class NewRun(anywidget.AnyWidget):
    """The form as a widget. `values` has the typed texts, `cell` the resulting cell, `plan` the plan of its memory.

    A click shows the rows or checks them; only the tokenizer of the model is loaded for this. The plan follows each
    change that affects it, between other work of the kernel.
    """

    # As text, because anywidget watches a path and then keeps every widget alive.
    _esm = page_part("dom.js") + (_PAGE / "new_run.js").read_text(encoding="utf-8")
    _css = page_part("panel.css") + (_PAGE / "new_run.css").read_text(encoding="utf-8")

    values = traitlets.Dict().tag(sync=True)
    cell = traitlets.Unicode().tag(sync=True)
    fields: traitlets.List[Any] = traitlets.List().tag(sync=True)
    problems: traitlets.List[Any] = traitlets.List().tag(sync=True)
    plan: traitlets.Dict[str, Any] = traitlets.Dict().tag(sync=True)

    def __init__(self, given: Mapping[str, str], namespace: Mapping[str, Any]) -> None:
        self._namespace = namespace
        self._run: tuple[str, Run] | None = None  # the cell, and the run whose rows are shown
        self._loop = running_loop()
        self._planning: asyncio.Task[None] | None = None
        self._planned: dict[str, str] | None = None  # the values that the plan, made or being made, is for
        super().__init__(values=dict(given))
        self.refresh()
        me: Any = weakref.proxy(self)
        self.observe(lambda _: me._later(me.refresh), "values")
        self.on_msg(lambda _, message, __: me._later(lambda: me.answer(message)))

    def refresh(self) -> None:
        """Update the cell and its problems from the typed values."""
        given = {name: str(text) for name, text in self.values.items()}
        with self.hold_sync():
            self.fields = [field._asdict() for field in fields_of(given, self._namespace)]
            self.cell = cell_text(given)
            try:
                checked_run(given, self._namespace)
                self.problems = []
            except MlxNbError as error:
                self.problems = str(error).splitlines()
            self._plan_again(planned_from(given))

    def _plan_again(self, wanted: dict[str, str]) -> None:
        """Begin a new plan if it depends on what was changed; none while the cell has problems."""
        if self.problems:
            wanted = {}
        if wanted == self._planned and not self.problems:
            return
        self._planned = wanted
        if self._planning is not None:
            self._planning.cancel()
            self._planning = None
        if self.problems or self._loop is None:
            self.plan = {}
            return
        me: Any = weakref.proxy(self)
        self.show_plan({"state": "planning", "verdict": "planning the memory …", "complete": False})
        self._planning = self._loop.create_task(pump(me.plans, me.show_plan), name="mlx_nb plan")

    def plans(self) -> Iterator[Mapping[str, Any]]:
        """What the form shows of the plan for the typed values, more and more complete."""
        return shown_plans(self._preview())

    def show_plan(self, shown: Mapping[str, Any]) -> None:
        """Show this much of a plan. While another one is planned, the tables of the last one stay."""
        self.plan = {**(self.plan if shown["state"] == "planning" else {}), **shown}

    def answer(self, message: Mapping[str, Any]) -> None:
        """Send the page what it requests: a row with its loss mask, or the check of all rows."""
        try:
            reply = self.row(int(message["row"])) if message.get("show") == "row" else self.check()
        except MlxNbError as error:
            reply = {"error": str(error)}
        self.send({"kind": "answer", "id": message.get("id"), **reply})

    def row(self, row: int) -> dict[str, Any]:
        """Training row `row` as the model will see it, as `html`, and the number of `rows`."""
        run = self._preview()
        rows = run.inputs.split("train")
        row = max(0, min(row, len(rows) - 1))
        html = RowDisplay(rows.view(row), run.tokenizer, "train")._repr_html_() if len(rows) else ""
        return {"html": html, "row": row, "rows": len(rows)}

    def check(self) -> dict[str, Any]:
        """What the data check finds, as `html`."""
        return {"html": render_html(self._preview().check(rows=ROWS_CHECKED))}

    def _preview(self) -> Run:
        given = {name: str(text) for name, text in self.values.items()}
        cell = cell_text(given)
        if self._run is None or self._run[0] != cell:
            self._run = cell, checked_run(given, self._namespace)
        return self._run[1]

    def _later(self, act: Callable[[], None]) -> None:
        """Call `act` on the kernel's thread; a click may arrive on another one."""

        def guarded() -> None:
            if self.comm is not None:
                act()

        call_in_loop(self._loop, guarded)

    def close(self) -> None:
        """Close the form."""
        if self._planning is not None:
            self._planning.cancel()
        if self.comm is not None:
            close_widgets(self.layout)
            self.unobserve_all()
            super().close()

    def _repr_mimebundle_(self, **options: Any) -> Any:
        data, metadata = super()._repr_mimebundle_(**options)  # type: ignore[misc]
        words = "The form was closed with its kernel; `%finetune new` opens a new one. It started with this cell:"
        html = f'<div>{words}</div><pre style="{WRAP}">{escape(self.cell)}</pre>'
        return {**data, "text/html": html, "text/plain": self.cell}, metadata
