"""Snapshots spilled to disk: a run that has ended keeps them for rewinding without using memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_nb.train.checkpoint import Checkpoint


class _Place(NamedTuple):
    """The position of an array in the file."""

    offset: int
    size: int
    dtype: mx.Dtype
    shape: tuple[int, ...]


class SpilledSnapshots:
    """Snapshots in an unnamed file in `folder`, which the system removes however the process ends.

    An array that several snapshots share is written once. Raises OSError if the disk is full or read-only.
    """

    def __init__(self, folder: Path, snapshots: Iterable[Checkpoint]) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._spilled: list[tuple[Checkpoint, dict[str, dict[str, _Place]]]] = []
        written: dict[int, _Place] = {}
        try:
            for snapshot in snapshots:
                places = {
                    group: {name: self._write(array, written) for name, array in arrays.items()}
                    for group, arrays in snapshot.arrays.items()
                }
                self._spilled.append((Checkpoint(snapshot.step, {}, snapshot.state), places))
            self._file.flush()
        except BaseException:
            self._file.close()
            raise

    def _write(self, array: mx.array, written: dict[int, _Place]) -> _Place:
        if id(array) not in written:
            content = np.array(mx.view(array.reshape(-1), mx.uint8)).tobytes() if array.size else b""
            written[id(array)] = _Place(self._file.tell(), len(content), array.dtype, array.shape)
            self._file.write(content)
        return written[id(array)]

    @property
    def steps(self) -> list[int]:
        """The steps of the snapshots."""
        return [snapshot.step for snapshot, _ in self._spilled]

    def find(self, step: int) -> Checkpoint | None:
        """Read the snapshot of a step; None if there is none. Raises OSError."""
        for snapshot, groups in reversed(self._spilled):
            if snapshot.step == step:
                arrays = {
                    group: {name: self._read(place) for name, place in places.items()}
                    for group, places in groups.items()
                }
                return Checkpoint(step, arrays, snapshot.state)
        return None

    def _read(self, place: _Place) -> Any:
        if not place.size:
            return mx.zeros(place.shape, place.dtype)
        self._file.seek(place.offset)
        content = np.frombuffer(self._file.read(place.size), np.uint8)
        return mx.view(mx.array(content), place.dtype).reshape(place.shape)

    def forget_after(self, step: int) -> None:
        """Drop the snapshots of later steps."""
        self._spilled = [(snapshot, places) for snapshot, places in self._spilled if snapshot.step <= step]
