"""Records the operations of a function of mlx arrays, with all shapes, without computing anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_nb.errors import ModelError
from mlx_nb.model.custom_functions import Mark, recording_custom_functions

_BYTES = {"bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "float16": 2, "bfloat16": 2}
_LONG = {"int64": 8, "uint64": 8, "float64": 8, "complex64": 8}


class Form(NamedTuple):
    """Shape and dtype of an array."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return _BYTES.get(self.dtype) or _LONG.get(self.dtype, 4)

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return self.size * self.itemsize


class Operation(NamedTuple):
    """One operation: its name and arguments in mlx, and the names of the arrays that it reads and makes."""

    name: str
    arguments: Sequence[Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Graph(NamedTuple):
    """Recorded operations. `inputs` and `outputs` are those of the function; `forms` has every array."""

    operations: list[Operation]
    forms: dict[str, Form]
    inputs: list[str]
    outputs: list[str]


def recorded(function: Callable[..., Sequence[mx.array]], arrays: Sequence[mx.array]) -> Graph:
    """The operations of `function(*arrays)`. Neither the arrays nor the results are evaluated.

    Raises ModelError for an operation that mlx cannot record.
    """
    events: list[dict[str, Any]] = []
    results = 0
    with recording_custom_functions() as marks:

        def marked(*arrays: mx.array) -> list[mx.array]:
            nonlocal results
            found = list(function(*arrays))
            results = len(found)
            return found + [array for mark in marks for group in mark for array in group]

        try:
            mx.export_function(events.append, marked, *arrays)
        except ValueError as error:
            raise ModelError(f"the memory of this model cannot be planned: {' '.join(str(error).split())}.") from None
    operations, forms = list[Operation](), dict[str, Form]()
    names: dict[str, list[str]] = {}
    for event in events:
        match event["type"]:
            case "inputs" | "outputs" as kind:
                names[kind] = [name for name, *_ in event[kind]]
                forms |= {name: _form(shape, dtype) for name, shape, dtype in event[kind]}
            case "constants":
                forms |= {name: _form(array.shape, array.dtype) for name, array in event["constants"]}
            case "primitive":
                read, made = (tuple(name for name, *_ in event[kind]) for kind in ("inputs", "outputs"))
                forms |= {name: _form(shape, dtype) for name, shape, dtype in event["outputs"]}
                operations.append(Operation(event["name"], event["arguments"], read, made))
    same = _same_arrays(operations, marks, names["outputs"][results:])

    def real(name: str) -> str:
        while name in same:
            name = same[name]
        return name

    operations = [one._replace(inputs=tuple(map(real, one.inputs))) for one in operations]
    return Graph(operations, forms, names["inputs"], [real(name) for name in names["outputs"][:results]])


def _form(shape: Sequence[int], dtype: Any) -> Form:
    return Form(tuple(shape), str(dtype).rsplit(".", 1)[-1].rstrip("_"))


def _same_arrays(operations: list[Operation], marks: list[Mark], names: list[str]) -> dict[str, str]:
    """Names of marked arrays, mapped to the array of the custom function that each stands for."""
    products: dict[str, list[Operation]] = {}
    for operation in operations:
        if operation.name == "Multiply":
            for name in operation.inputs:
                products.setdefault(name, []).append(operation)
    same, left = dict[str, str](), iter(names)
    for mark in marks:
        inputs, outputs, slopes, cotangents, input_tags, output_tags, stand_ins = (
            [next(left) for _ in group] for group in mark
        )
        for array, tag, slope in zip(inputs, input_tags, slopes):
            for product in products.get(tag, ()):
                if array not in product.inputs:
                    same[product.outputs[0]] = slope
        for output, tag, cotangent, stand_in in zip(outputs, output_tags, cotangents, stand_ins):
            for product in products.get(tag, ()):
                if stand_in not in product.outputs:
                    [same[cotangent]] = [name for name in product.inputs if name != tag]
            same[stand_in] = output
    return same
