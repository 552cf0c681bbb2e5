"""A llama with a few thousand parameters, and rows for it, for every test that computes."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_nb.data.examples.imitation import TokenizedExample
from mlx_nb.model.mlx_lm_import import import_mlx_lm

import_mlx_lm()  # first, so that the limit of open files stays as it is

from mlx_lm.models import llama  # noqa: E402

VOCABULARY = 61


def tiny_model(seed: int = 0, *, tied: bool = True, dims: int = 32) -> llama.Model:
    """Two layers in float32, with weights large enough that gradients are not lost in rounding."""
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


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")


def tiny_rows(count: int = 24) -> list[dict]:
    """Chat rows with a pattern that a tiny model can pick up."""
    words = ("red", "green", "blue", "black", "white", "amber")
    return [
        {
            "messages": [
                {"role": "user", "content": f"say {words[row % 6]} {row}"},
                {"role": "assistant", "content": words[row % 6] * 2},
            ]
        }
        for row in range(count)
    ]


def save_tiny_model(folder: Path) -> Path:
    """A tiny llama with a byte-level tokenizer and chat template, as a folder that `mlx_lm.load` opens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [json.dumps(row) for row in tiny_rows()],
        trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    mx.random.seed(0)
    arguments = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(fast),
        "tie_word_embeddings": True,
    }
    model = llama.Model(llama.ModelArgs(**arguments))
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"}
    )
    (folder / "config.json").write_text(
        json.dumps({**arguments, "architectures": ["LlamaForCausalLM"], "eos_token_id": 0})
    )
    return folder


def tiny_pairs(count: int = 24) -> list[dict]:
    """Pairs of answers: the right word twice is better than the wrong word once."""
    words = ("red", "green", "blue", "black", "white", "amber")
    return [
        {"prompt": f"say {words[row % 6]} {row}", "chosen": words[row % 6] * 2, "rejected": words[(row + 1) % 6]}
        for row in range(count)
    ]


def tiny_labels(count: int = 24) -> list[dict]:
    """Answers with a label: the right word twice is good."""
    return [
        {"prompt": pair["prompt"], "completion": pair["chosen" if row % 2 else "rejected"], "label": bool(row % 2)}
        for row, pair in enumerate(tiny_pairs(count))
    ]


def tiny_prompts(count: int = 24) -> list[dict]:
    """Prompts with the wanted word as the answer, and an additional column."""
    words = ("red", "green", "blue", "black", "white", "amber")
    return [{"prompt": f"say {words[row % 6]}", "answer": words[row % 6], "level": row % 3} for row in range(count)]
