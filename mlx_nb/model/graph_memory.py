"""The peak memory of evaluating a recorded graph, found by repeating mlx's evaluation without computing anything.

mlx evaluates an operation after those that it needs, breadth first up to MLX_BFS_MAX_WIDTH at a time. It allocates each
result when the operation is scheduled, reuses the memory of an input that nothing else needs, and frees memory some
operations later, because scheduling runs ahead of the computation. Views (slices, transposes) use no memory of their
own, and matrix products and some others copy an input whose elements are not adjacent.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from mlx_nb.model.graph_record import Form, Graph, Operation

WIDTH = 20  # mlx's default of MLX_BFS_MAX_WIDTH
# mlx schedules on one thread and computes on another, at most this many dispatches (one or two per operation) behind.
# How far behind it is at each moment follows from these times in seconds, roughly those of a CPU.
_MOST_IN_FLIGHT = 100
_TO_SCHEDULE, _TO_START = 4e-6, 1e-6
_PER_ELEMENT, _PER_PRODUCT = 1e-9, 2.5e-11

_ARITHMETIC = (
    "Add",
    "Divide",
    "LogAddExp",
    "Maximum",
    "Minimum",
    "Multiply",
    "Negative",
    "Power",
    "Remainder",
    "Subtract",
)
_FUNCTIONS = ("Abs", "Erf", "ErfInv", "Exp", "Expm1", "Log", "Log1p", "Rsqrt", "Sigmoid", "Sign", "Sqrt", "Square")
_TRIGONOMETRY = ("ArcTan", "ArcTan2", "Cos", "Cosh", "Sin", "Sinh", "Tan", "Tanh")
_COMPARISONS = (
    "Equal",
    "Greater",
    "GreaterEqual",
    "Less",
    "LessEqual",
    "LogicalAnd",
    "LogicalNot",
    "LogicalOr",
    "NotEqual",
)
_OTHERS = (
    "AsType",
    "BitwiseBinary",
    "BitwiseInvert",
    "Ceil",
    "Compiled",
    "Floor",
    "Round",
    "Scan",
    "Select",
    "Softmax",
)
_ELEMENTWISE = frozenset((*_ARITHMETIC, *_FUNCTIONS, *_TRIGONOMETRY, *_COMPARISONS, *_OTHERS))
# Operations whose first result begins as a copy of the first input, or takes its memory.
_SCATTERS = ("MaskedScatter", "Scatter", "ScatterAxis", "SliceUpdate", "DynamicSliceUpdate")
_IN_PLACE = frozenset((*_SCATTERS, "AddMM", "Partition", "Sort"))
_RESHAPES = frozenset(("ExpandDims", "Flatten", "Reshape", "Squeeze", "Unflatten"))
_SAME_PLACE = ("Copy", "CustomTransforms", "Depends", "StopGradient", "View")
_PARTS = ("AsStrided", "Broadcast", "Contiguous", "DynamicSlice", "Slice", "Split", "Transpose")
_VIEWS = frozenset((*_RESHAPES, *_SAME_PLACE, *_PARTS))
_FUSED = ("LayerNorm", "LogSumExp", "RMSNorm", "RMSNormVJP", "RoPE", "ScaledDotProductAttention")
_COPIES_INPUTS = frozenset((*_FUSED, "BlockMaskedMM", "GatherMM", "GatherQMM", "QuantizedMatmul"))


class Layout(NamedTuple):
    """Where an array is: its buffer, its strides, and the number of elements that it covers in the buffer."""

    buffer: int
    strides: tuple[int, ...]
    covered: int


class Peak(NamedTuple):
    """Bytes in use at the peak, by the kind that `kind_of` gives for each array."""

    total: int
    by_kind: dict[str, int]


def peak_of(
    graph: Graph,
    kind_of: Callable[[str, Form], str],
    *,
    width: int = WIDTH,
    evaluations: Sequence[Sequence[str]] | None = None,
    used_up: Sequence[str] = (),
) -> Peak:
    """The peak memory of evaluating the graph's outputs, without the function's inputs, which are in memory already.

    `kind_of(name, form)` gives the kind of a new array. `evaluations` are groups of outputs that are evaluated one
    after another; None evaluates all at once. `used_up` are inputs that nothing else holds: they count, and are freed
    after their last use.
    """
    replay, done = _Replay(graph, kind_of, used_up), set[str]()
    orders = []
    for wanted in [graph.outputs] if evaluations is None else evaluations:
        orders.append(evaluation_order(graph, width, wanted, done))
        done.update(name for one in orders[-1] for name in one.outputs)
    return replay.run(orders)


def evaluation_order(
    graph: Graph, width: int = WIDTH, wanted: Sequence[str] | None = None, done: Collection[str] = ()
) -> list[Operation]:
    """The operations that the outputs (or those in `wanted`) need, in the order in which mlx evaluates them.

    Arrays in `done` are evaluated already.
    """
    outputs = graph.outputs if wanted is None else wanted
    maker = {name: number for number, one in enumerate(graph.operations) for name in one.outputs if name not in done}
    root = len(graph.operations)
    needs = [[maker[name] for name in one.inputs if name in maker] for one in graph.operations]
    needs.append([maker[name] for name in outputs if name in maker])
    uses: dict[int, int] = {}
    stack = [root]
    while stack:
        for number in needs[stack.pop()]:
            if number not in uses:
                uses[number] = 0
                stack.append(number)
            uses[number] += 1
    order, waiting, at = [root], list[tuple[int, int]](), 0
    while uses and (at < len(order) or waiting):
        if at < len(order):
            number, start = order[at], 0
            at += 1
        else:
            number, start = waiting.pop()
        for place in range(start, len(needs[number])):
            if len(order) - at >= width:
                waiting.append((number, place))
                break
            needed = needs[number][place]
            uses[needed] -= 1
            if not uses[needed]:
                del uses[needed]
                order.append(needed)
    return [graph.operations[number] for number in reversed(order[1:])]


class _Replay:
    """The state of one evaluation. Buffers of the function's inputs and of constants count as 0 and stay."""

    def __init__(self, graph: Graph, kind_of: Callable[[str, Form], str], used_up: Sequence[str]) -> None:
        self.graph, self.forms, self.kind_of = graph, graph.forms, kind_of
        self.sizes: list[int] = []
        self.kinds: list[str] = []
        self.holders: list[int] = []
        self.live: Counter[str] = Counter()
        self.total = 0
        self.peak = Peak(0, {})
        made = {name for one in graph.operations for name in one.outputs}
        self.layouts = {
            name: Layout(self._buffer(0, "", 1), row_major(form.shape), form.size)
            for name, form in graph.forms.items()
            if name not in made and name not in used_up
        }
        for name in used_up:
            self.layouts[name] = self._new(name)
            self.holders[self.layouts[name].buffer] = 1
        self.kept = set(graph.inputs) - set(used_up)
        self.uses: Counter[str] = Counter()

    def run(self, orders: Sequence[Sequence[Operation]]) -> Peak:
        """Evaluate one order after another."""
        self.uses.update(name for order in orders for one in order for name in one.inputs)
        self.uses.update(self.graph.outputs)
        for order in orders:
            self._evaluate(order)
        return self.peak

    def _evaluate(self, order: Sequence[Operation]) -> None:
        in_flight: deque[tuple[int, float, list[int]]] = deque()  # (dispatches, end of the computation, buffers)
        dispatched, scheduled, computed = 0, 0.0, 0.0
        for one in order:
            made, copies = self._results(one)
            dispatched += 2 + len(copies) if one.name not in _VIEWS else 1
            scheduled += _TO_SCHEDULE
            computed = max(computed, scheduled) + self._seconds(one, copies)
            for name, layout in made.items():
                if self.uses[name]:
                    self.layouts[name] = layout
                    self.holders[layout.buffer] += 1
            first = made[one.outputs[0]].buffer
            held = {self.layouts[name].buffer for name in one.inputs} | {layout.buffer for layout in made.values()}
            held -= {first}
            for buffer in (*held, *copies):
                self.holders[buffer] += 1
            in_flight.append((dispatched, computed, [*held, *copies]))
            self._release_unused(made)
            for name in one.inputs:
                self.uses[name] -= 1
                if not self.uses[name]:
                    self._let_go(self.layouts.pop(name).buffer)
            while in_flight and (in_flight[0][0] <= dispatched - _MOST_IN_FLIGHT or in_flight[0][1] <= scheduled):
                _, ended, buffers = in_flight.popleft()
                scheduled = max(scheduled, ended)
                for buffer in buffers:
                    self._let_go(buffer)
        for *_, buffers in in_flight:
            for buffer in buffers:
                self._let_go(buffer)

    def _seconds(self, one: Operation, copies: list[int]) -> float:
        """Roughly how long an operation takes."""
        if one.name in _VIEWS:
            return _TO_START
        elements = max((self.forms[name].size for name in (*one.inputs, *one.outputs)), default=0)
        seconds = _TO_START + elements * _PER_ELEMENT * (1 + len(copies))
        if one.name in ("Matmul", "AddMM"):
            seconds += self.forms[one.outputs[0]].size * self.forms[one.inputs[0]].shape[-1] * _PER_PRODUCT
        return seconds

    def _release_unused(self, made: dict[str, Layout]) -> None:
        for layout in made.values():
            if not self.holders[layout.buffer]:
                self.holders[layout.buffer] = 1
                self._let_go(layout.buffer)

    def _buffer(self, size: int, kind: str, holders: int = 0) -> int:
        self.sizes.append(size)
        self.kinds.append(kind)
        self.holders.append(holders)
        if size:
            self.total += size
            self.live[kind] += size
            if self.total > self.peak.total:
                self.peak = Peak(self.total, dict(self.live))
        return len(self.sizes) - 1

    def _let_go(self, buffer: int) -> None:
        self.holders[buffer] -= 1
        if not self.holders[buffer]:
            self.total -= self.sizes[buffer]
            self.live[self.kinds[buffer]] -= self.sizes[buffer]

    def _new(self, name: str, like: str | None = None) -> Layout:
        """A new buffer for an array, in the order of elements of `like`."""
        form = self.forms[name]
        strides = row_major(form.shape) if like is None else self.layouts[like].strides
        return Layout(self._buffer(form.nbytes, self.kind_of(name, form)), strides, form.size)

    def _results(self, one: Operation) -> tuple[dict[str, Layout], list[int]]:
        """Where the results of an operation are, and the buffers of temporary copies."""
        if one.name in _VIEWS:
            return {name: self._view(one, number, name) for number, name in enumerate(one.outputs)}, []
        if one.name in _ELEMENTWISE:
            first, *others = one.outputs
            return {first: self._elementwise(one, first), **{name: self._new(name) for name in others}}, []
        made = {name: self._new(name) for name in one.outputs if name != one.outputs[0]}
        made[one.outputs[0]] = self._in_place(one) or self._new(one.outputs[0])
        copied: list[str] = []
        if one.name in ("Matmul", "AddMM"):
            copied = [name for name in one.inputs[:2] if not self._can_be_multiplied(name)]
        elif one.name in _COPIES_INPUTS:
            copied = [name for name in one.inputs if not self._is_row_major(name)]
        return made, [self._new(name).buffer for name in copied]

    def _in_place(self, one: Operation) -> Layout | None:
        """The memory of the input that an operation overwrites; None if it needs new memory."""
        if one.name not in _IN_PLACE:
            return None
        source = one.inputs[2 if one.name == "AddMM" else 0]
        free = self._is_last_use(source) and self._is_row_major(source) and self._is_dense(source)
        return self.layouts[source] if free and self.forms[source] == self.forms[one.outputs[0]] else None

    def _elementwise(self, one: Operation, name: str) -> Layout:
        form = self.forms[name]
        if one.name == "AsType" and self.forms[one.inputs[0]].dtype == form.dtype:
            return self.layouts[one.inputs[0]]
        alike = [read for read in one.inputs if self.forms[read].shape == form.shape and self._is_dense(read)]
        for read in alike:
            if self.forms[read].itemsize == form.itemsize and self._is_last_use(read):
                return self.layouts[read]
        scalars = [read for read in one.inputs if self.layouts[read].covered == 1 and read not in alike]
        in_order = len(alike) + len(scalars) == len(one.inputs)
        same_order = in_order and len({self.layouts[read].strides for read in alike}) == 1
        return self._new(name, alike[0] if same_order and one.name != "Softmax" else None)

    def _is_last_use(self, name: str) -> bool:
        return self.uses[name] == 1 and self.holders[self.layouts[name].buffer] == 1 and name not in self.kept

    def _is_dense(self, name: str) -> bool:
        return self.layouts[name].covered == self.forms[name].size

    def _is_row_major(self, name: str) -> bool:
        shape = self.forms[name].shape
        return all(
            size == 1 or one == other for size, one, other in zip(shape, self.layouts[name].strides, row_major(shape))
        )

    def _can_be_multiplied(self, name: str) -> bool:
        """Whether a matrix product reads the last two axes without a copy."""
        shape, strides = self.forms[name].shape, self.layouts[name].strides
        if len(shape) < 2:
            return True
        (rows, columns), (by_row, by_column) = shape[-2:], strides[-2:]
        plain = (by_row == columns or rows == 1) and (by_column == 1 or columns == 1)
        return plain or ((by_row == 1 or rows == 1) and (by_column == rows or columns == 1))

    def _view(self, one: Operation, number: int, name: str) -> Layout:
        place = {"Depends": number, "CustomTransforms": len(one.inputs) - len(one.outputs) + number}.get(one.name, 0)
        source = one.inputs[place]
        layout, before, after = self.layouts[source], self.forms[source].shape, self.forms[name].shape
        strides: tuple[int, ...] | None = layout.strides
        match one.name:
            case "Transpose":
                strides = tuple(layout.strides[axis] for axis in one.arguments[0])
            case "Broadcast":
                strides = _broadcast(before, layout.strides, after)
            case "Slice":
                steps = one.arguments[2] if len(one.arguments) > 2 else (1,) * len(before)
                strides = tuple(stride * step for stride, step in zip(layout.strides, steps))
            case "Contiguous":
                strides = layout.strides if self._is_row_major(source) else None
            case kind if kind in _RESHAPES:
                strides = reshaped(before, layout.strides, after)
            case _ if len(before) != len(after):
                strides = row_major(after)
        return self._new(name) if strides is None else layout._replace(strides=strides)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of adjacent elements, the last axis first."""
    strides, size = list[int](), 1
    for length in reversed(shape):
        strides.append(size)
        size *= length
    return tuple(reversed(strides))


def _broadcast(before: Sequence[int], strides: Sequence[int], after: Sequence[int]) -> tuple[int, ...]:
    added = len(after) - len(before)
    kept = (stride if length == wide else 0 for length, stride, wide in zip(before, strides, after[added:]))
    return (*(0,) * added, *kept)


def reshaped(before: Sequence[int], strides: Sequence[int], after: Sequence[int]) -> tuple[int, ...] | None:
    """The strides of a view in another shape; None if the elements must be copied."""
    runs: list[tuple[int, int]] = []  # (elements, stride) of axes that are adjacent in memory
    for length, stride in zip(before, strides):
        if length == 1:
            continue
        if runs and runs[-1][1] == length * stride:
            runs[-1] = (runs[-1][0] * length, stride)
        else:
            runs.append((length, stride))
    found, place = list[int](), 0
    left = runs[0][0] if runs else 1
    for length in after:
        if length == 1:
            found.append(1)
            continue
        if place >= len(runs) or left % length:
            return None
        left //= length
        found.append(left * runs[place][1])
        if left == 1:
            place += 1
            left = runs[place][0] if place < len(runs) else 1
    return tuple(found)
