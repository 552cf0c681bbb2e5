"""The runs of a notebook by name, which one is current, and what shows them."""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from mlx_nb.errors import CommandError, MlxNbError, and_more, did_you_mean
from mlx_nb.events import RunState
from mlx_nb.files.kept_runs import resume_command
from mlx_nb.files.places import working_folder
from mlx_nb.notebook.preferences import Finetune
from mlx_nb.view.panel.static_view import lasting_html

if TYPE_CHECKING:
    from mlx_nb.events import Event
    from mlx_nb.experiments.sweep import Sweep
    from mlx_nb.notebook.lasting_output import Outcome
    from mlx_nb.notebook.new_run import NewRun
    from mlx_nb.notebook.queued_cells import QueuedCells
    from mlx_nb.run.run import Run
    from mlx_nb.view.panel.panel import Panel


_MOST_NAMED = 3  # saved runs in a message


def how_to_get_one() -> str:
    """How to get a run in a kernel that has none: a new one, or one that is saved in `adapters/`."""
    from mlx_nb.run.resume import resumable

    saved = [f"{name} (update {step})" for name, step in resumable(working_folder() / "adapters").items()]
    if not saved:
        return "A %%finetune cell creates one."
    return (
        "A %%finetune cell creates one, and `%finetune resume NAME` continues one that is saved: "
        f"{and_more(saved, _MOST_NAMED)}."
    )


