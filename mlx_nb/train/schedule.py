"""What is due at a step boundary, in order. It is words, so that a checkpoint can keep it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlx_nb.config.run_config import RunConfig
from mlx_nb.events import ITERS_REACHED

Due = tuple[str, str]  # what, and how
BEGIN, VALIDATE, VALIDATE_NOW, TEST = ("start", ""), ("validate", ""), ("validate", "asked"), ("test", "")
SAVE_LAST, SAVE_BEST, SAVE_STEP = ("save", "last"), ("save", "best"), ("save", "step")
_OVER = ("finish", ITERS_REACHED)


@dataclass(frozen=True)
class Measures:
    """What a run measures by itself: whether validation rows, whether test rows at its end, and answers to prompts."""

    validates: bool
    tests: bool
    prompts: tuple[str, ...]

    @property
    def samples(self) -> list[Due]:
        """An answer to each prompt."""
        return [("sample", prompt) for prompt in self.prompts]

    @property
    def at_the_start(self) -> list[Due]:
        """Before the first update."""
        return [*([VALIDATE] if self.validates else []), *self.samples]

    def at_the_end(self, reason: str) -> list[Due]:
        """When the run ends, for whatever reason."""
        return [SAVE_LAST, *([TEST] if self.tests else []), ("finish", reason)]


class Schedule:
    """The queue of one run. What is first leaves it once it is done, so that nothing broken off is lost."""

    def __init__(self) -> None:
        self._due: deque[Due] = deque()

    def __bool__(self) -> bool:
        return bool(self._due)

    @property
    def first(self) -> Due:
        """What is to be done next."""
        return self._due[0]

    def done(self, follow_up: Sequence[Due]) -> None:
        """The first is done; what follows from it comes before all else."""
        self._due.popleft()
        self._due.extendleft(reversed(follow_up))

    def add(self, *due: Due) -> None:
        """Behind all else."""
        self._due.extend(due)

    def only(self, due: Iterable[Due]) -> None:
        """This in place of all else."""
        self._due = deque(due)

    @property
    def cancellable(self) -> bool:
        """Whether something is due that can be left out: answers, or a validation that was asked for."""
        return any(_can_be_left_out(item) for item in self._due)

    @property
    def first_is_cancellable(self) -> bool:
        """Whether what is to be done next, or being done, is such a thing."""
        return bool(self._due) and _can_be_left_out(self._due[0])

    def cancel(self) -> None:
        """Leave that out."""
        self.only([item for item in self._due if not _can_be_left_out(item)])

    def as_lists(self) -> list[list[str]]:
        """The queue as a checkpoint keeps it; `only` takes it back as tuples."""
        return [list(item) for item in self._due]

    def after_update(self, step: int, iters: int, config: RunConfig, measures: Measures) -> None:
        """Queue what is due after an update with others to come. `iters` are those of the whole run."""
        every = config.steps_per_eval or max(1, iters // 5)
        if measures.validates and step % every == 0:
            self.add(VALIDATE)
        sampling = config.sample_every or every
        if sampling > 0 and step % sampling == 0:
            self.add(*measures.samples)
        if config.save_every > 0 and step % config.save_every == 0:
            self.add(SAVE_STEP)

    def after_the_last(self, validated: bool, measures: Measures) -> None:
        """Queue what is due when all updates are done; not what was just `validated` a second time."""
        if not validated and VALIDATE not in self._due:
            self.add(*measures.at_the_start)
        self.add(*measures.at_the_end(ITERS_REACHED))

    @property
    def ends(self) -> bool:
        """Whether the end of the run is queued."""
        return any(what == "finish" for what, _ in self._due)

    def go_on(self) -> None:
        """Take back that all updates are done: the run has become longer."""
        if _OVER in self._due:
            self.only([item for item in self._due if item not in (_OVER, TEST)])


def _can_be_left_out(item: Due) -> bool:
    return item[0] == "sample" or item == VALIDATE_NOW
