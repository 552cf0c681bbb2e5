"""Whether a model computed in another way gives its own loss and gradient, tried on a few random tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_nb.model.passes import is_half, random_tokens
from mlx_nb.model.trees import trained_arrays_of

# Loss in nats, gradients as parts of the largest: rounding comes to a tenth of it.
_LOSS_TOLERANCE, _GRADIENT_TOLERANCE = 1e-5, 1e-4
_HALF = 200  # times as much in half precision
_ROWS = 2


def gives_the_same(model: nn.Module, way: Callable[[], AbstractContextManager[object]], tokens: int) -> bool:
    """Whether loss and gradient of rows of so many `tokens` are the model's own where their graph is built inside
    `way()`.

    Raises what the model's code raises. The trained arrays are as before afterwards.
    """
    tokens_BT = mx.array([random_tokens(model, tokens, draw) for draw in range(_ROWS)])

    def loss(way: Callable[[], AbstractContextManager[object]]) -> mx.array:
        with way():
            logits = model(tokens_BT[:, :-1]).astype(mx.float32)
        return nn.losses.cross_entropy(logits, tokens_BT[:, 1:]).mean()

    return agree(model, lambda: loss(nullcontext), lambda: loss(way))


def agree(model: nn.Module, own: Callable[[], mx.array], other: Callable[[], mx.array], rounding: float = 1) -> bool:
    """Whether two ways to compute one loss, mean or sum of nats, give the same number and the same gradient.

    `rounding` is how many times the usual they may differ by. Raises what the model's code raises. The trained arrays
    are as before afterwards.
    """
    before = trained_arrays_of(model)
    # An adapter begins with a factor of zeros, which hides the gradient of the other.
    moved = {
        name: array if mx.any(array).item() else array + mx.full(array.shape, 0.01, array.dtype)
        for name, array in before
    }
    names = list(moved)

    def found(way: Callable[[], mx.array]) -> tuple[mx.array, list[mx.array]]:
        def loss(*arrays: mx.array) -> mx.array:
            model.load_weights(list(zip(names, arrays)), strict=False)
            return way()

        if not names:
            return loss(), []
        value, gradients = mx.value_and_grad(loss, argnums=tuple(range(len(names))))(*moved.values())
        gradients = list(gradients) if isinstance(gradients, (list, tuple)) else [gradients]
        mx.eval(value, gradients)
        return value, gradients

    try:
        value, gradients = found(own)
        other_value, others = found(other)
        rounding *= _HALF if is_half(model) else 1
        if not _largest(value - other_value) <= rounding * _LOSS_TOLERANCE * max(1.0, _largest(value)):
            return False
        most = rounding * _GRADIENT_TOLERANCE * max(map(_largest, gradients), default=0.0)
        return all(_largest(one - two) <= most for one, two in zip(gradients, others))
    finally:
        model.load_weights(before, strict=False)


def _largest(array: mx.array) -> float:
    return float(np.abs(np.array(array.astype(mx.float32))).max())
