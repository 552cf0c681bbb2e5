"""Answers the page's requests for content: lists of rows, one row, the next batch, completions."""

from __future__ import annotations

import time
from typing import Any

from mlx_nb.errors import MlxNbError
from mlx_nb.events import RolloutCompleted, RunState, StepCompleted
from mlx_nb.view.event_text import visits_text
from mlx_nb.view.panel.run_handle import RunHandle
from mlx_nb.view.panel.state import PageData, listed_rows, rows_of
from mlx_nb.view.reports.completions import Ratios, completions_html
from mlx_nb.view.rows.batch import BatchDisplay
from mlx_nb.view.rows.display import RowDisplay, measured_losses

ROWS_OF_A_PAGE = 50
WORST_ROWS = 200
ROLLOUTS = 30
# Content that was not requested is sent only if it is short.
MOST_CHARACTERS_UNREQUESTED = 30_000
NOT_THE_NEWEST = "only the newest completions can be compared with the current policy"


class PageRequests:
    """The content of one run. Expensive results are refreshed only as often as takes 5% of the time."""

    def __init__(self, run: RunHandle) -> None:
        self._run = run
        self._worst: dict[str, list[tuple[int, float | None]]] = {}
        self._worst_due: dict[str, float] = {}
        self._ratios: Ratios = ()
        self._ratios_of: tuple[Any, ...] | None = None
        self._ratios_due = 0.0
        self._ratios_note = ""

    def latest(self) -> PageData:
        """The rows of the newest update, or before the first update those of the next one."""
        run = self._run
        data = rows_of(run.history.last_step, self._location("train"))
        if data["update"] is None and run.prepared:
            coming: list[tuple[int, float | None]] = [(row, None) for row in dict.fromkeys(run.trainer.next_rows())]
            data["rows"] = listed_rows(coming, self._location("train"))
        return data

    def rows(self, which: str, split: str = "train", update: int | None = None, page: int = 0) -> PageData:
        """`rows` as [row, loss, location], a `note`, and the number of `pages`.

        which   `update` (the rows of that update), `worst` (highest loss first) or `all` (in their order)
        """
        if which == "update":
            found = (
                one for one in self._run.history.in_effect if isinstance(one, StepCompleted) and one.step == update
            )
            return {**rows_of(next(found, None), self._location(split)), "pages": 1}
        if which == "worst":
            losses = self._worst_rows(split)
            note = f"the {len(losses)} rows with the highest loss when last trained or evaluated"
            listed = listed_rows(losses, self._location(split))
            return {"rows": listed, "note": note if losses else "no losses yet", "pages": 1}
        total = len(self._run.inputs.split(split))
        first = ROWS_OF_A_PAGE * page
        some: list[tuple[int, float | None]] = [(row, None) for row in range(first, min(total, first + ROWS_OF_A_PAGE))]
        rows = listed_rows(some, self._location(split))
        return {"rows": rows, "note": f"{total:,} rows", "pages": max(1, -(-total // ROWS_OF_A_PAGE))}

    def row(self, split: str, row: int, color: str = "mask", page: int = 0, *, tokens: bool = False) -> PageData:
        """One row as `html`, its `pages`, and the losses of earlier `visits`. `color` is mask, loss or compare."""
        run = self._run
        view = run.inputs.split(split).view(row)
        losses: dict[str, Any] = {}
        if color != "mask" and view.conversation is not None:
            losses = measured_losses(view, run.token_losses, compare=color == "compare")
        display = RowDisplay(view, run.tokenizer, split, per_token=tokens, page=page, **losses)
        visits = visits_text(run.history.row_losses(split).get(row, []))
        return {"html": display._repr_html_(), "pages": display.pages, "visits": visits}

    def batch(self) -> PageData:
        """The arrays of the next update as `html`."""
        return {"html": BatchDisplay(self._run.trainer.next_batches(), self._run.tokenizer)._repr_html_()}

    def completions(self, *, colored: bool, requested: bool) -> PageData:
        """The newest completions as `html` (None: request it), the `updates` before each rollout, and a `note`."""
        rollouts = self._run.history.last_rollouts(ROLLOUTS)
        if not rollouts:
            return {"updates": [], "html": "", "note": "no completions have been sampled yet"}
        shown = rollouts[-1]
        ratios = self._measured(shown) if colored else ()
        html = completions_html(shown, self._run.tokenizer if ratios else None, ratios)
        return {
            "updates": [one.step for one in reversed(rollouts)],
            "html": html if requested or len(html) <= MOST_CHARACTERS_UNREQUESTED else None,
            "note": self._ratios_note if colored else "",
        }

    def rollout(self, place: int, *, colored: bool = False) -> PageData:
        """The completions of `place` rollouts ago, as `html`."""
        rollouts = self._run.history.last_rollouts(ROLLOUTS)
        if place == 0:
            return self.completions(colored=colored, requested=True)
        if place >= len(rollouts):
            return {"html": "", "note": "these completions are no longer stored"}
        return {"html": completions_html(rollouts[-1 - place]), "note": NOT_THE_NEWEST if colored else ""}

    def _location(self, split: str) -> Any:
        try:
            return self._run.inputs.split(split).source.location if self._run.prepared else lambda row: ""
        except MlxNbError:
            return lambda row: ""

    def _worst_rows(self, split: str) -> list[tuple[int, float | None]]:
        now = time.monotonic()
        if now >= self._worst_due.get(split, 0.0):
            losses = list(self._run.row_losses(split).items())[:WORST_ROWS]
            self._worst[split] = [(row, loss) for row, loss in losses]
            self._worst_due[split] = time.monotonic() + 20 * (time.monotonic() - now)
        return self._worst[split]

    def _measured(self, rollout: RolloutCompleted) -> Ratios:
        of, now = (id(rollout), self._run.step_count), time.monotonic()
        if of == self._ratios_of or (self._run.state == RunState.RUNNING and now < self._ratios_due):
            return self._ratios
        try:
            self._ratios, self._ratios_note = self._run.log_ratios(), ""
        except (MlxNbError, RuntimeError) as error:  # mlx raises it when memory runs out
            self._ratios, self._ratios_note = (), str(error)
        self._ratios_of = of
        self._ratios_due = time.monotonic() + 20 * (time.monotonic() - now)
        return self._ratios
