"""Decides which batches are packed: computed with all their sequences in one row."""

from __future__ import annotations

from typing import Literal

from mlx_nb.data.examples.batches import TokenBatch
from mlx_nb.data.examples.packing import pack_lines, scored_lines
from mlx_nb.model.backend import is_cpu
from mlx_nb.model.logprobs import TargetScorer

Packing = Literal["auto", True, False]

# The share of positions that packing must save to be worth its overhead.
_WORTH = 0.05


def packed_as_set(batch: TokenBatch, packing: Packing, scorer: TargetScorer) -> TokenBatch:
    """The batch, marked as packed if the setting says so and the model supports it.

    `auto` decides from the batch alone, so that a resumed run computes the same numbers. On a GPU, where each shape is
    compiled, it packs nothing.
    """
    return batch._replace(packed=scorer.can_pack) if pays(batch, packing) else batch


def pays(batch: TokenBatch, packing: Packing) -> bool:
    """Whether packing the batch pays off, or is required by the setting."""
    if packing != "auto" or not is_cpu():
        return packing is True
    lines = scored_lines(batch)
    padded = len(lines) * max(map(len, lines))
    return len(pack_lines(lines).tokens_N) <= (1 - _WORTH) * padded
