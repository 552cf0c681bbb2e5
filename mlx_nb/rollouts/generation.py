"""Text from the live model, with or without its adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import mlx.nn as nn
import numpy as np

from mlx_nb.data.examples.prompt import prompt_tokens
from mlx_nb.data.masks.prompt_format import DEFAULT_RENDERING, Rendering
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.data.rows.columns import AUTOMATIC
from mlx_nb.errors import CommandError
from mlx_nb.model.limits import limits_of
from mlx_nb.model.passes import cache_mismatch_note
from mlx_nb.model.randomness import seed_for
from mlx_nb.rollouts.sampling import SamplingSettings, sample_each

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Messages


def generate_texts(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    rendering: Rendering = DEFAULT_RENDERING,
    tools: Sequence[Any] | None = None,
    roles: Mapping[str, str] = AUTOMATIC.roles,
    on_texts: Callable[[list[str]], None] | None = None,
) -> list[str]:
    """Generate one answer per prompt; each is what its prompt alone gives, up to rounding.

    A prompt is a list of messages, or a text: a user message, or with a raw `rendering` a text to be continued.
    Messages, `tools` and `roles` are read and rendered like those of rows. Above temperature 0 the first answer is the
    one that its prompt alone gives, and a repeated prompt gets different answers. `on_texts` is called repeatedly with
    the answers so far, in whole characters. The model's modes and the user's random stream are restored afterwards. An
    answer ends at the last learned position. Raises DataError for a prompt without tokens or with tokens that the model
    cannot read, CommandError if `max_tokens` is below 1.
    """
    from mlx_lm.generate import wired_limit

    if max_tokens < 1:
        raise CommandError(f"cannot answer in {max_tokens} tokens. Give max_tokens of 1 or more.")
    tokens = [prompt_tokens(tokenizer, prompt, tools, rendering, roles) for prompt in prompts]
    room = _room(model, tokens, max_tokens)
    _warn_about_doubt(model)
    with wired_limit(model):
        settings = SamplingSettings(max_tokens, temperature)
        growing = [_GrowingText(tokenizer) for _ in prompts]
        on_tokens = None if on_texts is None else _token_callback(growing, on_texts)
        completions = sample_each(model, tokenizer, tokens, settings, seed_for(seed, "generate"), room, on_tokens)
    return [text.of(completion.tokens.tolist(), whole=True) for text, completion in zip(growing, completions)]


def _token_callback(growing: Sequence[_GrowingText], on_texts: Callable[[list[str]], None]) -> Callable[..., None]:
    def on_tokens(tokens: list[list[int]]) -> None:
        on_texts([text.of(some) for text, some in zip(growing, tokens)])

    return on_tokens


class _GrowingText:
    """An answer as `stream_text` gives it: without the end token, decoded by mlx-lm's streaming detokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._ends = tokenizer.eos_token_ids
        self._detokenizer = tokenizer.detokenizer
        self._read = 0

    def of(self, tokens: Sequence[int], *, whole: bool = False) -> str:
        """The text of all tokens so far, continuing where the last call ended; `whole` if no more will come."""
        for token in tokens[self._read :]:
            if token not in self._ends:
                self._detokenizer.add_token(token)
        self._read = len(tokens)
        if whole:
            self._detokenizer.finalize()
        result: str = self._detokenizer.text
        return result


def stream_text(
    model: nn.Module, tokenizer: Tokenizer, prompt: Prompt, max_tokens: int, rendering: Rendering = DEFAULT_RENDERING
) -> Iterator[str]:
    """The greedy answer to one prompt as it grows: all of it so far, after each token.

    Raises as `generate_texts` does.
    """
    from mlx_lm import stream_generate

    _warn_about_doubt(model)
    text = ""
    tokens = prompt_tokens(tokenizer, prompt, rendering=rendering)
    (room,) = _room(model, [tokens], max_tokens)
    for part in stream_generate(model, cast(Any, tokenizer), tokens, max_tokens=room):
        text += part.text
        yield text


def _warn_about_doubt(model: nn.Module) -> None:
    if (note := cache_mismatch_note(model)) is not None:
        warnings.warn(note, stacklevel=4)  # the user's line that called the run


def _room(model: nn.Module, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[int]:
    """The limit for each answer: `max_tokens`, or the number of positions that the model has left."""
    limits = limits_of(model)
    for number, tokens in enumerate(prompts):
        limits.require(np.asarray(tokens), more=1, name="the prompt" if len(prompts) == 1 else f"prompt {number}")
    if limits.positions is None:
        return [max_tokens] * len(prompts)
    return [min(max_tokens, limits.positions - len(tokens)) for tokens in prompts]
