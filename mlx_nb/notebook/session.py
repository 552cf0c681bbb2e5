"""The runs of this kernel, by name; one of them is current."""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from mlx_nb.errors import CommandError, MlxNbError, did_you_mean
from mlx_nb.notebook.preferences import Finetune
from mlx_nb.view.panel.still import lasting_html

if TYPE_CHECKING:
    from mlx_nb.events import Event
    from mlx_nb.notebook.lasting_output import Outcome
    from mlx_nb.notebook.new_run import NewRun
    from mlx_nb.notebook.queued_cells import QueuedCells
    from mlx_nb.run.run import Run
    from mlx_nb.view.panel.panel import Panel


class Session:
    """Runs in the order they were made; `namespace` is the notebook's. Making a run of an existing name replaces it.

    `queued` has the cells wait that are queued behind one that starts a run.
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
        self.looked_at: Run | None = None  # of which only the rows are looked at
        self.form: NewRun | None = None  # of a run that there is not yet
        self._current: str | None = None
        self._shown: dict[str, tuple[Panel, Outcome]] = {}
        self._further: dict[str, list[Any]] = {}  # what stands below further views of a panel, once that is closed
        self._replaced: dict[str, list[Outcome]] = {}  # of runs that were let go, by their name

    def add(self, run: Run, output: str | None = None) -> list[str]:
        """Keep `run`, bind it to the variable `output` and make it current. Returns what there is to say of that.

        A run of that name is saved and let go, its panel with it; variables that hold it are named. Raises
        CheckpointError when that one cannot be saved, or the new one cannot be in its folder; then it stays.
        """
        if not run.prepared:
            run.home.refuse_misplaced()  # while the run before still stands
        notes, before = list[str](), self.runs.get(run.name)
        if before is not None and before is not run:
            bound = f" (the variable {output})" if output else ""
            resumed = run.home.run_id == before.home.run_id
            by = "the same run, resumed in this process" if resumed else "a new run of that name"
            before.release(f"{run.name} was replaced by {by}{bound}")
            self._leave_shown(run)
            del self.runs[run.name]  # the newest is the last
            notes = [
                f"The variable {name} is still the run that was replaced. `-o {name}` binds the new one."
                for name in self._variables_of(before)
                if name != output
            ]
        holder = run.home.other_holder()
        if holder is not None:  # one that was made in Python
            holder.let_go(f"{holder.name} was replaced by the new run {run.name}")
        self.runs[run.name] = run
        self._current = run.name
        if output is not None and self.namespace is not None:
            self.namespace[output] = run
        return notes

    def _variables_of(self, run: Run) -> list[str]:
        """The notebook's variables that are this run."""
        return [name for name, value in (self.namespace or {}).items() if value is run and not name.startswith("_")]

    def panel_of(self, run: Run) -> Panel | None:
        """The panel of this run, when some browser has it open."""
        shown = self._shown.get(run.name)
        return shown[0] if shown and shown[0].run is run and shown[0].is_open else None

    def keep_shown(self, run: Run, panel: Panel, outcome: Outcome) -> None:
        """What a run is shown by from now on; what it was shown by before is let go."""
        for one in self._shown.pop(run.name, ()):
            if one is not panel:
                one.close()
        self._shown[run.name] = (panel, outcome)

    def show_further(self, run: Run, panel: Panel) -> None:
        """One more view of the panel in the cell that is executed, with a place for words when it is closed."""
        from IPython.display import display

        display(panel)
        place = display({"text/plain": ""}, raw=True, display_id=True)
        self._further.setdefault(run.name, []).append(place)

    def _leave_shown(self, run: Run) -> None:
        """Close what shows the run that `run` replaces.

        Once `run` has the folder, all that were replaced under this name say where they are kept since.
        """
        name = run.name
        shown = self._shown.get(name)
        self._close_shown(name)
        if shown is not None:
            self._replaced.setdefault(name, []).append(shown[1])

        def say_where(_event: Event) -> None:
            if run.prepared:
                run.unlisten(say_where)
                for outcome in self._replaced.get(name, ()):
                    outcome.say_where()

        run.listen(say_where)

    def publish(self, run: Run) -> None:
        """Write what lasts of this run as it is now, where it has a place, also on a page that was opened since."""
        if (shown := self._shown.get(run.name)) and shown[0].run is run:
            shown[1].publish()
            shown[1].show_again()

    def show_again(self, run: Run) -> None:
        """On a page that was opened since, in the cell that is executed, what was written of this run."""
        if (shown := self._shown.get(run.name)) and shown[0].run is run:
            shown[1].show_again()

    def _close_shown(self, name: str) -> None:
        for one in self._shown.pop(name, ()):
            one.close()
        words = f"{name} is another run since, or was let go: its result is in the cell that made it."
        for place in self._further.pop(name, ()):
            if place is not None:
                place.update({"text/html": lasting_html(words), "text/plain": words}, raw=True)

    def close(self) -> None:
        """Stop what moves where it is, save it, and take the panels away: the extension is being unloaded."""
        if self.queued is not None:
            self.queued.close()
        for run in self.runs.values():
            run.background.stop()
        self.save_all()
        for name in list(self._shown):
            self._close_shown(name)
        if self.form is not None:
            self.form.close()

    def save_all(self) -> None:
        """Write a checkpoint of every run that did updates since its last one. What cannot be saved is said."""
        for run in self.runs.values():
            try:
                run.save_unsaved()
            except MlxNbError as error:
                print(f"{run.name}: {error}", file=sys.stderr)

    def get(self, name: str | None = None) -> Run:
        """The run called `name`, or the current one. Raises CommandError when there is none."""
        if name is None:
            if self._current is None:
                raise CommandError("there is no run yet. A %%finetune cell makes one.")
            return self.runs[self._current]
        if name not in self.runs:
            made = ", ".join(self.runs) or "none yet"
            raise CommandError(f"no run is called {name!r}.{did_you_mean(name, self.runs)} Runs: {made}.")
        return self.runs[name]

    def select(self, name: str) -> Run:
        """Make the run called `name` current."""
        run = self.get(name)
        self._current = name
        return run

    def is_current(self, run: Run) -> bool:
        """Whether a command without a name means this run."""
        return self._current is not None and self.runs[self._current] is run
