"""The arrays of a model, and of trees of parameters or gradients, as flat lists."""

from __future__ import annotations

import typing
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


def named_arrays(tree: Any) -> list[tuple[str, mx.array]]:
    """(path, array) of every array in a tree of parameters or gradients, in a fixed order."""
    return typing.cast(list[tuple[str, mx.array]], tree_flatten(tree))


def trained_arrays_of(model: nn.Module) -> list[tuple[str, mx.array]]:
    """(path, array) of every trained array of a model; empty for an object that is not an mlx module."""
    try:
        return named_arrays(model.trainable_parameters())
    except AttributeError:
        return []


def held_arrays(model: nn.Module) -> list[mx.array]:
    """Every array that a model holds, its parameters and others, such as the frequencies of a rotary embedding.

    Those that are computed can be used by any thread; one that is not yet, only by the thread that made it.
    """
    return [array for _, array in named_arrays(model) if isinstance(array, mx.array)]
