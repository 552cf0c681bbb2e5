"""Trees of parameters and gradients, as flat lists."""

from __future__ import annotations

import typing
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten


def named_arrays(tree: Any) -> list[tuple[str, mx.array]]:
    """(path, array) of every array in a tree of parameters or gradients, in a fixed order."""
    return typing.cast(list[tuple[str, mx.array]], tree_flatten(tree))
