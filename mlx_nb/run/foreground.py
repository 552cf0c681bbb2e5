"""Trains a run in the foreground: `step` and `run`, which return or raise when training ends or pauses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import TRAINING_ERRORS, CommandError, TrainingError
from mlx_nb.events import Event, Request, RunFailed, RunFinished, RunPaused, RunState, StepCompleted
from mlx_nb.process.ipython import in_ipython

if TYPE_CHECKING:
    from mlx_nb.train.interrupts import Interrupts
    from mlx_nb.train.trainer import Trainer

CONTINUE_HINT = "`%finetune run 20` or `run.set(iters=...)` continues it."


class ForegroundRun(Protocol):
    """The interface of a run that training in the foreground needs."""

    name: str
    config: RunConfig

    @property
    def trainer(self) -> Trainer:
        """Its trainer."""

    @property
    def prepared(self) -> bool:
        """Whether the trainer has been made."""

    @property
    def state(self) -> RunState:
        """Its state."""

    @property
    def step_count(self) -> int:
        """Updates done."""

    @property
    def finished(self) -> bool:
        """Whether it has ended."""

    @property
    def over(self) -> bool:
        """Whether it has ended and no update is left."""

    def events(self, updates: int | None = None) -> Iterator[Event]:
        """Train, yielding events."""

    def interrupts(self, say: Callable[[str], None] | None = None) -> Interrupts:
        """A context in which SIGINT requests a pause."""

    def request(self, request: Request) -> None:
        """Queue a request."""

    def set(self, /, **changes: Any) -> None:
        """Change live settings."""


def step(run: ForegroundRun, updates: int) -> StepCompleted:
    """Do `updates` updates, or as many as are left. `Run.step` documents the rest."""
    if not isinstance(updates, int) or updates < 1:
        raise CommandError(f"cannot do {updates!r} updates. Give a whole number of 1 or more.")
    if run.over:
        raise CommandError(f"{run.name} is finished: all {run.trainer.iters} updates are done. {CONTINUE_HINT}")
    last = failed = paused = None
    with run.interrupts() as interrupts:
        for event in run.events(updates):
            failed = event if isinstance(event, RunFailed) else failed
            paused = event if isinstance(event, RunPaused) else paused
            last = event if isinstance(event, StepCompleted) else last
    _raise_interrupt(run, interrupts)
    raise_failure(failed)
    if last is None and run.finished:
        raise CommandError(f"{run.name} is finished: no update is left after {run.step_count}.")
    if last is None:
        reason = "" if paused is None else f": {paused.reason}"
        raise CommandError(f"{run.name} paused before its next update{reason}")
    return last


def train_until(run: ForegroundRun, until: int | None) -> RunFinished | RunPaused:
    """Train to update `until`, or to the end (None). `Run.run` documents the rest."""
    if until is not None:
        lengthen(run, until)
    if run.prepared and run.trainer.finished is not None and run.trainer.is_complete:
        return run.trainer.finished
    updates = None if until is None else max(0, until - run.step_count)
    ended: RunFinished | RunPaused | None = None
    failed: RunFailed | None = None
    with run.interrupts() as interrupts:
        for event in run.events(updates):
            failed = event if isinstance(event, RunFailed) else failed
            if isinstance(event, (RunFinished, RunPaused)):
                ended = event
    _raise_interrupt(run, interrupts)
    raise_failure(failed)  # only now, because the checkpoint of a failure is written after its event
    return ended or run.trainer.finished or RunPaused(run.step_count, f"reached update {until}")


def lengthen(run: ForegroundRun, until: int) -> None:
    """Raise the length of the run to `until` updates if it is shorter. Raises CommandError for an invalid number.

    With `epochs` the length in updates is known only once the rows are loaded.
    """
    if isinstance(until, bool) or not isinstance(until, int) or until < 0:
        raise CommandError(f"cannot train to update {until!r}. Give a whole number of 0 or more.")
    length = run.trainer.iters if run.prepared else run.config.iters
    if length is not None and until > length:
        run.set(iters=until)


def pausing_on_interrupt(run: ForegroundRun, say: Callable[[str], None] | None) -> Interrupts:
    """A context in which SIGINT requests a pause of the run. `say` (default: print to stderr) gets the message."""
    from mlx_nb.train.interrupts import Interrupts

    say = say or partial(print, file=sys.stderr)

    def announce() -> None:
        if run.prepared:
            say("Pausing after this update. Interrupt again to drop the current update.")
        else:
            say("Pausing while it loads; rows already tokenized are kept. Interrupt again to stop reading rows.")

    return Interrupts(run.request, announce)


def _raise_interrupt(run: ForegroundRun, interrupts: Interrupts) -> None:
    """Raise KeyboardInterrupt in a script, where an interrupt is meant for the script and not just for the run."""
    if interrupts.count and not in_ipython():
        raise KeyboardInterrupt(f"{run.name} is {run.state} after update {run.step_count}, and saved.")


def raise_failure(event: Event | None) -> None:
    """Raise the TrainingError of a RunFailed event; ignore every other event."""
    if isinstance(event, RunFailed):
        raise TRAINING_ERRORS.get(event.reason, TrainingError)(event.error, event.rows, event.largest_gradients)
