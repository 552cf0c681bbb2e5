"""Which batches are computed with their lines in one row."""

from __future__ import annotations

from typing import Literal

from mlx_nb.data.examples.batches import TokenBatch
from mlx_nb.data.examples.packing import pack_lines, scored_lines
from mlx_nb.model.backend import is_cpu
from mlx_nb.model.logprobs import TargetScorer

Packing = Literal["auto", True, False]

# The share of positions that has to be saved, so that it is more than laying lines out costs.
_WORTH = 0.05


def packed_as_set(batch: TokenBatch, packing: Packing, scorer: TargetScorer) -> TokenBatch:
    """The batch with its lines in one row, where the setting says so and the model allows it.

    `auto` is a function of the batch alone, so that a resumed run computes what it would have computed. On a GPU, where
    each shape is compiled, it packs nothing.
    """
    return batch._replace(packed=scorer.can_pack) if pays(batch, packing) else batch


def pays(batch: TokenBatch, packing: Packing) -> bool:
    """Whether the batch is to be packed where the model allows it."""
    if packing != "auto" or not is_cpu():
        return packing is True
    lines = scored_lines(batch)
    padded = len(lines) * max(map(len, lines))
    return len(pack_lines(lines).tokens_N) <= (1 - _WORTH) * padded
