"""Applies a function to the logits of targets in chunks, so that memory is (chunk x vocabulary) for any batch.

mlx might compute chunks in parallel, so each chunk is made to depend on the one before it. The gradient of a chunk
needs its logits, which are not kept. With a frozen head it is computed together with the values; otherwise the logits
are computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_nb.model.custom_functions import custom_function
from mlx_nb.model.once_per_model import once_per_model, trained_shapes
from mlx_nb.model.randomness import random_stream
from mlx_nb.model.text_model import Place, TextModel
from mlx_nb.model.trees import trained_arrays_of

_CHUNK_BYTES = 64 * 1024**2  # size of the float32 logits of a chunk
_FEWEST = 64  # targets per chunk; with fewer, reading the head's weights dominates

# (logits (C, V), target (C,), other values of targets (C,) ...) -> arrays (C,), each number from its own target alone
TargetFunction = Callable[..., tuple[mx.array, ...]]


def targets_at_once(vocabulary: int) -> int:
    """The number of targets in a chunk."""
    return max(_FEWEST, _CHUNK_BYTES // (4 * vocabulary))


def head_arrays(text: TextModel, width: int) -> list[str]:
    """The names of trained arrays that the head uses, found by the gradient of its logits.

    `width` is the hidden size of the head's input.
    """
    trained = trained_shapes(text.model)
    return list(_reached_by_the_head(text.model, text.place, width, trained)) if trained else []


@once_per_model(good=lambda _names: True, from_json=tuple)
def _reached_by_the_head(model: nn.Module, place: Place, width: int, _forms: tuple[Any, ...]) -> tuple[str, ...]:
    text, (names, arrays) = TextModel(model, place), _trained(model)
    with random_stream(0):
        hidden = mx.random.normal((1, 2, width))
        # A factor of zeros would hide the gradient of the other factor.
        perturbed = [array + (0.02 * mx.random.normal(array.shape)).astype(array.dtype) for array in arrays]

        def reached(arrays: list[mx.array]) -> mx.array:
            with with_arrays(model, names, arrays):
                return mx.square(text.logits(hidden).astype(mx.float32)).sum()

        gradients = mx.grad(reached)(perturbed)
        return tuple(name for name, slope in zip(names, gradients) if mx.any(slope != 0).item())


def _trained(model: nn.Module) -> tuple[list[str], list[mx.array]]:
    named = trained_arrays_of(model)
    return [name for name, _ in named], [array for _, array in named]


def over_chunks(
    text: TextModel,
    function: TargetFunction,
    hidden: mx.array,
    values: Sequence[mx.array],
    own: Sequence[str],
    *,
    size: int,
    at_once: bool,
) -> tuple[mx.array, ...]:
    """Apply `function` to all targets in chunks. The first result passes gradients to `hidden` and to `own`.

    `hidden` is (1, S, D), `own` names the trained arrays of the head, and `values` (S,) are the targets and the other
    arguments of the function. `at_once` computes the gradient of `hidden` together with the values.
    """
    positions = hidden.shape[1]
    chunks = [slice(start, min(start + size, positions)) for start in range(0, positions, size)]
    stream = mx.default_stream(mx.default_device())
    at_once = at_once and not own

    def chunk(chosen: slice) -> Callable[..., tuple[mx.array, ...]]:
        def of(hidden: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
            with with_arrays(text.model, own, arrays):
                first, *others = function(text.logits(hidden), *(value[chosen] for value in values))
            return first, *(mx.stop_gradient(other) for other in others)

        return of

    @custom_function
    def all_targets(hidden: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
        found: list[list[mx.array]] = []
        for chosen in chunks:
            part = hidden[:, chosen]
            if found:
                part = mx.depends(part, found[-1])
            if not at_once:
                found.append(list(chunk(chosen)(part, *arrays)))
                continue
            results, slopes = _with_slopes(chunk(chosen), [part])
            found.append([*results, slopes[0]])
        return tuple(mx.concatenate(list(parts), axis=-2 if parts[0].ndim == 3 else -1) for parts in zip(*found))

    @all_targets.vjp
    def _gradient(primals: Any, cotangents: Any, results: Any) -> Any:
        hidden, *arrays = primals if isinstance(primals, (tuple, list)) else [primals]
        with mx.stream(stream):
            if at_once:
                return (results[-1] * cotangents[0][None, :, None].astype(hidden.dtype),)
            slopes_of_parts: list[mx.array] = []
            totals = [mx.zeros_like(array) for array in arrays]
            for chosen in chunks:
                part = hidden[:, chosen]
                if slopes_of_parts:
                    part = mx.depends(part, [slopes_of_parts[-1], *totals])
                _, slopes = _with_slopes(chunk(chosen), [part, *arrays], cotangents[0][chosen])
                slopes_of_parts.append(slopes[0])
                totals = [total + slope for total, slope in zip(totals, slopes[1:])]
            return (mx.concatenate(slopes_of_parts, axis=1), *totals)

    there = dict(zip(*_trained(text.model)))
    found: Any = all_targets(hidden, *(there[name] for name in own))
    return tuple(found[:-1] if at_once else found)


def _with_slopes(
    function: Callable[..., tuple[mx.array, ...]], arrays: list[mx.array], cotangent: mx.array | None = None
) -> tuple[list[mx.array], list[mx.array]]:
    """The values, and the gradient of the first value times `cotangent` (default 1) for each array."""
    rest: list[mx.array] = []

    def first(*arrays: mx.array) -> mx.array:
        value, *others = function(*arrays)
        rest[:] = others
        return value

    ones = mx.ones(arrays[0].shape[1], mx.float32) if cotangent is None else cotangent
    values, slopes = mx.vjp(first, arrays, [ones])
    return [*values, *rest], slopes


@contextmanager
def with_arrays(model: nn.Module, names: Sequence[str], arrays: Sequence[mx.array]) -> Iterator[None]:
    """A context in which the named arrays of the model are replaced by `arrays`."""
    there = dict(zip(*_trained(model))) if names else {}
    try:
        model.update(tree_unflatten(list(zip(names, arrays))))
        yield
    finally:
        model.update(tree_unflatten([(name, there[name]) for name in names]))
