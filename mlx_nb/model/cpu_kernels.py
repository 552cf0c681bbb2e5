"""Installs faster attention and SwiGLU for mlx-lm's models on a CPU, only while a graph is being built.

mlx-lm's models call these functions by names in their own modules. Inside `kernels` those names are bound to our
functions, for models whose loss and gradient are verified not to change. When the last caller leaves, they are
restored.
"""

from __future__ import annotations

import platform
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_nb.model import backend
from mlx_nb.model.block_attention import Block, Needed, block_attention, causal_blocks, fast_swiglu, masked_blocks
from mlx_nb.model.equivalence import gives_the_same
from mlx_nb.model.mlx_lm_import import import_mlx_lm
from mlx_nb.model.once_per_model import once_per_model, trained_shapes

_BLOCK = 64  # queries; larger blocks skip less, smaller blocks take longer to build
_FEWEST_TOKENS = 32  # with fewer, building the graph costs more than is saved
_PROBED_BLOCK, _PROBED_TOKENS = 3, 8

_inside: list[_Kernels] = []
_entering = threading.Lock()
_asked = threading.local()


@dataclass
class _Kernels:
    """The state of one `kernels` context. The blocks of a mask are cached for the graph that this thread builds."""

    modules: list[ModuleType]
    block: int
    fewest_tokens: int
    thread: int = field(default_factory=threading.get_ident)
    masks: dict[int, tuple[mx.array, list[Block] | None]] = field(default_factory=dict)

    def blocks(self, mask: Any, length: int, needed: Needed) -> list[Block] | None:
        """The blocks of queries for a mask, in the lines that need them.

        None if mlx's own function must be used: for no mask, an additive mask, or a query that sees no key.
        """
        if isinstance(mask, str):
            return causal_blocks(length, self.block, needed) if mask == "causal" else None
        if not isinstance(mask, mx.array) or mask.dtype != mx.bool_ or mask.shape != (length, length):
            return None
        if id(mask) not in self.masks:  # all layers get the same mask
            self.masks[id(mask)] = (mask, masked_blocks(np.array(mask), self.block, needed))
        return self.masks[id(mask)][1]


@contextmanager
def kernels(model: nn.Module) -> Iterator[None]:
    """A context in which graphs of `model` use the fast kernels. Call `kernels_are_verified` first."""
    with _bound(model, _BLOCK, _FEWEST_TOKENS):
        yield


@contextmanager
def needed_queries(needed: Needed) -> Iterator[None]:
    """A context in which this thread needs only some results of attention: (first, end) queries of each line."""
    before = getattr(_asked, "needed", None)
    _asked.needed = needed
    try:
        yield
    finally:
        _asked.needed = before


@contextmanager
def trial_kernels(model: nn.Module) -> Iterator[None]:
    """Like `kernels`, with blocks of a few queries, so that a few tokens suffice for a trial."""
    with _bound(model, _PROBED_BLOCK, _PROBED_BLOCK):
        yield


def kernels_are_verified(model: nn.Module) -> bool:
    """Whether this machine has fast kernels, and they give the same loss and gradient of the model."""
    if not backend.is_cpu() or platform.machine() not in ("x86_64", "AMD64"):
        return False
    return _are_proved(model, trained_shapes(model))


@once_per_model(good=bool, from_json=bool)
def _are_proved(model: nn.Module, _trained: tuple[Any, ...]) -> bool:
    """Whether the kernels give the same loss and gradient on a few tokens, in blocks of a few queries."""
    try:
        return gives_the_same(model, lambda: trial_kernels(model), _PROBED_TOKENS)
    except Exception:  # model code may raise anything; then the kernels are not used
        return False


@contextmanager
def _bound(model: nn.Module, block: int, fewest_tokens: int) -> Iterator[None]:
    originals = _originals()
    at_home = {function.__module__ for function in (*originals, *originals.values())}
    names = {type(module).__module__ for module in model.modules()} - at_home
    modules = [sys.modules[name] for name in sorted(names)]
    mine = _Kernels(modules, block, fewest_tokens)
    with _entering:
        _inside.append(mine)
        _bind(modules, originals)
    try:
        yield
    finally:
        with _entering:
            _inside.remove(mine)
            in_use = {id(module) for other in _inside for module in other.modules}
            ours = {own: original for original, own in originals.items()}
            _bind([module for module in modules if id(module) not in in_use], ours)


def _bind(modules: list[ModuleType], instead: dict[Any, Any]) -> None:
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, Callable) and _is_key(value, instead):  # type: ignore[arg-type]
                setattr(module, name, instead[value])


def _is_key(value: Any, among: dict[Any, Any]) -> bool:
    try:
        return value in among
    except TypeError:  # not hashable
        return False


def _originals() -> dict[Any, Any]:
    """mlx-lm's functions, mapped to their replacements."""
    import_mlx_lm()
    from mlx_lm.models import activations, base

    return {base.scaled_dot_product_attention: _attention, activations.swiglu: _swiglu}


def _mine() -> _Kernels | None:
    """The innermost context of this thread; None outside of one."""
    return next((one for one in reversed(_inside) if one.thread == threading.get_ident()), None)


def _attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    from mlx_lm.models.base import scaled_dot_product_attention

    own = partial(scaled_dot_product_attention, queries, keys, values, cache, scale, mask, sinks)
    mine, length = _mine(), queries.shape[2]
    if mine is None or cache is not None or sinks is not None or length < mine.fewest_tokens:
        return own()
    if keys.shape[2] != length or any(array.dtype != mx.float32 for array in (queries, keys, values)):
        return own()
    needed: Needed = getattr(_asked, "needed", None)
    blocks = mine.blocks(mask, length, needed if needed is None or len(needed) == len(queries) else None)
    if blocks is None:
        return own()
    return block_attention(queries, keys, values, scale=scale, blocks=blocks)


def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    from mlx_lm.models.activations import swiglu

    if _mine() is None or gate.shape != x.shape or gate.dtype != mx.float32 or x.dtype != mx.float32:
        result: mx.array = swiglu(gate, x)
        return result
    return fast_swiglu(gate, x)
