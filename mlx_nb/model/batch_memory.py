"""Estimates the memory of a batch before it is computed. On a CPU a failed allocation would kill the kernel."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_nb.data.examples.batches import TokenBatch
from mlx_nb.data.examples.packing import pack_lines, scored_lines
from mlx_nb.errors import OutOfMemory
from mlx_nb.model.memory import available_memory, release_freed_memory, shortage
from mlx_nb.model.randomness import random_stream
from mlx_nb.model.text_model import TextModel
from mlx_nb.model.trees import named_arrays
from mlx_nb.model.vocabulary_chunks import targets_at_once

_WORTH_A_LOOK = 256 * 1024**2  # bytes; smaller batches are not checked


class ModelSizes(NamedTuple):
    """Vocabulary size, hidden size (0 if unknown), number of layers and bytes per number of a model."""

    vocabulary: int
    hidden: int
    layers: int
    itemsize: int

    @classmethod
    def of(cls, model: nn.Module, text: TextModel | None = None) -> ModelSizes:
        """The sizes of a model, from the shapes of a forward pass that is never evaluated."""
        token = mx.array([[1]])
        with random_stream(0):  # dropout must not use the run's random stream
            logits = model(token)
            hidden = text.hidden(token, mx.array([0])) if text is not None else []
        layers = len(getattr(model, "layers", ()))
        width = max((array.shape[-1] for _, array in named_arrays(hidden)), default=0)
        return cls(logits.shape[-1], width, layers, logits.dtype.size)


def least_bytes(batch: TokenBatch, sizes: ModelSizes, *, trained: bool, targets_only: bool) -> int:
    """A lower bound for the memory of computing `batch`.

    It counts float32 logits (twice for a gradient) at the positions that are projected at the same time, and the hidden
    states of one layer, or of all layers for a gradient.
    """
    columns = np.nonzero(batch.loss_mask_BT[:, 1:])[1]
    if batch.packed:
        positions = len(pack_lines(scored_lines(batch)).tokens_N)
    else:
        positions = batch.tokens_BT.shape[0] * (int(columns.max(initial=0)) + 1)
    projected = min(len(columns), targets_at_once(sizes.vocabulary)) if targets_only else positions
    logits = projected * sizes.vocabulary * 4
    hidden = positions * sizes.hidden * sizes.itemsize
    result: int = logits * 2 + hidden * sizes.layers if trained else logits + hidden
    return result


def refuse_beyond_memory(batch: TokenBatch, sizes: ModelSizes, *, trained: bool, targets_only: bool) -> None:
    """Raise OutOfMemory for a batch that cannot fit, naming what to lower."""
    needed = least_bytes(batch, sizes, trained=trained, targets_only=targets_only)
    if needed < _WORTH_A_LOOK or shortage(needed, available_memory()) is None:
        return
    release_freed_memory()  # freed arrays in the allocator's cache are available
    if (lacking := shortage(needed, available_memory())) is None:
        return
    rows, longest = len(batch.lengths), max(batch.lengths)
    raise OutOfMemory(
        f"a batch of {rows:,} rows, the longest of {longest:,} tokens, {lacking}. A lower batch_size with more "
        "grad_accumulation_steps, or a lower max_seq_length, needs less.",
        tuple(dict.fromkeys(batch.rows)),
    )
