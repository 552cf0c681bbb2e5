"""Text from the live model, with its adapter or without."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import mlx.nn as nn
import numpy as np

from mlx_nb.data.examples.prompt import prompt_tokens
from mlx_nb.data.masks.prompt_format import AS_USUAL, Rendering
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.data.rows.columns import AUTOMATIC
from mlx_nb.errors import CommandError
from mlx_nb.model.limits import limits_of
from mlx_nb.model.passes import doubt_note
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
    rendering: Rendering = AS_USUAL,
    tools: Sequence[Any] | None = None,
    roles: Mapping[str, str] = AUTOMATIC.roles,
    on_texts: Callable[[list[str]], None] | None = None,
) -> list[str]:
    """One answer per prompt: those of a list are what each prompt alone gives, to rounding.

    A prompt is a list of messages, or a text: a user message, or where `rendering` says raw a text to be continued.
    Messages, `tools` and `roles` are read and rendered like those of rows. Above temperature 0 the first of a list is
    what its prompt alone gives, and a prompt that is repeated gets other answers. `on_texts` is told the answers so
    far, in whole characters, again and again. The model's modes and the user's random stream are as before afterwards.
    An answer ends where the model's learned positions do. Raises DataError for a prompt without tokens or with what
    the model cannot read, CommandError for no tokens to say.
    """
    from mlx_lm.generate import wired_limit

    if max_tokens < 1:
        raise CommandError(f"cannot answer in {max_tokens} tokens. Give max_tokens of 1 or more.")
    tokens = [prompt_tokens(tokenizer, prompt, tools, rendering, roles) for prompt in prompts]
    room = _room(model, tokens, max_tokens)
    _tell_doubt(model)
    with wired_limit(model):
        settings = SamplingSettings(max_tokens, temperature)
        growing = [_GrowingText(tokenizer) for _ in prompts]
        told = None if on_texts is None else _telling(growing, on_texts)
        completions = sample_each(model, tokenizer, tokens, settings, seed_for(seed, "generate"), room, told)
    return [text.of(completion.tokens.tolist(), whole=True) for text, completion in zip(growing, completions)]


def _telling(growing: Sequence[_GrowingText], on_texts: Callable[[list[str]], None]) -> Callable[..., None]:
    def on_tokens(tokens: list[list[int]]) -> None:
        on_texts([text.of(some) for text, some in zip(growing, tokens)])

    return on_tokens


class _GrowingText:
    """An answer as `stream_text` has it: without the end token, in the words of mlx-lm's streaming detokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._ends = tokenizer.eos_token_ids
        self._detokenizer = tokenizer.detokenizer
        self._read = 0

    def of(self, tokens: Sequence[int], *, whole: bool = False) -> str:
        """The text of all tokens so far, of which it has read the first; `whole` when no more will come."""
        for token in tokens[self._read :]:
            if token not in self._ends:
                self._detokenizer.add_token(token)
        self._read = len(tokens)
        if whole:
            self._detokenizer.finalize()
        result: str = self._detokenizer.text
        return result


def stream_text(
    model: nn.Module, tokenizer: Tokenizer, prompt: Prompt, max_tokens: int, rendering: Rendering = AS_USUAL
) -> Iterator[str]:
    """The greedy answer to one prompt as it grows: all of it so far, after each token. Raises as `generate_texts`."""
    from mlx_lm import stream_generate

    _tell_doubt(model)
    text = ""
    tokens = prompt_tokens(tokenizer, prompt, rendering=rendering)
    (room,) = _room(model, [tokens], max_tokens)
    for part in stream_generate(model, cast(Any, tokenizer), tokens, max_tokens=room):
        text += part.text
        yield text


def _tell_doubt(model: nn.Module) -> None:
    if (note := doubt_note(model)) is not None:
        warnings.warn(note, stacklevel=4)  # the line that asked the run


def _room(model: nn.Module, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[int]:
    """How many tokens each answer may have: `max_tokens`, or as many as the model has positions left."""
    limits = limits_of(model)
    for number, tokens in enumerate(prompts):
        limits.require(np.asarray(tokens), more=1, name="the prompt" if len(prompts) == 1 else f"prompt {number}")
    if limits.positions is None:
        return [max_tokens] * len(prompts)
    return [min(max_tokens, limits.positions - len(tokens)) for tokens in prompts]
