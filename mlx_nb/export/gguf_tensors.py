"""The weights of a trained model under llama.cpp's names and in its layout, and the proof that a file holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_nb.errors import ModelError
from mlx_nb.export.fused_weights import fused_values
from mlx_nb.export.gguf_families import Arguments, Family, Unwritable
from mlx_nb.model.adapters import adapter_modules
from mlx_nb.model.gguf.convert import half_by_half
from mlx_nb.model.requantizing import values_of


@dataclass(frozen=True, eq=False)
class Tensor:
    """One weight: its name in mlx-lm, its name in llama.cpp, its shape, and the function that computes it."""

    mlx_name: str
    name: str
    shape: tuple[int, ...]
    value: Callable[[], mx.array]


class Layout:
    """The names and the layout of a family's weights in llama.cpp."""

    def __init__(self, family: Family, arguments: Arguments) -> None:
        import gguf

        architectures = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        self.family = family
        self._arguments = arguments
        self._names = gguf.get_tensor_name_map(architectures[family.architecture], arguments["num_hidden_layers"])

    def name(self, mlx_name: str) -> str:
        """llama.cpp's name of a weight. Raises Unwritable for one that the architecture does not have."""
        plain = mlx_name.removeprefix("language_model.")
        found: str | None = self._names.get_name(plain, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise Unwritable(f"llama.cpp's {self.family.architecture} has no weight for {mlx_name}")
        return found

    def to_llama(self, name: str, rows: np.ndarray) -> np.ndarray:
        """A weight in mlx's layout, (rows, ...), in llama.cpp's."""
        if (heads := self._heads(name)) is not None:
            return pair_by_pair(rows, heads)
        return rows + np.float32(self._offset(name)) if self._offset(name) else rows

    def to_mlx(self, name: str, rows: np.ndarray) -> np.ndarray:
        """A weight in llama.cpp's layout in mlx's: the inverse of `to_llama`."""
        if (heads := self._heads(name)) is not None:
            return half_by_half(rows, heads)
        return rows - np.float32(self._offset(name)) if self._offset(name) else rows

    def _heads(self, name: str) -> int | None:
        """The number of heads of a weight whose rows are interleaved; None for others."""
        part = name.split(".")[-2]
        if not self.family.rope_interleaved or part not in ("attn_q", "attn_k"):
            return None
        heads = self._arguments["num_attention_heads"]
        return int(heads if part == "attn_q" else self._arguments.get("num_key_value_heads") or heads)

    def _offset(self, name: str) -> float:
        return self.family.norm_offset if name.endswith("norm.weight") else 0.0


def pair_by_pair(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of each head from halves (x0 x1 ... y0 y1 ...) to pairs (x0 y0 x1 y1 ...), for llama.cpp."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def trained_tensors(live: nn.Module, layout: Layout) -> Iterator[Tensor]:
    """The weights of the live model with its adapter merged, each computed when it is needed."""
    wrapped = dict(adapter_modules(live))
    for path, module in live.named_modules():
        if any(path.startswith(f"{outer}.") for outer in wrapped):
            continue
        source = module if path not in wrapped else module["linear" if "linear" in module else "embedding"]
        for key, array in source.items():
            if (
                not isinstance(array, mx.array)
                or key.startswith("_")
                or ("scales" in source and key in ("scales", "biases"))
            ):
                continue
            mlx_name = f"{path}.{key}" if path else key
            shape = array.shape
            if key == "weight" and "scales" in source:
                shape = (*shape[:-1], shape[-1] * 32 // source.bits)
            yield Tensor(mlx_name, layout.name(mlx_name), shape, _value(wrapped.get(path), source, key))


def _value(wrapper: nn.Module | None, source: nn.Module, key: str) -> Callable[[], mx.array]:
    if key != "weight":
        return lambda: source[key].astype(mx.float32)
    return (lambda: values_of(source)) if wrapper is None else (lambda: fused_values(wrapper))


def adapter_tensors(live: nn.Module, layout: Layout, alpha: float) -> Iterator[tuple[str, np.ndarray]]:
    """The matrices of a LoRA adapter under llama.cpp's names: `.lora_a` (rank, in) and `.lora_b` (out, rank) float32.

    llama.cpp scales each by alpha / rank, so where a module has another scale, the rest of it is in `.lora_b`.

    Raises Unwritable for DoRA, embeddings and experts, which llama.cpp does not apply.
    """
    for path, module in adapter_modules(live):
        kind = type(module).__name__
        if kind != "LoRALinear":
            raise Unwritable(f"{path} has an adapter of the kind {kind}, which llama.cpp cannot apply")
        name = layout.name(f"{path}.weight")
        a, b = lora_matrices(module, alpha)
        yield f"{name}.lora_a", a
        yield f"{name}.lora_b", layout.to_llama(name, b)


def lora_matrices(module: nn.Module, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """A (rank, in) and B (out, rank) of a LoRA module, float32: its change is alpha / rank * B @ A."""
    a, b = (np.ascontiguousarray(np.array(array.astype(mx.float32)).T) for array in (module.lora_a, module.lora_b))
    rest = module.scale * len(a) / alpha if alpha else 1.0
    return a, b if rest == 1 else b * np.float32(rest)


def encoded(rows: np.ndarray, wanted: str) -> tuple[np.ndarray, Any]:
    """A float32 tensor as it is stored in a file of the type `f32`, `f16`, `bf16` or `q8_0`, and its kind.

    Vectors stay float32; matrices whose rows do not fill the blocks of `q8_0` become float16.
    """
    import gguf

    kinds = gguf.GGMLQuantizationType
    kind = kinds[wanted.upper()]
    if rows.ndim == 1:
        return rows.astype(np.float32), kinds.F32
    if kind == kinds.Q8_0 and rows.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = kinds.F16
    return gguf.quants.quantize(rows, kind), kind


# The largest relative error of a value, or of a block's largest value, in a file of this type.
_ROUNDING = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 1 / 250}
_SMALLEST_F16 = 2.0**-24


def prove(path: Path, tensors: list[Tensor], layout: Layout, also: set[str]) -> int:
    """Read every tensor of a file back, in mlx's layout, and compare it with the trained one. Returns their number.

    Raises ModelError if one is missing, foreign, of another shape or further off than its type rounds. `also` are the
    names of tensors in the file that are no weights.
    """
    import gguf

    there = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    wanted = {tensor.name for tensor in tensors}
    if len(wanted) != len(tensors) or wanted | also != there.keys():
        different = sorted((wanted | also) ^ there.keys())
        raise ModelError(f"{path.name} does not have the weights of the model: {', '.join(different[:3])}.")
    for tensor in tensors:
        found = there[tensor.name]
        values = gguf.quants.dequantize(found.data, found.tensor_type).astype(np.float32)
        back = layout.to_mlx(tensor.name, values)
        trained = np.array(tensor.value())
        if back.shape != trained.shape:
            raise ModelError(f"{path.name}: {tensor.name} is {back.shape}, and {tensor.mlx_name} is {trained.shape}.")
        kind = found.tensor_type.name
        size = np.abs(trained) + (np.abs(trained).max(axis=-1, keepdims=True) if kind == "Q8_0" else 0)
        offset = 2.0**-23 if layout.family.norm_offset and tensor.name.endswith("norm.weight") else 0.0
        allowed = _ROUNDING[kind] * size + (_SMALLEST_F16 if kind != "F32" else offset * (1 + np.abs(trained)))
        if not (np.abs(back - trained) <= allowed).all():
            raise ModelError(f"{path.name}: {tensor.name} does not hold the values of {tensor.mlx_name}.")
    return len(tensors)
