"""Converts a GGUF file to an mlx-lm folder: weights, configuration, tokenizer and chat template.

Q4_0, Q4_1 and Q8_0 blocks are equivalent to MLX's affine quantization (groups of 32, value = scale * q + bias), so they
are repacked without loss. Every other type is dequantized by the `gguf` package.

Names and values are converted back from llama.cpp's layout (`convert_hf_to_gguf.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_nb.errors import ModelError
from mlx_nb.files.cache_folder import make_once
from mlx_nb.model.gguf.tokenizer import build_tokenizer, end_of_turn_ids

GROUP_SIZE = 32
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_LAYER_NAMES = {
    **_LAYER_NAMES,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class Packed(NamedTuple):
    """An affine quantized matrix: `weight` (rows, cols * bits / 32) uint32, `scales` and `biases` (rows, cols / 32)."""

    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    bits: int


class Architecture(NamedTuple):
    """The conversion of one llama.cpp architecture.

    `rope_interleaved`: q and k rows are interleaved in pairs for llama.cpp's rope. `norm_offset`: subtracted from norm
    weights, because llama.cpp stores them with 1 added if the model adds 1. `wide`: activations exceed the range of
    float16, so bfloat16 must be used as half precision.
    """

    model_type: str
    names: Mapping[str, str]
    rope_interleaved: bool = False
    norm_offset: float = 0.0
    wide: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", _LAYER_NAMES, rope_interleaved=True),
    "qwen2": Architecture("qwen2", _LAYER_NAMES),
    "qwen3": Architecture("qwen3", _LAYER_NAMES),
    "gemma3": Architecture("gemma3_text", _GEMMA_LAYER_NAMES, norm_offset=1.0, wide=True),
}


def convert_gguf(path: Path, folder: Path) -> Path:
    """Convert `path` to an mlx-lm folder that `mlx_lm.load` opens. Returns `folder`; a complete one is not changed.

    The folder is created atomically, also if several processes convert at once. Raises ModelError, in one line, for a
    file that is not GGUF, for an unsupported architecture, tensor or tokenizer, and if the folder cannot be written.
    """
    try:
        return make_once(folder, lambda work: write_model(path, work / "model"))
    except OSError as error:
        raise ModelError(
            f"{folder} cannot be written: {_reason(error)}. Free some space, or choose another folder (MLX_NB_CACHE)."
        ) from None


def write_model(path: Path, target: Path) -> Path:
    """Write `path` as an mlx-lm folder at `target`. Returns `target`.

    Raises ModelError as `convert_gguf` does, and OSError when the folder cannot be written.
    """
    metadata, tensors = _read(path)
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ModelError(f"{path}: architecture {name!r} is not supported; supported are {', '.join(ARCHITECTURES)}.")
    architecture = ARCHITECTURES[name]
    try:
        config = _config(metadata, architecture, name, tensors)
        tokenizer = build_tokenizer(metadata)
        weights, quantization = _weights(tensors, config, architecture)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ModelError(f"{path} is incomplete: {_reason(error)}. Is the download complete?") from None
    if quantization:
        config["quantization"] = quantization
        config["quantization_config"] = quantization
    try:
        target.mkdir()
        tokenizer.save_pretrained(target)
        mx.save_safetensors(str(target / "model.safetensors"), weights, metadata={"format": "mlx"})
        (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    except Exception as error:  # tokenizers raises Exception itself if its file cannot be written
        raise OSError(_reason(error)) from None
    return target


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metadata as plain values, and the tensors by name."""
    import gguf

    try:
        reader = gguf.GGUFReader(str(path))
        metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    except (ValueError, OSError, IndexError, KeyError, AttributeError, TypeError, OverflowError) as error:
        raise ModelError(
            f"{path} cannot be read as a GGUF file ({_reason(error)}). Is the download complete?"
        ) from None
    if metadata.get("split.count", 0) > 1:
        raise ModelError(
            f"{path} is one of {metadata['split.count']} parts. Merge them first with llama-gguf-split --merge."
        )
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{text} is missing" if isinstance(error, KeyError) else text or type(error).__name__