class Session:
    """Runs in order of creation. A new run with the name of an existing one replaces it.

    `namespace` has the variables of the notebook. `queued` makes cells wait that are queued behind a cell that starts
    a run.
    """

    def __init__(
        self,
        namespace: MutableMapping[str, Any] | None = None,
        queued: QueuedCells | None = None,
        preferences: Finetune | None = None,
    ) -> None:
        self.namespace = namespace
        self.preferences = preferences if preferences is not None else Finetune()
        self.queued = queued
        self.runs: dict[str, Run] = {}
        self.row_preview: Run | None = None  # the run of `%finetune rows data=...`, which is never trained
        self.form: NewRun | None = None  # the open form for a new run
        self.sweep: Sweep | None = None  # the last one
        self._current: str | None = None
        self._shown: dict[str, tuple[Panel, Outcome]] = {}
        self._further: dict[str, list[Any]] = {}  # outputs below further views of a panel, filled when it is closed
        self._replaced: dict[str, list[Outcome]] = {}  # outcomes of replaced runs, by name

    def add(self, run: Run, output: str | None = None) -> list[str]:
        """Add `run`, store it in the variable `output` and make it current. Returns notes to print.

        A previous run of that name is saved and released, and its panel is closed; a note names the variables that
        still hold it. Raises CheckpointError if the previous run cannot be saved, or if the new one cannot use its
        folder; then the previous run stays.
        """
        if not run.prepared:
            run.home.refuse_misplaced()  # before the previous run is released
        notes, before = list[str](), self.runs.get(run.name)
        if before is not None and before is not run:
            bound = f" (the variable {output})" if output else ""
            resumed = run.home.run_id == before.home.run_id
            by = "the same run, resumed in this process" if resumed else "a new run of that name"
            before.release(f"{run.name} was replaced by {by}{bound}")
            self._leave_shown(run)
            del self.runs[run.name]  # so that the new one comes last
            notes = [
                f"The variable {name} still holds the replaced run. `-o {name}` stores the new one in it."
                for name in self._variables_of(before)
                if name != output
            ]
        holder = run.home.other_holder()
        if holder is not None:  # a run created in Python
            holder.let_go(f"{holder.name} was replaced by the new run {run.name}")
        self.runs[run.name] = run
        self._current = run.name
        if output is not None and self.namespace is not None:
            self.namespace[output] = run
        return notes

    def _variables_of(self, run: Run) -> list[str]:
        """The notebook variables that hold this run."""
        return [name for name, value in (self.namespace or {}).items() if value is run and not name.startswith("_")]

    def panel_of(self, run: Run) -> Panel | None:
        """The panel of this run, if it is open in a browser."""
        shown = self._shown.get(run.name)
        return shown[0] if shown and shown[0].run is run and shown[0].is_open else None

    def register_panel(self, run: Run, panel: Panel, outcome: Outcome) -> None:
        """Register the panel of a run and the summary and figure below it; the previous ones are closed."""
        for one in self._shown.pop(run.name, ()):
            if one is not panel:
                one.close()
        self._shown[run.name] = (panel, outcome)

    def show_panel_again(self, run: Run, panel: Panel) -> None:
        """Show the panel in the current cell as well, with an output below it that explains when it is closed."""
        from IPython.display import display

        display(panel)
        place = display({"text/plain": ""}, raw=True, display_id=True)
        self._further.setdefault(run.name, []).append(place)

    def _leave_shown(self, run: Run) -> None:
        """Close the views of the run that `run` replaces.

        Once `run` has taken the folder, the outputs of all replaced runs of this name show where they are stored now.
        """
        name = run.name
        shown = self._shown.get(name)
        self._close_shown(name)
        if shown is not None:
            self._replaced.setdefault(name, []).append(shown[1])

        def show_location(_event: Event) -> None:
            if run.prepared:
                run.unlisten(show_location)
                for outcome in self._replaced.get(name, ()):
                    outcome.show_location()

        run.listen(show_location)

    def publish(self, run: Run) -> None:
        """Update the summary and figure of this run below its panel, also on a page that was opened later."""
        if (shown := self._shown.get(run.name)) and shown[0].run is run:
            shown[1].publish()
            shown[1].show_again()

    def show_again(self, run: Run) -> None:
        """Show the summary and figure of this run in the current cell, if the page was opened later."""
        if (shown := self._shown.get(run.name)) and shown[0].run is run:
            shown[1].show_again()

    def _close_shown(self, name: str) -> None:
        for one in self._shown.pop(name, ()):
            one.close()
        words = f"{name} was replaced or released. Its result is in the cell that created it."
        for place in self._further.pop(name, ()):
            if place is not None:
                place.update({"text/html": lasting_html(words), "text/plain": words}, raw=True)

    def close(self) -> None:
        """Stop and save all runs and close the panels, when the extension is unloaded. Says how to continue them."""
        if self.queued is not None:
            self.queued.close()
        for run in self.runs.values():
            run.background.stop()
        self.save_all()
        for name, run in self.runs.items():
            if run.state == RunState.PAUSED and not run.unsaved_updates and (continues := resume_command(run.folder)):
                print(f"{name} is saved, paused after update {run.step_count}. {continues} goes on with it.")
        for name in list(self._shown):
            self._close_shown(name)
        if self.form is not None:
            self.form.close()

    def save_all(self) -> None:
        """Write a checkpoint of every run with unsaved updates. Prints an error for a run that cannot be saved."""
        for run in self.runs.values():
            try:
                run.save_unsaved()
            except MlxNbError as error:
                print(f"{run.name}: {error}", file=sys.stderr)

    def get(self, name: str | None = None) -> Run:
        """The run called `name`, or the current one. Raises CommandError if there is none."""
        if name is None:
            if self._current is None:
                raise CommandError(f"there is no run yet. {how_to_get_one()}")
            return self.runs[self._current]
        if name not in self.runs:
            known = ", ".join(self.runs) or "none yet"
            raise CommandError(f"no run is called {name!r}.{did_you_mean(name, self.runs)} Runs: {known}.")
        return self.runs[name]

    def select(self, name: str) -> Run:
        """Make the run called `name` current."""
        run = self.get(name)
        self._current = name
        return run

    def is_current(self, run: Run) -> bool:
        """Whether commands without a name act on this run."""
        return self._current is not None and self.runs[self._current] is run
