"""Tiny models of families that support different forward passes, and folders that `load_model` can open."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

PLAIN: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**PLAIN, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6},
    "qwen3_moe": {
        **PLAIN,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "rope_theta": 1000,
        "max_position_embeddings": 1000,
        "norm_topk_prob": True,
    },
    "mamba": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "state_size": 8,
        "num_hidden_layers": 2,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
    "lfm2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1000,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 32,
        "block_ff_dim": 64,
        "block_multiple_of": 4,
        "block_ffn_dim_multiplier": 2,
        "block_auto_adjust_ff_dim": True,
        "layer_types": ["full_attention", "conv"],
        "rope_theta": 1000,
    },
    "recurrent_gemma": {
        "attention_bias": False,
        "conv1d_width": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "logits_soft_cap": 1.0,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-4,
        "rope_theta": 1000,
        "attention_window_size": 16,
        "block_types": ["recurrent", "attention"],
    },
    "afm7": {
        "hidden_dim": 32,
        "num_layers": 4,
        "num_hidden_layers": 4,
        "num_kv_reuse_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
    },
    # Past its window an answer sees one token less than training does.
    "plamo3": {**PLAIN, "head_dim": 8, "rope_theta": 1000.0, "window_size": 6, "sliding_window_pattern": 2},
    "gemma3n": {
        "num_hidden_layers": 4,
        "text_config": {
            "model_type": "gemma3n",
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "head_dim": 8,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 2,
            "num_kv_shared_layers": 2,
            "sliding_window": 8,
            "max_position_embeddings": 1000,
            "rope_local_base_freq": 1.0,
            "rope_theta": 1000.0,
            "final_logit_softcapping": 1.0,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.5] * 4,
            "hidden_size_per_layer_input": 16,
            "altup_num_inputs": 4,
            "altup_coef_clip": 1.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 8,
        },
    },
}


def family_config(family: str, vocabulary: int) -> dict[str, Any]:
    """The family's configuration for this vocabulary size."""
    config = {"model_type": family, **json.loads(json.dumps(FAMILIES[family])), "vocab_size": vocabulary}
    if "text_config" in config:
        config["text_config"] |= {"vocab_size": vocabulary, "vocab_size_per_layer_input": vocabulary}
    return config


def family_model(family: str, vocabulary: int = 61, seed: int = 0) -> nn.Module:
    """A model of random float32 weights; zero-initialized arrays are random too, so that differences show."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(family_config(family, vocabulary)))
    return randomized(model, seed)


def save_family(family: str, folder: Path, tokenizer_folder: Path) -> Path:
    """The family's model with the tokenizer of another folder."""
    folder.mkdir(parents=True)
    for file in tokenizer_folder.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copy(file, folder)
    vocabulary = json.loads((tokenizer_folder / "config.json").read_text())["vocab_size"]
    weights = dict(tree_flatten(family_model(family, vocabulary).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps({**family_config(family, vocabulary), "eos_token_id": 0}))
    return folder


def randomized(model: nn.Module, seed: int) -> nn.Module:
    """Give the model random float32 weights, also where mlx initializes to zero, so that differences show."""
    random = np.random.default_rng(seed)

    def shaken(array: mx.array) -> mx.array:
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        return array.astype(mx.float32) + mx.array(0.1 * random.normal(size=array.shape), mx.float32)

    model.update(tree_map(shaken, model.parameters()))
    mx.eval(model.parameters())
    model.eval()
    return model
