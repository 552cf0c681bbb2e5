"""A llama with fixed weights, as a folder that mlx-lm and transformers open. Needs neither."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

WIDTH, HIDDEN, LAYERS, VOCABULARY = 16, 24, 3, 40
TOKENS = (3, 17, 5, 39, 0, 22, 11, 8)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "intermediate_size": HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": WIDTH // 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def write_fixed_llama(folder: Path, *, tied: bool) -> Path:
    """Write the model to `folder`."""
    half = WIDTH // 2
    shapes = {"model.embed_tokens": (VOCABULARY, WIDTH)} | ({} if tied else {"lm_head": (VOCABULARY, WIDTH)})
    for layer in range(LAYERS):
        inside = {
            "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.k_proj": (half, WIDTH),
            "self_attn.v_proj": (half, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH),
            "mlp.gate_proj": (HIDDEN, WIDTH),
            "mlp.up_proj": (HIDDEN, WIDTH),
            "mlp.down_proj": (WIDTH, HIDDEN),
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in inside.items()}
    weights = {
        f"{name}.weight": (0.4 * np.sin(np.arange(np.prod(shape)) * (1.7 + 0.37 * number)))
        .reshape(shape)
        .astype(np.float32)
        for number, (name, shape) in enumerate(shapes.items())
    }
    norms = [
        f"model.layers.{layer}.{name}"
        for layer in range(LAYERS)
        for name in ("input_layernorm", "post_attention_layernorm")
    ]
    weights |= {f"{name}.weight": np.ones(WIDTH, np.float32) for name in [*norms, "model.norm"]}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": tied}))
    return folder
