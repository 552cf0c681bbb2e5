"""Compares a GGUF file in the real llama.cpp with the live model: tokens, end tokens and logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_nb.errors import ModelError
from mlx_nb.export.gguf_tokenizer import end_tokens, plain_tokenizer
from mlx_nb.export.llama_cpp import llama_cpp_folder, run_llama_cpp

# The largest mean KL divergence in nats from mlx's next-token distribution for a file of this type to be correct.
# Rounding alone gives less than a tenth of it, and a wrong layout more than 1.
MOST_KL = {"f32": 0.02, "f16": 0.02, "bf16": 0.05, "q8_0": 0.1}
MOST_KL_OF_OTHERS = 1.0
_TEXTS = (
    "Hello, world!",
    " Two  spaces,\n\ttabs\n\n and 12345 digits",
    "Über 東京 \U0001f600 don't",
    "<|x|> [INST] {a}",
)


@dataclass(frozen=True)
class Checked:
    """What llama.cpp computed from a file, compared with mlx: means over `positions` tokens.

    kl         KL divergence of the next-token distribution, in nats
    agreement  how often the likeliest token is the same, 0 to 1
    """

    kl: float
    agreement: float
    positions: int

    def __str__(self) -> str:
        same = f"the same likeliest token at {self.agreement:.0%} of {self.positions} positions"
        return f"KL divergence {self.kl:.1g} nats, {same}"


def checked_by_llama_cpp(model: nn.Module, tokenizer: Any, job: dict[str, Any], most_kl: float) -> Checked | None:
    """Compare a file in llama.cpp with the live model: tokens, end tokens and logits. None without llama.cpp.

    Raises ModelError if they differ.
    """
    if llama_cpp_folder() is None:
        return None
    fast = plain_tokenizer(tokenizer)
    texts, ends = _texts(tokenizer), end_tokens(tokenizer)
    tokens = [fast(text, add_special_tokens=False)["input_ids"] for text in texts]
    found = run_llama_cpp({**job, "texts": texts, "tokens": [ids for ids in tokens if ids], "ends": ends})
    name = Path(job.get("adapter") or job["model"]).name
    for number, (text, wanted) in enumerate(zip(texts, tokens)):
        if found[f"text-{number}"].tolist() != list(wanted):
            raise ModelError(
                f"{name}: llama.cpp splits {text[:40]!r} into tokens that differ from those of the model's tokenizer."
            )
    if not found["ends"].all():
        wrong = fast.convert_ids_to_tokens([ends[int(found["ends"].argmin())]])
        raise ModelError(f"{name}: llama.cpp does not end an answer at {wrong[0]}, as the model was trained to.")
    kls, same = [], []
    for number, ids in enumerate(one for one in tokens if one):
        ours = np.array(model(mx.array([ids]))[0].astype(mx.float32))
        kl, agree = compare(ours, found[f"logits-{number}"])
        kls += kl.tolist()
        same += agree.tolist()
    checked = Checked(float(np.mean(kls)), float(np.mean(same)), len(kls))
    if not checked.kl <= most_kl:
        raise ModelError(f"{name}: llama.cpp does not compute what mlx computes: {checked}. It was not kept.")
    return checked


def _texts(tokenizer: Any) -> list[str]:
    """The texts to compare: plain ones and, if there is a chat template, a conversation."""
    fast = plain_tokenizer(tokenizer)
    if not getattr(fast, "chat_template", None):
        return list(_TEXTS)
    try:
        messages = [{"role": "user", "content": "Hello, who are you?"}]
        return [*_TEXTS, str(fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))]
    except Exception:  # a template may refuse a conversation in any way
        return list(_TEXTS)


def compare(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(T,) KL divergence in nats of two (T, V) logits, and (T,) whether the likeliest token is the same."""

    def logprobs(logits: np.ndarray) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
        result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        return result

    one, other = logprobs(ours), logprobs(theirs[:, : ours.shape[-1]])
    return (np.exp(one) * (one - other)).sum(axis=-1), one.argmax(axis=-1) == other.argmax(axis=-1)