def _config(
    metadata: Mapping[str, Any], architecture: Architecture, name: str, tensors: Mapping[str, Any]
) -> dict[str, Any]:
    def value(key: str, default: Any = None) -> Any:
        found = metadata.get(f"{name}.{key}", default)
        if found is None:
            raise ModelError(f"the setting {name}.{key} is missing.")
        return found

    for key in ("attention.head_count", "embedding_length", "block_count", "feed_forward_length"):
        if not isinstance(count := value(key), int) or count < 1:
            raise ModelError(f"the setting {name}.{key} is {count!r}, but it must be 1 or more.")
    heads = value("attention.head_count")
    head_dim = metadata.get(f"{name}.attention.key_length", value("embedding_length") // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if value(key, head_dim) != head_dim:
            raise ModelError(
                f"{name}.{key} is {value(key)}, but heads have {head_dim}; only equal sizes are supported."
            )
    stop = end_of_turn_ids(metadata)
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "hidden_size": value("embedding_length"),
        "num_hidden_layers": value("block_count"),
        "intermediate_size": value("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "rope_theta": value("rope.freq_base", 10000.0),
        "max_position_embeddings": value("context_length", 2048),
        "tie_word_embeddings": "output.weight" not in tensors,
        "eos_token_id": stop[0] if len(stop) == 1 else stop,
    }
    scaling = _rope_scaling(metadata, name, tensors, config)
    if scaling:
        config["rope_scaling"] = scaling
    if name == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    if name == "gemma3":
        config["rope_local_base_freq"] = 10000.0
        config["sliding_window"] = value("attention.sliding_window", 512)
        config["sliding_window_pattern"] = 6
        # Only the 27B model, with 62 layers, scales its queries by hidden_size / heads.
        share = config["hidden_size"] // heads
        config["query_pre_attn_scalar"] = share if config["num_hidden_layers"] == 62 else head_dim
    return config


def _rope_scaling(
    metadata: Mapping[str, Any], name: str, tensors: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any] | None:
    kind = metadata.get(f"{name}.rope.scaling.type", "none")
    if kind == "linear":
        return {"type": "linear", "rope_type": "linear", "factor": metadata[f"{name}.rope.scaling.factor"]}
    if kind != "none":
        raise ModelError(f"rope scaling {kind!r} is not supported; supported are none, linear and llama3.")
    if "rope_freqs.weight" not in tensors:
        return None
    factors = np.asarray(tensors["rope_freqs.weight"].data, dtype=np.float64).ravel()
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if not np.allclose(llama3_factors(scaling, config), factors, rtol=1e-3):
        raise ModelError("the rope frequency factors are not those of Llama 3; others are not supported.")
    return scaling


def llama3_factors(scaling: Mapping[str, Any], config: Mapping[str, Any]) -> np.ndarray:
    """The divisor of each frequency in llama3 rope scaling, to verify the factors in a file."""
    exponents = np.arange(0, config["head_dim"], 2) / config["head_dim"]
    wavelengths = 2 * math.pi * config["rope_theta"] ** exponents
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (original / wavelengths - low) / (high - low)
    middle = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelengths > original / low, factor, middle)
    return np.where(wavelengths < original / high, 1.0, factors)


