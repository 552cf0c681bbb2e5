"""The last steps of a run, kept in memory to rewind to; once the run has ended, in a file without a name."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_nb.train.checkpoint import Checkpoint
    from mlx_nb.train.parking import Parking


class Snapshots:
    """Snapshots of step boundaries, oldest first. Arrays are shared, not copied: those of the newest are the run's."""

    def __init__(self) -> None:
        self._recent: deque[Checkpoint] = deque()
        self._parked: list[Parking] = []
        self._holders: Counter[int] = Counter()  # how many of these each array is in, by its id
        self._bytes = 0  # of all of them, each once

    def __bool__(self) -> bool:
        return bool(self._recent)

    def add(self, snapshot: Checkpoint, most_bytes: float) -> None:
        """Keep the newest snapshot, and of those before it as many as `most_bytes` hold."""
        if _best_step(snapshot) in {one.step for one in self._recent}:
            snapshot = _with_best(snapshot, None)
        self._recent.append(snapshot)
        self._count(snapshot, 1)
        while len(self._recent) > 1 and self.held_bytes > most_bytes:
            self._forget_oldest()

    @property
    def newest(self) -> Checkpoint | None:
        """The last boundary; None before there is one. Safe from any thread."""
        recent = list(self._recent)
        return self._with_own_best(recent[-1]) if recent else None

    @property
    def newest_bytes(self) -> int:
        """What the arrays of the newest take; 0 without one."""
        return sum(array.nbytes for array in _arrays(self._recent[-1])) if self._recent else 0

    @property
    def steps(self) -> set[int]:
        """The updates that can be gone back to."""
        return {one.step for one in self._recent} | {step for parking in self._parked for step in parking.steps}

    def find(self, step: int) -> Checkpoint | None:
        """The snapshot of a step; None when it is not here."""
        recent = next((one for one in reversed(self._recent) if one.step == step), None) or self._find_parked(step)
        return None if recent is None else self._with_own_best(recent)

    def _find_parked(self, step: int) -> Checkpoint | None:
        try:
            return next(filter(None, (parking.find(step) for parking in reversed(self._parked))), None)
        except OSError:
            return None

    @property
    def held_bytes(self) -> int:
        """What the snapshots take besides the newest, which is the run as it stands; a shared array counts once."""
        newest = {id(array): array.nbytes for array in _arrays(self._recent[-1])} if self._recent else {}
        result: int = self._bytes - sum(newest.values())
        return result

    def _forget_oldest(self) -> None:
        """The one after it takes over the best adapter that both know of, so that the oldest always has its own."""
        oldest = self._recent.popleft()
        after = self._recent[0]
        best = oldest.arrays["parameters"] if _best_step(after) == oldest.step else oldest.arrays.get("best")
        if best is not None and "best" not in after.arrays and _best_step(after) in (oldest.step, _best_step(oldest)):
            self._count(after, -1)
            self._recent[0] = _with_best(after, best)
            self._count(self._recent[0], 1)
        self._count(oldest, -1)

    def _with_own_best(self, snapshot: Checkpoint) -> Checkpoint:
        """A snapshot with the best adapter it knows of, which another one may hold for it."""
        return snapshot if "best" in snapshot.arrays else _with_best(snapshot, self._best_of(snapshot))

    def _best_of(self, snapshot: Checkpoint) -> dict[str, Any] | None:
        """The best adapter of a snapshot in memory; None where that is not in memory."""
        step = _best_step(snapshot)
        for one in list(self._recent):
            if one.step == step:
                return one.arrays["parameters"]
            if _best_step(one) == step and "best" in one.arrays:
                return one.arrays["best"]
        return None

    def _count(self, snapshot: Checkpoint, by: int) -> None:
        """Take note of a snapshot that came (1) or went (-1)."""
        for array in _arrays(snapshot):
            before = self._holders[id(array)]
            self._holders[id(array)] = after = before + by
            if not (before and after):
                self._bytes += by * array.nbytes
            if not after:
                del self._holders[id(array)]

    def release(self, folder: Path) -> None:
        """Give back the memory of all steps but the last, which is the run as it stands; they go to disk.

        Where the disk has no room for them they are forgotten, and checkpoints alone are left to rewind to.
        """
        from mlx_nb.train.parking import Parking

        if len(self._recent) < 2:
            return
        try:
            self._parked.append(Parking(folder, list(self._recent)[:-1]))
        except OSError:
            pass
        while len(self._recent) > 1:
            self._count(self._recent.popleft(), -1)

    def forget(self) -> None:
        """Drop what is kept in memory and on disk to rewind to, but for checkpoints."""
        self._recent.clear()
        self._parked.clear()
        self._holders.clear()
        self._bytes = 0

    def forget_after(self, step: int) -> None:
        """Drop what is kept of the steps after `step`, but for checkpoints."""
        while self._recent and self._recent[-1].step > step:
            self._count(self._recent.pop(), -1)
        for parking in self._parked:
            parking.forget_after(step)


def _best_step(snapshot: Checkpoint) -> int | None:
    result: int | None = snapshot.state["trainer"]["best_step"]
    return result


def _with_best(snapshot: Checkpoint, best: dict[str, Any] | None) -> Checkpoint:
    """The snapshot with this adapter as that of its best update, or without one."""
    arrays = {name: group for name, group in snapshot.arrays.items() if name != "best"}
    return replace(snapshot, arrays=arrays if best is None else {**arrays, "best": best})


def _arrays(snapshot: Checkpoint) -> Iterator[Any]:
    for group in snapshot.arrays.values():
        yield from group.values()
