"""Flat lists of the arrays in a model or in a tree of parameters or gradients."""

from __future__ import annotations

import typing
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


def named_arrays(tree: Any) -> list[tuple[str, mx.array]]:
    """(path, array) of every array in a tree, in a fixed order."""
    return typing.cast(list[tuple[str, mx.array]], tree_flatten(tree))


def trained_arrays_of(model: nn.Module) -> list[tuple[str, mx.array]]:
    """(path, array) of every trained array of a model; empty for an object that is not an mlx module."""
    try:
        return named_arrays(model.trainable_parameters())
    except AttributeError:
        return []


def held_arrays(model: nn.Module) -> list[mx.array]:
    """Every array of a model, parameters and others, such as the frequencies of a rotary embedding.

    Any thread can use an evaluated array; an unevaluated one belongs to the thread that created it.
    """
    return [array for _, array in named_arrays(model) if isinstance(array, mx.array)]