def _weights(
    tensors: Mapping[str, Any], config: Mapping[str, Any], architecture: Architecture
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Arrays by mlx-lm's names, and the `quantization` section of the configuration (empty if all are floats)."""
    dtype = _float_type(tensors, architecture)
    weights: dict[str, mx.array] = {}
    bits: dict[str, int] = {}
    for name, tensor in tensors.items():
        if name == "rope_freqs.weight":
            continue
        module, leaf = _module_name(name, architecture)
        value = decode_tensor(tensor)
        if architecture.rope_interleaved and module.endswith(("q_proj", "k_proj")):
            heads = config["num_attention_heads" if module.endswith("q_proj") else "num_key_value_heads"]
            value = _map_rows(value, partial(half_by_half, heads=heads))
        if isinstance(value, Packed):
            bits[module] = value.bits
            weights[f"{module}.weight"] = mx.array(value.weight)
            weights[f"{module}.scales"] = mx.array(value.scales).astype(dtype)
            weights[f"{module}.biases"] = mx.array(value.biases).astype(dtype)
        else:
            if module.endswith("norm"):
                value = value - architecture.norm_offset
            weights[f"{module}.{leaf}"] = mx.array(value).astype(dtype)
    if not bits:
        return weights, {}
    most = max(set(bits.values()), key=list(bits.values()).count)
    quantization: dict[str, Any] = {"group_size": GROUP_SIZE, "bits": most, "mode": "affine"}
    for module, count in bits.items():
        if count != most:
            quantization[module] = {"group_size": GROUP_SIZE, "bits": count, "mode": "affine"}
    return weights, quantization


def _float_type(tensors: Mapping[str, Any], architecture: Architecture) -> mx.Dtype:
    """The dtype of the converted floats: float32 if all matrices are F32, otherwise a half precision."""
    kinds = {tensor.tensor_type.name for tensor in tensors.values() if len(tensor.shape) > 1}
    if kinds == {"F32"}:
        return mx.float32
    return mx.bfloat16 if architecture.wide or "BF16" in kinds else mx.float16


def _module_name(name: str, architecture: Architecture) -> tuple[str, str]:
    stem, _, leaf = name.rpartition(".")
    if stem in _TOP_NAMES:
        return _TOP_NAMES[stem], leaf
    _, _, layer_and_part = stem.partition("blk.")
    layer, _, part = layer_and_part.partition(".")
    if part in architecture.names:
        return f"model.layers.{layer}.{architecture.names[part]}", leaf
    raise ModelError(
        f"tensor {name!r} does not belong to a {architecture.model_type} model; variants are not supported."
    )


def decode_tensor(tensor: Any) -> Packed | np.ndarray:
    """A tensor of a GGUFReader: packed if MLX has the same quantization, otherwise float32.

    Raises ModelError for a type that the `gguf` package cannot dequantize.
    """
    import gguf

    kind = tensor.tensor_type
    if kind in _PACKERS:
        blocks = np.ascontiguousarray(tensor.data).view(np.uint8)
        return _PACKERS[kind](blocks.reshape(blocks.shape[0], -1, gguf.GGML_QUANT_SIZES[kind][1]))
    try:
        values = gguf.quants.dequantize(tensor.data, kind)
    except NotImplementedError:
        raise ModelError(f"tensor {tensor.name} is of type {kind.name}, which cannot be dequantized.") from None
    return values.astype(np.float32)


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """(rows, groups) float16 at byte `at` of every block."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0]


def _nibbles(data: np.ndarray) -> np.ndarray:
    """Expand 16 bytes per block to 32 values: first the low nibbles, then the high nibbles."""
    return np.concatenate([data & 0x0F, data >> 4], axis=-1)


def _pack(values: np.ndarray, bits: int) -> np.ndarray:
    """(rows, groups, 32) uint8 to (rows, cols * bits / 32) uint32, the first value in the lowest bits."""
    flat = values.reshape(values.shape[0], -1)
    if bits == 4:
        flat = flat[:, 0::2] | (flat[:, 1::2] << 4)
    return np.ascontiguousarray(flat).view(np.uint32)


def _from_q4_0(blocks: np.ndarray) -> Packed:
    scales = _halves(blocks, 0)
    return Packed(_pack(_nibbles(blocks[..., 2:18]), 4), scales, -8 * scales, 4)


def _from_q4_1(blocks: np.ndarray) -> Packed:
    return Packed(_pack(_nibbles(blocks[..., 4:20]), 4), _halves(blocks, 0), _halves(blocks, 2), 4)


def _from_q8_0(blocks: np.ndarray) -> Packed:
    scales = _halves(blocks, 0)
    return Packed(_pack(blocks[..., 2:34] ^ 0x80, 8), scales, -128 * scales, 8)


_PACKERS: dict[int, Callable[[np.ndarray], Packed]] = {2: _from_q4_0, 3: _from_q4_1, 8: _from_q8_0}


def _map_rows(value: Packed | np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> Packed | np.ndarray:
    if isinstance(value, Packed):
        return Packed(change(value.weight), change(value.scales), change(value.biases), value.bits)
    return change(value)


def half_by_half(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of each head from pairs (x0 y0 x1 y1 ...) to halves (x0 x1 ... y0 y1 ...) for mlx's rope."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows.shape))
