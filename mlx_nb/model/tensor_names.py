"""Names and shapes in the header of a safetensors file, and where in a model a tensor belongs."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_nb.errors import ModelError
from mlx_nb.files.typed_json import json_object, read_as

_HEADER_LIMIT = 100 * 1024**2  # bytes, from the safetensors specification
_MOST_DIGITS = 9  # digits of a layer number
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file: the shape of each tensor by name (None if it is not given), and metadata."""

    shapes: dict[str, tuple[int, ...] | None]
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class _Tensor:
    shape: list[int] = field(default_factory=list)


def read_header(weights: Path, setting: str) -> Header:
    """Read only the header of a safetensors file. Raises ModelError in one line, which begins with `setting`."""
    try:
        with weights.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_HEADER_LIMIT, weights.stat().st_size):
                raise ValueError("its header is cut off")
            header = read_as(dict[str, Any], json_object(file.read(length)))
        shapes = {name: _shape(entry) for name, entry in header.items() if name != _METADATA}
    except (ValueError, TypeError, struct.error, RecursionError) as error:
        raise ModelError(f"{setting}: {weights} is not a readable safetensors file ({error}).") from None
    if not shapes:
        raise ModelError(f"{setting}: {weights} holds no tensors.")
    metadata = header.get(_METADATA)
    return Header(shapes, metadata if isinstance(metadata, Mapping) else {})


def _shape(entry: Any) -> tuple[int, ...] | None:
    try:
        return tuple(read_as(_Tensor, entry, others=True).shape)
    except ValueError:
        return None


def place(name: str) -> tuple[int | None, str]:
    """(layer number, path inside the layer) of a module or tensor; (None, name) outside the layers."""
    parts = name.split(".")
    for index in range(1, len(parts)):
        if (
            parts[index].isdecimal()
            and len(parts[index]) <= _MOST_DIGITS
            and parts[index - 1] in ("layers", "h", "blocks")
        ):
            return int(parts[index]), ".".join(parts[index + 1 :])
    return None, name
