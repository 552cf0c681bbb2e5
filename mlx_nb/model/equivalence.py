"""Tests whether another way to compute a model gives the same loss and gradient, on a few random tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_nb.model.passes import is_half, one_line, random_tokens
from mlx_nb.model.trees import trained_arrays_of

# Tolerances of the loss in nats and of gradients relative to the largest; rounding errors are a tenth of them.
_LOSS_TOLERANCE, _GRADIENT_TOLERANCE = 1e-5, 1e-4
_HALF = 200  # factor for half precision
_ROWS = 2


def gives_the_same(model: nn.Module, way: Callable[[], AbstractContextManager[object]], tokens: int) -> bool:
    """Whether a graph built inside `way()` gives the model's own loss and gradient, on rows of `tokens` tokens.

    Raises what the model's code raises. The trained arrays are restored.
    """
    tokens_BT = mx.array([random_tokens(model, tokens, draw) for draw in range(_ROWS)])

    def loss(way: Callable[[], AbstractContextManager[object]]) -> mx.array:
        with way():
            logits = model(tokens_BT[:, :-1]).astype(mx.float32)
        return nn.losses.cross_entropy(logits, tokens_BT[:, 1:]).mean()

    return agree(model, lambda: loss(nullcontext), lambda: loss(way))


def doubt_about(
    model: nn.Module, way: Callable[[Callable[[], None]], AbstractContextManager[object]], tokens: int, unused: str
) -> str | None:
    """Why a way to compute a model is not that of the model, in words; None if it is. Raises nothing.

    `way` takes a function that it calls whenever it computes something otherwise; without any call, `unused` is the
    reason.
    """
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    try:
        same = gives_the_same(model, lambda: way(count), tokens)
    except Exception as error:  # model code may raise anything
        return f"a gradient with it fails ({one_line(error).rstrip('.')})"
    if not calls:
        return unused
    return None if same else "the gradient with it is not that of the model"


def agree(model: nn.Module, own: Callable[[], mx.array], other: Callable[[], mx.array], rounding: float = 1) -> bool:
    """Whether two ways to compute a loss (a mean or sum in nats) give the same value and gradient.

    `rounding` multiplies the tolerances. Raises what the model's code raises. The trained arrays are restored.
    """
    before = trained_arrays_of(model)
    # A new adapter has one factor of zeros, which hides the gradient of the other factor.
    perturbed = {
        name: array if mx.any(array).item() else array + mx.full(array.shape, 0.01, array.dtype)
        for name, array in before
    }
    names = list(perturbed)

    def found(way: Callable[[], mx.array]) -> tuple[mx.array, list[mx.array]]:
        def loss(*arrays: mx.array) -> mx.array:
            model.load_weights(list(zip(names, arrays)), strict=False)
            return way()

        if not names:
            return loss(), []
        value, gradients = mx.value_and_grad(loss, argnums=tuple(range(len(names))))(*perturbed.values())
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
