"""The page of the panel for methods that learn from what the model writes: the completions of the last rollouts."""

from __future__ import annotations

import time
from typing import Any

import ipywidgets as widgets

from mlx_nb.errors import MlxNbError
from mlx_nb.events import RolloutCompleted, RunState
from mlx_nb.view.panel.run_handle import RunHandle
from mlx_nb.view.panel.tabs import Later, line, note_html
from mlx_nb.view.reports.completions import Ratios, completions_html

ROLLOUTS = 30
NEWEST = "newest"


class CompletionsTab:
    """The newest rollout, or one of the last, as tables; on demand with its tokens colored by log-ratio."""

    def __init__(self, run: RunHandle, later: Later) -> None:
        self._run = run
        self._quiet = False
        self._drawn: tuple[Any, ...] | None = None
        self._ratios: Ratios = ()
        self._ratios_of: tuple[Any, ...] | None = None
        self._ratios_due = 0.0
        self.rollout = widgets.Dropdown(
            options=[NEWEST], description="rollout", style={"description_width": "4em"}, layout={"width": "16em"}
        )
        self.color = widgets.ToggleButton(
            description="Color by log-prob ratio",
            tooltip="log(policy now / policy that sampled) of each token of the newest completions",
            layout={"width": "auto"},
        )
        self.note = widgets.HTML()
        self.view = widgets.HTML(note_html("no completions are sampled yet"), layout={"width": "100%"})
        self.rollout.observe(lambda _: later(self._chosen), "value")
        self.color.observe(lambda _: later(self.refresh), "value")
        self.widget = widgets.VBox([line(self.rollout, self.color), self.note, self.view])

    def _chosen(self) -> None:
        if not self._quiet:
            self.refresh()

    def refresh(self) -> None:
        """Draw the rollout that is chosen, if it is not on show already."""
        rollouts = self._run.history.last_rollouts(ROLLOUTS)
        self._offer([NEWEST, *(f"after update {one.step}" for one in reversed(rollouts))])
        if not rollouts:
            return
        at = self.rollout.index
        shown = rollouts[-max(1, at)]
        newest = shown is rollouts[-1]
        ratios = self._measured(shown) if self.color.value and newest else ()
        note = "" if newest or not self.color.value else "only the newest completions can be compared with the policy"
        if note:
            self.note.value = note_html(note)
        elif not self.color.value:
            self.note.value = ""
        drawn = (shown.step, id(shown), self._ratios_of if ratios else None)
        if drawn != self._drawn:
            self._drawn = drawn
            self.view.value = completions_html(shown, self._run.tokenizer if ratios else None, ratios)

    def _offer(self, options: list[str]) -> None:
        if options == list(self.rollout.options):
            return
        chosen = self.rollout.value
        self._quiet = True
        self.rollout.options = options
        self.rollout.value = chosen if chosen in options else NEWEST
        self._quiet = False

    def _measured(self, rollout: RolloutCompleted) -> Ratios:
        """In the background measured only so often that it takes a twentieth of the time."""
        of, now = (id(rollout), self._run.step_count), time.monotonic()
        if of == self._ratios_of or (self._run.state == RunState.RUNNING and now < self._ratios_due):
            return self._ratios
        try:
            self._ratios, self.note.value = self._run.log_ratios(), ""
        except (MlxNbError, RuntimeError) as error:  # mlx says so when memory runs out
            self._ratios, self.note.value = (), note_html(str(error))
        self._ratios_of = of
        self._ratios_due = time.monotonic() + 20 * (time.monotonic() - now)
        return self._ratios
