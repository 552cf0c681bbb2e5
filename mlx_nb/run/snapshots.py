"""Snapshots of recent steps, kept in memory for rewinding, and spilled to an unnamed file when the run ends."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_nb.train.checkpoint import Checkpoint
    from mlx_nb.train.spilled_snapshots import SpilledSnapshots


class Snapshots:
    """Snapshots of step boundaries, oldest first. Arrays are shared with the run and each other, not copied."""

    def __init__(self) -> None:
        self._recent: deque[Checkpoint] = deque()
        self._spilled: list[SpilledSnapshots] = []
        self._holders: Counter[int] = Counter()  # array id -> the number of snapshots that hold it
        self._bytes = 0  # of all arrays, each counted once

    def __bool__(self) -> bool:
        return bool(self._recent)

    def add(self, snapshot: Checkpoint, most_bytes: float) -> None:
        """Add the newest snapshot, and drop the oldest ones beyond `most_bytes`."""
        if _best_step(snapshot) in {one.step for one in self._recent}:
            snapshot = _with_best(snapshot, None)
        self._recent.append(snapshot)
        self._count(snapshot, 1)
        while len(self._recent) > 1 and self.held_bytes > most_bytes:
            self._forget_oldest()

    @property
    def newest(self) -> Checkpoint | None:
        """The newest snapshot; None before the first. Safe to call from any thread."""
        recent = list(self._recent)
        return self._with_own_best(recent[-1]) if recent else None

    @property
    def newest_bytes(self) -> int:
        """The size of the newest snapshot; 0 before the first."""
        return sum(array.nbytes for array in _arrays(self._recent[-1])) if self._recent else 0

    @property
    def steps(self) -> set[int]:
        """The steps of all snapshots."""
        return {one.step for one in self._recent} | {step for spilled in self._spilled for step in spilled.steps}

    def find(self, step: int) -> Checkpoint | None:
        """The snapshot of a step; None if there is none."""
        recent = next((one for one in reversed(self._recent) if one.step == step), None) or self._find_spilled(step)
        return None if recent is None else self._with_own_best(recent)

    def _find_spilled(self, step: int) -> Checkpoint | None:
        try:
            return next(filter(None, (spilled.find(step) for spilled in reversed(self._spilled))), None)
        except OSError:
            return None

    @property
    def held_bytes(self) -> int:
        """The memory of all snapshots except the newest, whose arrays the run uses anyway. Shared arrays count once."""
        newest = {id(array): array.nbytes for array in _arrays(self._recent[-1])} if self._recent else {}
        result: int = self._bytes - sum(newest.values())
        return result

    def _forget_oldest(self) -> None:
        """Drop the oldest snapshot. The next one takes over its best adapter, so that the oldest always holds one."""
        oldest = self._recent.popleft()
        after = self._recent[0]
        best = oldest.arrays["parameters"] if _best_step(after) == oldest.step else oldest.arrays.get("best")
        if best is not None and "best" not in after.arrays and _best_step(after) in (oldest.step, _best_step(oldest)):
            self._count(after, -1)
            self._recent[0] = _with_best(after, best)
            self._count(self._recent[0], 1)
        self._count(oldest, -1)

    def _with_own_best(self, snapshot: Checkpoint) -> Checkpoint:
        """The snapshot with its best adapter, which another snapshot may hold for it."""
        return snapshot if "best" in snapshot.arrays else _with_best(snapshot, self._best_of(snapshot))

    def _best_of(self, snapshot: Checkpoint) -> dict[str, Any] | None:
        """The best adapter as of a snapshot; None if it is not in memory."""
        step = _best_step(snapshot)
        for one in list(self._recent):
            if one.step == step:
                return one.arrays["parameters"]
            if _best_step(one) == step and "best" in one.arrays:
                return one.arrays["best"]
        return None

    def _count(self, snapshot: Checkpoint, by: int) -> None:
        """Update the counts for a snapshot that was added (1) or removed (-1)."""
        for array in _arrays(snapshot):
            before = self._holders[id(array)]
            self._holders[id(array)] = after = before + by
            if not (before and after):
                self._bytes += by * array.nbytes
            if not after:
                del self._holders[id(array)]

    def release(self, folder: Path) -> None:
        """Free the memory of all snapshots but the newest by spilling them to disk.

        If the disk is full they are dropped, and only checkpoints are left for a rewind.
        """
        from mlx_nb.train.spilled_snapshots import SpilledSnapshots

        if len(self._recent) < 2:
            return
        try:
            self._spilled.append(SpilledSnapshots(folder, list(self._recent)[:-1]))
        except OSError:
            pass
        while len(self._recent) > 1:
            self._count(self._recent.popleft(), -1)

    def forget(self) -> None:
        """Drop all snapshots, in memory and spilled. Checkpoints stay."""
        self._recent.clear()
        self._spilled.clear()
        self._holders.clear()
        self._bytes = 0

    def forget_after(self, step: int) -> None:
        """Drop the snapshots of steps after `step`. Checkpoints stay."""
        while self._recent and self._recent[-1].step > step:
            self._count(self._recent.pop(), -1)
        for spilled in self._spilled:
            spilled.forget_after(step)


def _best_step(snapshot: Checkpoint) -> int | None:
    result: int | None = snapshot.state["trainer"]["best_step"]
    return result


def _with_best(snapshot: Checkpoint, best: dict[str, Any] | None) -> Checkpoint:
    """The snapshot with `best` as its best adapter; None removes it."""
    arrays = {name: group for name, group in snapshot.arrays.items() if name != "best"}
    return replace(snapshot, arrays=arrays if best is None else {**arrays, "best": best})


def _arrays(snapshot: Checkpoint) -> Iterator[Any]:
    for group in snapshot.arrays.values():
        yield from group.values()
