"""A llama of a few thousand parameters and rows for it: quick enough for every test that computes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx_lm.models import llama

from mlx_nb.data.examples import TokenizedExample

VOCABULARY = 61


def tiny_model(seed: int = 0, *, tied: bool = True, dims: int = 32) -> llama.Model:
    """Two layers, float32, weights large enough that gradients are not lost in rounding."""
    mx.random.seed(seed)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=dims,
            num_hidden_layers=2,
            intermediate_size=2 * dims,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=VOCABULARY,
            tie_word_embeddings=tied,
        )
    )
    mx.eval(model.parameters())
    return model


def random_examples(count: int, seed: int = 0, shortest: int = 5, longest: int = 20) -> list[TokenizedExample]:
    """Rows of random tokens whose second part is trained."""
    random = np.random.default_rng(seed)
    examples = []
    for row in range(count):
        length = int(random.integers(shortest, longest + 1))
        tokens = random.integers(1, VOCABULARY, length).astype(np.int32)
        loss_mask = np.zeros(length, np.float32)
        loss_mask[length // 2 :] = 1.0
        loss_mask[0] = 0.0
        examples.append(TokenizedExample(tokens, loss_mask, row))
    return examples
