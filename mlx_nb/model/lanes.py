"""Computes parts of a batch in parallel on a CPU.

mlx executes the operations of a stream one at a time, and on a CPU every operation but a matrix product uses one core.
A lane is a part of the batch on its own stream, with single-threaded matrix products. This keeps all cores busy, and
the numbers are the same as for a smaller batch.
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

# Building a graph takes the same time for any number of tokens, so smaller parts would be slower than the whole.
_TOKENS_IN_A_LANE = 64

Part = TypeVar("Part")
Result = TypeVar("Result")

# Streams belong to the thread that created them and are never freed, so they are created once per thread.
_mine = threading.local()


def lane_count() -> int:
    """The number of lanes: the number of BLAS threads on a CPU, 1 on a GPU."""
    return backend.prepare_backend().threads if backend.is_cpu() else 1


def lanes_of(batch: TokenBatch, most: int) -> list[TokenBatch]:
    """The batch in at most `most` parts of whole rows, with at least 64 tokens each on average, including padding."""
    return split_rows(batch, max(1, min(most, batch.tokens_BT.size // _TOKENS_IN_A_LANE)))


def in_lanes(function: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """Build the graph of `function(part)` for each part on its own stream. Evaluate under `one_blas_thread`."""
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
    """The same arrays, made to be computed one after the other.

    Otherwise mlx schedules all of them at once: hundreds of gradients would fill its queue and leave no room for the
    work of other lanes.
    """
    chained: list[tuple[str, Any]] = []
    for name, array in named_arrays(tree):
        chained.append((name, mx.depends(array, chained[-1][1]) if chained else array))
    return tree_unflatten(chained)


def _streams(count: int) -> list[mx.Stream]:
    streams: list[mx.Stream] = _mine.__dict__.setdefault("streams", [])
    if not streams:
        mx.eval(mx.array(0.0) + 1)
        backend.unset_scheduling_variable()
    while len(streams) < count:
        streams.append(mx.new_stream(mx.cpu) if streams else mx.default_stream(mx.cpu))
    return streams[:count]
