"""The queue of tasks due at a step boundary. Tasks are pairs of strings, so that a checkpoint can store them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlx_nb.config.run_config import RunConfig
from mlx_nb.events import ITERS_REACHED

Due = tuple[str, str]  # (task, argument)
BEGIN, VALIDATE, VALIDATE_NOW, TEST = ("start", ""), ("validate", ""), ("validate", "asked"), ("test", "")
SAVE_LAST, SAVE_BEST, SAVE_STEP = ("save", "last"), ("save", "best"), ("save", "step")
_OVER = ("finish", ITERS_REACHED)


@dataclass(frozen=True)
class Measures:
    """What a run measures on its own: validation rows, test rows at the end, and sample prompts."""

    validates: bool
    tests: bool
    prompts: tuple[str, ...]

    @property
    def samples(self) -> list[Due]:
        """The tasks for an answer to each sample prompt."""
        return [("sample", prompt) for prompt in self.prompts]

    @property
    def at_the_start(self) -> list[Due]:
        """The tasks before the first update."""
        return [*([VALIDATE] if self.validates else []), *self.samples]

    def at_the_end(self, reason: str) -> list[Due]:
        """The tasks at the end of the run, which ends for `reason`."""
        return [SAVE_LAST, *([TEST] if self.tests else []), ("finish", reason)]


class Schedule:
    """The task queue of one run. A task is removed only when it is done, so an aborted task is not lost."""

    def __init__(self) -> None:
        self._due: deque[Due] = deque()

    def __bool__(self) -> bool:
        return bool(self._due)

    @property
    def first(self) -> Due:
        """The next task."""
        return self._due[0]

    def done(self, follow_up: Sequence[Due]) -> None:
        """Remove the first task, which is done, and put its follow-up tasks at the front."""
        self._due.popleft()
        self._due.extendleft(reversed(follow_up))

    def add(self, *due: Due) -> None:
        """Append tasks."""
        self._due.extend(due)

    def only(self, due: Iterable[Due]) -> None:
        """Replace the whole queue."""
        self._due = deque(due)

    @property
    def cancellable(self) -> bool:
        """Whether the queue has tasks that can be cancelled: sample answers, or a requested validation."""
        return any(_is_cancellable(item) for item in self._due)

    @property
    def first_is_cancellable(self) -> bool:
        """Whether the next or current task can be cancelled."""
        return bool(self._due) and _is_cancellable(self._due[0])

    def cancel(self) -> None:
        """Remove the tasks that can be cancelled."""
        self.only([item for item in self._due if not _is_cancellable(item)])

    def as_lists(self) -> list[list[str]]:
        """The queue in the form that a checkpoint stores."""
        return [list(item) for item in self._due]

    def after_update(self, step: int, iters: int, config: RunConfig, measures: Measures) -> None:
        """Queue the tasks that are due after an update that is not the last. `iters` is the length of the whole run."""
        every = config.steps_per_eval or max(1, iters // 5)
        if measures.validates and step % every == 0:
            self.add(VALIDATE)
        sampling = config.sample_every or every
        if sampling > 0 and step % sampling == 0:
            self.add(*measures.samples)
        if config.save_every > 0 and step % config.save_every == 0:
            self.add(SAVE_STEP)

    def after_the_last(self, validated: bool, measures: Measures) -> None:
        """Queue the tasks that are due after the last update. `validated`: this update has been validated already."""
        if not validated and VALIDATE not in self._due:
            self.add(*measures.at_the_start)
        self.add(*measures.at_the_end(ITERS_REACHED))

    @property
    def ends(self) -> bool:
        """Whether the end of the run is queued."""
        return any(what == "finish" for what, _ in self._due)

    def reopen(self) -> None:
        """Remove the end of the run from the queue, because the run has become longer."""
        if _OVER in self._due:
            self.only([item for item in self._due if item not in (_OVER, TEST)])


def _is_cancellable(item: Due) -> bool:
    return item[0] == "sample" or item == VALIDATE_NOW
