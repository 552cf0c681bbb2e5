"""Parts of a batch computed at the same time on a CPU.

mlx computes what is on one stream one operation after another, and on a CPU each but a matrix product takes one core.
A lane is a part of the batch on a stream of its own, with its matrix products on one thread: other cores stay busy,
and no number is computed otherwise than it is for a smaller batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_nb.data.examples.batches import TokenBatch, split_rows
from mlx_nb.model import backend
from mlx_nb.model.trees import named_arrays

# A graph takes as long to build for few tokens as for many: with fewer in a part, parts take longer than the whole.
_TOKENS_IN_A_LANE = 64

Part = TypeVar("Part")
Result = TypeVar("Result")

# Streams belong to the thread that made them, and are never given back: they are made once.
_mine = threading.local()


def lane_count() -> int:
    """How many parts of a batch are computed at the same time: as many as BLAS has threads on a CPU, 1 on a GPU."""
    return backend.prepare_backend().threads if backend.is_cpu() else 1


def lanes_of(batch: TokenBatch, most: int) -> list[TokenBatch]:
    """The batch in at most `most` parts of whole rows, of 64 tokens or more on average, padding counted."""
    return split_rows(batch, max(1, min(most, batch.tokens_BT.size // _TOKENS_IN_A_LANE)))


def in_lanes(function: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """`function` of each part, as graphs on one stream each; evaluate them under `backend.one_blas_thread`."""
    count = min(len(parts), lane_count())
    if count == 1:
        return [function(part) for part in parts]
    streams = _streams(count)
    results = []
    for index, part in enumerate(parts):
        with mx.stream(streams[index % len(streams)]):
            results.append(function(part))
    return results


def one_by_one(tree: Any) -> Any:
    """The same arrays, each to be computed after the one before it.

    What is asked for at once is begun at once: hundreds of gradients would fill the room in which mlx finds work of
    other lanes.
    """
    chained: list[tuple[str, Any]] = []
    for name, array in named_arrays(tree):
        chained.append((name, mx.depends(array, chained[-1][1]) if chained else array))
    return tree_unflatten(chained)


def _streams(count: int) -> list[mx.Stream]:
    streams: list[mx.Stream] = _mine.__dict__.setdefault("streams", [])
    if not streams:
        mx.eval(mx.array(0.0) + 1)
        backend.clear_order_variable()
    while len(streams) < count:
        streams.append(mx.new_stream(mx.cpu) if streams else mx.default_stream(mx.cpu))
    return streams[:count]
