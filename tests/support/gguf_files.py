"""Creates small GGUF files, with the float32 values of their tensors."""

from __future__ import annotations

import gguf
import mlx.core as mx
import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

Q = gguf.GGMLQuantizationType
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FEED_FORWARD = 256, 4, 2, 64, 512
LAYERS = {"llama": 2, "qwen2": 2, "qwen3": 2, "gemma3": 6}  # the sixth of a gemma3 is its first of full attention
PRE = {"llama": "smollm", "qwen2": "qwen2", "qwen3": "qwen2", "gemma3": None}


# The names of a layer's parts: llama.cpp's, then mlx-lm's.
MATRICES = {
    "attn_q": ("self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN),
    "attn_k": ("self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": ("self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": ("self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM),
    "ffn_gate": ("mlp.gate_proj", FEED_FORWARD, HIDDEN),
    "ffn_up": ("mlp.up_proj", FEED_FORWARD, HIDDEN),
    "ffn_down": ("mlp.down_proj", HIDDEN, FEED_FORWARD),
}

NORMS = {
    "llama": {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    "gemma3": {
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}


def byte_level_metadata(pre: str, *, architecture: str = "llama") -> dict:
    """A vocabulary of all bytes, a few merges and three control tokens."""
    alphabet = list(bytes_to_unicode().values())
    merges = ["t h", "th e", "Ġ the", "1 2", "Ã ©"]
    tokens = [*alphabet, *[merge.replace(" ", "") for merge in merges], "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens.append("<tool>")
    return {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 4) + [3, 3, 3, 4],
        "tokenizer.ggml.bos_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
    }


def sentencepiece_metadata(*, architecture: str = "llama", add_space_prefix: bool = True) -> dict:
    """Scores rank the merges; bytes outside the vocabulary fall back to `<0x..>` tokens."""
    pieces = {"▁the": -1.0, "he": -2.0, "▁t": -3.0, "▁▁": -4.0, "th": -5.0, "the": -6.0}
    letters = {letter: -100.0 - index for index, letter in enumerate("▁etha12cors")}
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *pieces, *letters, "<end_of_turn>"]
    return {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [*pieces.values(), *letters.values(), 0.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(pieces) + len(letters)) + [3],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": add_space_prefix,
    }


def tokenizer_metadata(architecture: str) -> dict:
    pre = PRE[architecture]
    if pre is None:
        return sentencepiece_metadata(architecture=architecture, add_space_prefix=False)
    return byte_level_metadata(pre, architecture=architecture)


def model_settings(architecture: str) -> dict:
    return {
        f"{architecture}.{key}": value
        for key, value in {
            "embedding_length": HIDDEN,
            "block_count": LAYERS[architecture],
            "feed_forward_length": FEED_FORWARD,
            "attention.head_count": HEADS,
            "attention.head_count_kv": KV_HEADS,
            "attention.key_length": HEAD_DIM,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "rope.freq_base": 20000.0,
            "context_length": 512,
            "attention.sliding_window": 4,
        }.items()
    }


def write_metadata(writer: gguf.GGUFWriter, metadata: dict) -> None:
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def write_gguf(path, metadata: dict, tensors: dict):
    """`tensors`: name to (array as stored, type or None for the array's own)."""
    writer = gguf.GGUFWriter(str(path), metadata["general.architecture"])
    write_metadata(writer, metadata)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored(values: np.ndarray, kind: Q, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The array to store as `kind`, and its float32 values."""
    if kind == Q.F32:
        return values, values
    if kind == Q.F16:
        return values.astype(np.float16), values.astype(np.float16).astype(np.float32)
    if kind in (Q.Q4_K, Q.Q6_K):  # the gguf package reads these kinds but does not write them: draw valid blocks
        block, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (*values.shape[:-1], values.shape[-1] // block, size)).astype(np.uint8)
        scale = np.frombuffer(np.float16(1e-4).tobytes(), np.uint8)
        for at in (0, 2) if kind == Q.Q4_K else (size - 2,):
            blocks[..., at : at + 2] = scale
        array = blocks.reshape(*values.shape[:-1], -1)
    else:
        array = gguf.quants.quantize(values, kind)
    return array, gguf.quants.dequantize(array, kind)


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp stores q and k of a llama: x0 y0 x1 y1 ... in each head, from x0 x1 ... y0 y1 ..."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def synthetic(
    path,
    architecture: str,
    kind: Q,
    *,
    embedding: Q | None = None,
    untied: bool = False,
    biases: bool = False,
    settings: dict | None = None,
    rope_factors: np.ndarray | None = None,
):
    """Write a random model, and return its float32 values by mlx-lm's names."""
    random = np.random.default_rng(0)
    metadata = {**tokenizer_metadata(architecture), **model_settings(architecture), **(settings or {})}
    vocabulary = len(metadata["tokenizer.ggml.tokens"])
    tensors = {} if rope_factors is None else {"rope_freqs.weight": (rope_factors, None)}
    reference: dict[str, np.ndarray] = {}
    biased = {"qwen2": {"attn_q", "attn_k", "attn_v"}, "llama": MATRICES.keys() if biases else set()}

    def matrix(source: str, target: str, rows: int, columns: int, kind: Q, heads: int = 0) -> None:
        array, values = stored((random.standard_normal((rows, columns)) * 0.06).astype(np.float32), kind, random)
        if heads:  # the stored rows are interleaved whatever they hold; undo it here by the inverse
            order = np.argsort(interleaved(np.arange(rows), heads))
            values = values[order]
        tensors[source], reference[target] = (array, None if array.dtype != np.uint8 else kind), values

    def vector(source: str, target: str, size: int, center: float, offset: float = 0.0) -> None:
        values = (center + 0.1 * random.standard_normal(size)).astype(np.float32)
        tensors[source], reference[target] = (values + np.float32(offset), None), values

    gemma = architecture == "gemma3"
    center, offset = (0.0, 1.0) if gemma else (1.0, 0.0)
    matrix("token_embd.weight", "model.embed_tokens.weight", vocabulary, HIDDEN, embedding or kind)
    vector("output_norm.weight", "model.norm.weight", HIDDEN, center, offset)
    if untied:
        matrix("output.weight", "lm_head.weight", vocabulary, HIDDEN, kind)
    for layer in range(LAYERS[architecture]):
        source, target = f"blk.{layer}", f"model.layers.{layer}"
        for name, (module, rows, columns) in MATRICES.items():
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name, 0) if architecture == "llama" else 0
            matrix(f"{source}.{name}.weight", f"{target}.{module}.weight", rows, columns, kind, heads)
            if name in biased.get(architecture, ()):
                vector(f"{source}.{name}.bias", f"{target}.{module}.bias", rows, 0.0)
                if heads:
                    values, _ = tensors[f"{source}.{name}.bias"]
                    tensors[f"{source}.{name}.bias"] = interleaved(values, heads), None
        for name, module in NORMS.get(architecture, NORMS["llama"]).items():
            vector(f"{source}.{name}.weight", f"{target}.{module}.weight", HIDDEN, center, offset)
        if architecture in ("qwen3", "gemma3"):
            for name in ("q_norm", "k_norm"):
                vector(f"{source}.attn_{name}.weight", f"{target}.self_attn.{name}.weight", HEAD_DIM, center, offset)
    write_gguf(path, metadata, tensors)
    return reference, vocabulary


def float_weights(model) -> dict[str, np.ndarray]:
    """Every weight and bias of a loaded model as float32, dequantized."""
    found = {}
    for path, module in model.named_modules():
        if "scales" in module:
            found[f"{path}.weight"] = mx.dequantize(
                module.weight,
                module.scales.astype(mx.float32),
                module.biases.astype(mx.float32),
                group_size=module.group_size,
                bits=module.bits,
            )
        elif "weight" in module:
            found[f"{path}.weight"] = module.weight
        if "bias" in module:
            found[f"{path}.bias"] = module.bias
    return {name: np.array(array.astype(mx.float32)) for name, array in found.items()}
