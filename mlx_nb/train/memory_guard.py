"""Refuses an update that would exceed the memory limit, before it is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import TokenBatch
from mlx_nb.errors import OutOfMemory
from mlx_nb.model.backend import is_cpu, memory_limit
from mlx_nb.model.memory import available_memory, gigabytes
from mlx_nb.train.memory_plan import MemoryPlanner, budget_of, rough_peak
from mlx_nb.train.update_memory import BatchShape


def memory_in_reach() -> int:
    """Bytes that mlx has or could have in this process."""
    return memory_limit() if not is_cpu() else available_memory() + mx.get_active_memory()


class MemoryGuard:
    """Compares each batch that is larger than those before with the limit. `description` is the model's config.json."""

    def __init__(self, description: Mapping[str, Any] | None) -> None:
        self._description = description
        self._planner: MemoryPlanner | None = None
        self._fitting: list[tuple[BatchShape, int]] = []  # shapes and their peaks

    def refuse(self, batches: Sequence[TokenBatch], config: RunConfig) -> None:
        """Raise OutOfMemory for the first batch whose update would exceed `memory_limit`."""
        if self._description is None or (budget := budget_of(config.memory_limit, memory_in_reach)) is None:
            return
        for batch in batches:
            shape = _shape_of(batch)
            rough = rough_peak(self._description, config, shape)
            if rough is not None and rough <= budget:
                continue
            peak = self._peak(shape, config)
            if peak is not None and peak > budget:
                raise _refusal(batch, peak, budget)

    def _peak(self, shape: BatchShape, config: RunConfig) -> int | None:
        """The planned peak, or that of a larger batch; None if the model cannot be planned."""
        larger = [peak for known, peak in self._fitting if _is_within(shape, known)]
        if larger:
            return min(larger)
        assert self._description is not None
        try:
            if self._planner is None:
                self._planner = MemoryPlanner(self._description, config)
            peak = sum(self._planner.peak(shape).values())
        except Exception:  # model code may raise anything; then other checks of memory remain
            self._description = None
            return None
        self._fitting.append((shape, peak))
        return peak


def _shape_of(batch: TokenBatch) -> BatchShape:
    sequences, tokens = batch.tokens_BT.shape
    first = np.argmax(batch.loss_mask_BT != 0, axis=1)
    return BatchShape(sequences, tokens, max(1, int((tokens - first).max())))


def _is_within(shape: BatchShape, other: BatchShape) -> bool:
    return shape.sequences <= other.sequences and shape.tokens <= other.tokens and shape.trained <= other.trained


def _refusal(batch: TokenBatch, peak: int, budget: int) -> OutOfMemory:
    longest = max(range(len(batch.lengths)), key=lambda line: batch.lengths[line])
    row = batch.rows[min(longest, len(batch.rows) - 1)]
    return OutOfMemory(
        f"this update would need {gigabytes(peak)}, and {gigabytes(budget)} may be used (memory_limit). Its longest "
        f"row is row {row}, of {batch.lengths[longest]:,} tokens. Nothing was computed. "
        "`%finetune set memory_limit=...` changes the limit.",
        tuple(dict.fromkeys(batch.rows)),
    )
