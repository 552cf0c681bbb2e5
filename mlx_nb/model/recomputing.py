"""Functions whose results are computed again for the gradient, so that only their inputs are kept for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten

from mlx_nb.config.run_config import RunConfig
from mlx_nb.model.custom_functions import custom_function
from mlx_nb.model.trees import named_arrays

# The context in which a module is computed, and recomputed.
Inside = Callable[[nn.Module], AbstractContextManager[object]]


class Recomputed(NamedTuple):
    """What is computed again for the gradient of an update.

    segment     layers that are computed again together, from the inputs of the first; 0 = none
    each_layer  within a segment, each layer is computed again by itself
    tokens      tokens of which MLPs and experts keep activations at a time; 0 = of all
    """

    segment: int = 0
    each_layer: bool = False
    tokens: int = 0


NOTHING = Recomputed()


def recomputed_by(config: RunConfig) -> Recomputed:
    """What the settings of a run ask for."""
    segment = config.segment_size or int(config.grad_checkpoint)
    each_layer = config.grad_checkpoint and segment > 1
    return Recomputed(segment, each_layer, config.seq_step_size if config.efficient_long_context else 0)


def computed_again(
    results: Sequence[mx.array],
    of: Callable[..., list[mx.array]],
    arrays: Sequence[mx.array],
    parameters: Collection[int],
) -> list[mx.array]:
    """`results`, with the gradient of `of(*arrays)`, which gives the same and is called when the gradient is needed.

    `parameters` are the places of trained parameters among the arrays. Whatever made the other arrays gets its gradient
    only after the gradients of the parameters are computed, so that one such function is computed again at a time.
    """
    stream = mx.default_stream(mx.default_device())

    @custom_function
    def known(*_arrays: mx.array) -> Any:
        return list(results)

    @known.vjp
    def _gradient(primals: Any, cotangents: Any, _results: Any) -> Any:
        primals, cotangents = listed(primals), listed(cotangents)
        with mx.stream(stream):
            _, slopes = mx.vjp(of, mx.depends(primals, cotangents), cotangents)
            own = [slopes[place] for place in sorted(parameters)]
            return [
                mx.depends(slope, own) if own and place not in parameters else slope
                for place, slope in enumerate(slopes)
            ]

    return listed(known(*arrays))


def listed(arrays: Any) -> list[mx.array]:
    """One array or several as a list."""
    return list(arrays) if isinstance(arrays, (list, tuple)) else [arrays]


def named_and_arrays(tree: Any) -> tuple[list[str], list[mx.array]]:
    """The names of the arrays in a tree, and the arrays."""
    named = named_arrays(tree)
    return [name for name, _ in named], [array for _, array in named]


class _Place:
    """Stands for a float array in a tree."""


_PLACE = _Place()


def without_floats(tree: Any) -> tuple[Any, list[mx.array]]:
    """A tree with places instead of its float arrays, and these."""
    found: list[mx.array] = []

    def taken(value: Any) -> Any:
        if not isinstance(value, mx.array) or not mx.issubdtype(value.dtype, mx.floating):
            return value
        found.append(value)
        return _PLACE

    return tree_map(taken, tree), found


def with_floats(tree: Any, arrays: Sequence[mx.array]) -> Any:
    """The tree of `without_floats` with these arrays in the places."""
    left = iter(arrays)
    return tree_map(lambda value: next(left) if value is _PLACE else value, tree)


@contextmanager
def in_place(module: nn.Module, names: list[str], arrays: Sequence[mx.array]) -> Iterator[None]:
    """A context in which the parameters of these names are `arrays`."""
    if not names:
        yield
        return
    now = dict(named_arrays(module.trainable_parameters()))
    try:
        module.update(tree_unflatten(list(zip(names, arrays))))
        yield
    finally:
        module.update(tree_unflatten([(name, now[name]) for name in names]))
