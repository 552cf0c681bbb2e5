"""The runs of this kernel, by name; one of them is current."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlx_nb.errors import CommandError, MlxNbError, did_you_mean

if TYPE_CHECKING:
    from mlx_nb.run import Run


class Session:
    """Runs in the order they were made; `namespace` is the notebook's. Making a run of an existing name replaces it."""

    def __init__(self, namespace: Mapping[str, Any] | None = None) -> None:
        self.namespace = namespace
        self.runs: dict[str, Run] = {}
        self._current: str | None = None

    def add(self, run: Run) -> None:
        """Keep `run` and make it current."""
        self.runs.pop(run.name, None)
        self.runs[run.name] = run
        self._current = run.name

    def save_all(self) -> None:
        """Write a checkpoint of every run that did updates since its last one. For the end of the kernel."""
        for run in self.runs.values():
            if run.unsaved_updates > 0:
                try:
                    run.checkpoint("exit")
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
        return self._current is not None and self.runs[self._current] is run
