"""Rewinds a run to an earlier update, from a snapshot in memory or a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mlx_nb.errors import CheckpointError, CommandError, FolderError
from mlx_nb.events import Event, Rewound
from mlx_nb.run.checkpoints import Checkpoints

if TYPE_CHECKING:
    from mlx_nb.train.checkpoint import Checkpoint
    from mlx_nb.train.trainer import Trainer


class RewindableRun(Protocol):
    """The interface of a run that rewinding needs."""

    name: str

    @property
    def trainer(self) -> Trainer:
        """Its trainer."""

    @property
    def step_count(self) -> int:
        """Updates done."""

    def checkpoint(self, kind: str = "step") -> Path:
        """Write an exact checkpoint. Raises CheckpointError."""


class Rewinding:
    """Rewinds one run. `record` takes the Rewound event."""

    def __init__(self, run: RewindableRun, checkpoints: Checkpoints, record: Callable[[Event], None]) -> None:
        self._run = run
        self._checkpoints = checkpoints
        self._record = record

    def target(self, updates: int) -> int:
        """The update that lies `updates` updates back. Raises CommandError for more than were done."""
        name, done = self._run.name, self._run.step_count
        if isinstance(updates, bool) or not isinstance(updates, int) or updates < 1:
            raise CommandError(f"cannot go back by {updates!r} updates. Give a whole number of 1 or more.")
        if not done:
            raise CommandError(f"{name} is at update 0: there is no update to undo.")
        if updates > done:
            raise CommandError(
                f"{name} is at update {done} and cannot go back by {updates}. `%finetune rewind {done}`, or "
                "run.rewind(to=0), goes back to the start."
            )
        return done - updates

    def saved_state(self, target: int) -> Checkpoint:
        """The state of update `target`. Raises CommandError if it is not an earlier update or was not kept."""
        if not 0 <= target < self._run.step_count:
            raise CommandError(f"{self._run.name} is at update {self._run.step_count} and cannot go back to {target}.")
        return self._checkpoints.find(target)

    def rewind_to(self, target: int) -> Rewound:
        """Restore update `target` and write a checkpoint of it. Raises CommandError or CheckpointError."""
        run, checkpoint = self._run, self.saved_state(target)
        rewound = Rewound(target, run.step_count, checkpoint.state["standing"])
        run.trainer.restore(checkpoint)
        self._checkpoints.forget_after(target)
        self._record(rewound)
        self.find_best()
        with suppress(OSError, FolderError):  # tried again, and reported, when training continues
            run.trainer.restore_best()
        try:
            run.checkpoint("rewind")
        except CheckpointError as error:
            raise type(error)(f"{run.name} is at update {target} again, but {error}") from None
        return rewound

    def find_best(self) -> None:
        """Give the trainer the parameters of its best update, if it was restored without them."""
        saves = self._run.trainer.saves
        if saves.best is None:
            saves.best = self._checkpoints.find_best()
