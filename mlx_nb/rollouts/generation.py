"""Text from the live model, with its adapter or without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from mlx_nb.data.prompt_examples import prompt_tokens
from mlx_nb.data.rendering import AS_USUAL, Rendering
from mlx_nb.model.adapters import without_adapters
from mlx_nb.model.randomness import random_stream, seed_for

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Messages

# Rows decoded side by side: enough to keep matrix products busy, few enough for a small machine's memory.
_ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Question:
    """What a person asks the live model: a text, or the texts of a chat, and who is told the answer as it grows.

    `told(text so far, whether it is complete)` is called after each token.
    """

    messages: Prompt
    told: Callable[[str, bool], None]
    base: bool = False
    max_tokens: int = 256


def generate_texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    base: bool,
    max_tokens: int,
    temperature: float,
    seed: int,
    rendering: Rendering = AS_USUAL,
) -> list[str]:
    """One answer per prompt, through mlx-lm's generators: one prompt alone, several side by side.

    A prompt is a list of messages, or a text: a user message, or where `rendering` says raw a text to be continued.
    `base` switches the adapter off. The model's adapter and the user's random stream are as before afterwards.
    """
    from mlx_lm import generate
    from mlx_lm.generate import batch_generate
    from mlx_lm.sample_utils import make_sampler

    model.eval()
    tokens = [prompt_tokens(tokenizer, prompt, rendering=rendering) for prompt in prompts]
    sampler = make_sampler(temp=temperature)
    with without_adapters(model) if base else nullcontext(), random_stream(seed_for(seed, "generate")):
        if len(tokens) == 1:
            return [generate(model, tokenizer, prompt=tokens[0], max_tokens=max_tokens, sampler=sampler)]
        return batch_generate(
            model,
            tokenizer,
            tokens,
            max_tokens=max_tokens,
            sampler=sampler,
            completion_batch_size=_ROWS_AT_ONCE,
            prefill_batch_size=_ROWS_AT_ONCE,
        ).texts


def stream_text(
    model: nn.Module, tokenizer: Any, prompt: Prompt, max_tokens: int, rendering: Rendering = AS_USUAL
) -> Iterator[str]:
    """The greedy answer to one prompt as it grows: all of it so far, after each token."""
    from mlx_lm import stream_generate

    text = ""
    tokens = prompt_tokens(tokenizer, prompt, rendering=rendering)
    for part in stream_generate(model, tokenizer, tokens, max_tokens=max_tokens):
        text += part.text
        yield text
