"""Packing: several sequences ("lines") are computed in one row, except by the layers that mix tokens.

While a graph is built, proxies shadow the token mixers of the layers (attention, recurrences, convolutions); no class
or parameter is changed. A proxy unpacks the row (1, N, D) into lines (R, L, D), padded on the right, runs the mixer on
them, and packs the results again. So positions and states start anew with each line. The mixer's linear projections are
computed on the packed row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_nb.data.examples.packing import PackedLines, pack_lines
from mlx_nb.model.backend import one_blas_thread
from mlx_nb.model.cpu_kernels import kernels_are_verified, needed_queries, trial_kernels
from mlx_nb.model.custom_functions import custom_function
from mlx_nb.model.equivalence import agree
from mlx_nb.model.module_proxy import ModuleProxy
from mlx_nb.model.once_per_model import once_per_model, trained_shapes
from mlx_nb.model.passes import random_tokens

# Attribute names of token mixers. A family with other names fails the verification.
_ATTENTION = ("self_attn", "attention", "attn", "self_attention", "block_sparse_attn", "linear_attn")
MIXERS = frozenset((*_ATTENTION, "mamba", "mixer", "conv", "temporal_block", "token_mixer"))


# Matrix products over other numbers of rows round differently: 2e-4 in the gradient of random tokens over 30 layers.
_ROUNDING = 10


class Layout(NamedTuple):
    """Maps between a packed row of N positions and R lines of at most L tokens (R * L places).

    position_RL  (R, L) int32, the position in the packed row of each place; on padding that of the line's last token
    place_CN     (C, N) int32, the places of each position: first in the line that its result is taken from, then in the
                 other lines that share it; R * L if there are no more
    taken_RL     (R, L) int32, the position that takes its result from each place; N if none does
    line_S       (S,) int32, the line of the batch of each target
    needed       the range of needed queries (first, end) of each line; empty = all
    """

    position_RL: mx.array
    place_CN: mx.array
    taken_RL: mx.array
    line_S: mx.array
    needed: tuple[tuple[int, int], ...]


def layout_of(packed: PackedLines, line_S: mx.array, width_to_multiple: int = 1) -> Layout:
    """The layout of packed lines. Lines that share nothing come first, longer before shorter, so that the lines which
    need a block of queries are adjacent.

    L is rounded up to `width_to_multiple`. A multiple above 1 is for compiled graphs; then `needed`, which would be a
    different constant for each batch, is empty.
    """
    lengths = [len(position) for position in packed.positions]
    order = sorted(range(len(lengths)), key=lambda line: (packed.shared[line], -lengths[line], line))
    longest, count = -(-max(lengths) // width_to_multiple) * width_to_multiple, len(packed.tokens_N)
    position_RL = np.stack(
        [packed.positions[line][np.minimum(np.arange(longest), lengths[line] - 1)] for line in order]
    )
    places: list[list[int]] = [[] for _ in range(count)]
    taken_RL = np.full((len(order), longest), count)
    for index, line in enumerate(order):
        own = packed.shared[line]
        taken_RL[index, own : lengths[line]] = packed.positions[line][own:]
        for place, position in enumerate(packed.positions[line]):
            at = index * longest + place
            places[position].insert(0 if place >= own else len(places[position]), at)
    most, nowhere = max(map(len, places)), len(order) * longest
    place_CN = np.array([[*found, *[nowhere] * (most - len(found))] for found in places]).T
    needed = () if width_to_multiple > 1 else tuple((packed.shared[line], lengths[line]) for line in order)
    return Layout(_indices(position_RL), _indices(place_CN), _indices(taken_RL), line_S, needed)


def _indices(array: np.ndarray) -> mx.array:
    return mx.array(np.ascontiguousarray(array).astype(np.int32))


def laid_out(rows: mx.array, layout: Layout) -> mx.array:
    """Unpack a row (1, N, X) into lines (R, L, X)."""
    home = mx.default_stream(mx.default_device())
    lines, longest = layout.position_RL.shape

    @custom_function
    def lay_out(row: mx.array) -> mx.array:
        return row[0][layout.position_RL.reshape(-1)].reshape(lines, longest, row.shape[-1])

    @lay_out.vjp
    def _gradient(_primals: Any, cotangent: Any, _result: Any) -> mx.array:
        with mx.stream(home):
            flat = cotangent.reshape(-1, cotangent.shape[-1])
            first, *others = layout.place_CN
            total: mx.array = flat[first]
            if others:
                flat = _with_a_row_of_zeros(flat)
            for places_N in others:
                total = total + flat[places_N]
            return total[None]

    found: Any = lay_out(rows)
    result: mx.array = found
    return result


def packed_again(lines: mx.array, layout: Layout) -> mx.array:
    """Pack lines (R, L, X) into a row (1, N, X)."""
    home = mx.default_stream(mx.default_device())
    shape = lines.shape

    @custom_function
    def pack(lines: mx.array) -> mx.array:
        return lines.reshape(-1, lines.shape[-1])[layout.place_CN[0]][None]

    @pack.vjp
    def _gradient(_primals: Any, cotangent: Any, _result: Any) -> mx.array:
        with mx.stream(home):
            rows = _with_a_row_of_zeros(cotangent[0])
            return rows[layout.taken_RL.reshape(-1)].reshape(shape)

    found: Any = pack(lines)
    result: mx.array = found
    return result


def _with_a_row_of_zeros(rows: mx.array) -> mx.array:
    return mx.concatenate([rows, mx.zeros((1, rows.shape[-1]), rows.dtype)])


@contextmanager
def mixing_lines(module: nn.Module, layout: Layout | None) -> Iterator[None]:
    """A context in which graphs of a model, or of one of its layers, take a packed row; None changes nothing.

    Call `packing_is_verified` first.
    """
    shadowed: list[tuple[dict[str, Any], str, Any]] = []
    if layout is None:
        yield
        return
    masks: dict[int, tuple[mx.array, mx.array]] = {}
    try:
        for holder, name in _mixers(module):
            attributes = vars(holder)
            shadowed.append((attributes, name, attributes.get(name)))
            mixers = holder[name]
            stand_ins = [_Mixer(mixer, layout, masks) for mixer in (mixers if isinstance(mixers, list) else [mixers])]
            attributes[name] = stand_ins if isinstance(mixers, list) else stand_ins[0]
        yield
    finally:
        for attributes, name, before in reversed(shadowed):
            if before is None:
                attributes.pop(name, None)  # an interrupt may have come before it was set
            else:
                attributes[name] = before


def _mixers(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """(module, attribute name) of each token mixer, or list of token mixers."""
    return [
        (holder, name)
        for holder in module.modules()
        for name, part in holder.items()
        if name in MIXERS and all(isinstance(one, nn.Module) for one in (part if isinstance(part, list) else [part]))
    ]


class _Mixer(ModuleProxy):
    """A proxy for a token mixer, which gets the lines of a packed row."""

    def __init__(self, module: nn.Module, layout: Layout, masks: dict[int, tuple[mx.array, mx.array]]) -> None:
        super().__init__(module)
        self._layout, self._masks = layout, masks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        lines = _Lines(self._layout, self._masks)
        args = tuple(lines.of(value) for value in args)
        kwargs = {name: lines.of(value) for name, value in kwargs.items()}
        if not lines.known:  # it is nested in a mixer that gets lines already
            return self._module(*args, **kwargs)
        with needed_queries(self._layout.needed), _projecting(self._module, lines):
            result = self._module(*args, **kwargs)
        if isinstance(result, tuple):  # keys and values for later layers, which get the same lines
            return (lines.packed(result[0]), *result[1:])
        return lines.packed(result)


class _Lines:
    """The lines of one call and the packed rows that they come from. `masks` caches masks over all calls."""

    def __init__(self, layout: Layout, masks: dict[int, tuple[mx.array, mx.array]]) -> None:
        self.layout, self._masks = layout, masks
        self.known: list[tuple[mx.array, mx.array]] = []

    def of(self, value: Any) -> Any:
        """Convert an argument of a mixer for lines: unpack rows, and cut masks and position values to a line."""
        if not isinstance(value, mx.array):
            return value
        length, longest = self.layout.place_CN.shape[1], self.layout.position_RL.shape[1]
        if value.ndim == 3 and value.shape[:2] == (1, length):
            return self.laid_out(value)
        if value.ndim >= 2 and value.shape[-2:] == (length, length):
            known = self._masks.setdefault(id(value), (value, value[..., :longest, :longest]))
            return known[1]
        return value[:longest] if value.ndim == 2 and len(value) == length else value

    def laid_out(self, row: mx.array) -> mx.array:
        result = laid_out(row, self.layout)
        self.known.append((result, row))
        return result

    def packed(self, lines: mx.array) -> mx.array:
        """The packed row of `lines`: the row that they were unpacked from, or a newly packed one."""
        for known, row in self.known:
            if known is lines:
                return row
        return packed_again(lines, self.layout)


class _Projection(ModuleProxy):
    """A proxy for a linear projection inside a mixer, which acts on each token separately."""

    def __init__(self, module: nn.Module, lines: _Lines) -> None:
        super().__init__(module)
        self._lines = lines

    def __call__(self, x: mx.array) -> mx.array:
        if x.ndim != 3 or x.shape[:2] != self._lines.layout.position_RL.shape:
            result: mx.array = self._module(x)
            return result
        return self._lines.laid_out(self._module(self._lines.packed(x)))


@contextmanager
def _projecting(module: nn.Module, lines: _Lines) -> Iterator[None]:
    """A context in which the linear projections of a mixer are computed on the packed row."""
    names = [name for name, part in module.items() if _is_linear(part) and name not in vars(module)]
    attributes = vars(module)
    try:
        for name in names:
            attributes[name] = _Projection(module[name], lines)
        yield
    finally:
        for name in names:
            attributes.pop(name, None)


def _is_linear(part: Any) -> bool:
    base = part.get("linear", part) if isinstance(part, nn.Module) else part  # an adapter wraps it
    return isinstance(base, (nn.Linear, nn.QuantizedLinear))


def packing_is_verified(model: nn.Module) -> bool:
    """Whether packed lines, two of which share a prefix, give the same loss and gradient as separate lines."""
    with one_blas_thread():  # for such small products more threads are slower when other programs run
        return _is_proved(model, trained_shapes(model))


@once_per_model(good=bool, from_json=bool)
def _is_proved(model: nn.Module, _trained: tuple[Any, ...]) -> bool:
    long, short = (random_tokens(model, count, count) for count in (12, 5))
    lines = [np.array(line) for line in (short, long, long[:9] + short[:2])]
    packed = pack_lines([line[:-1] for line in lines])
    layout = layout_of(packed, mx.array(0))
    has_kernels = kernels_are_verified(model)

    def alone() -> mx.array:
        return sum((_loss(model(mx.array(line[None, :-1]))[0], line) for line in lines), mx.array(0.0))

    def together() -> mx.array:
        with trial_kernels(model) if has_kernels else nullcontext(), mixing_lines(model, layout):
            logits_NV = model(mx.array(packed.tokens_N[None]))[0]
        losses = [_loss(logits_NV[mx.array(at)], line) for at, line in zip(packed.positions, lines)]
        return sum(losses, mx.array(0.0))

    try:
        return agree(model, alone, together, _ROUNDING)
    except Exception:  # model code may raise anything; then packing is not used
        return False


def _loss(logits_TV: mx.array, line: np.ndarray) -> mx.array:
    result: mx.array = nn.losses.cross_entropy(logits_TV.astype(mx.float32), mx.array(line[1:])).sum()
    return result
