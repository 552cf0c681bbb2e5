"""Samples completions from the live model, with the log-probability of each token as drawn.

Each prompt is processed once and alone; its keys and values start every row of its group. What all prompts begin with,
such as a system prompt, is processed once where the model is proved to support it. Rows are decoded side by side in
mlx-lm's batch caches as far as the model is proved to support it: rows of any length, where one that has ended makes
room for the next; rows of equal length that start together; or one row after another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.errors import DataError, ModelError
from mlx_nb.model.backend import is_cpu
from mlx_nb.model.once_per_model import evaluating
from mlx_nb.model.passes import SideBySide, can_share_prefix, merged, side_by_side, unbatchable
from mlx_nb.model.randomness import seed_for
from mlx_nb.rollouts.completion_rows import Completion, Endings, Row, Waiting
from mlx_nb.rollouts.token_sampling import draw_tokens

_ROWS_AT_ONCE = 32
_PROMPT_TOKENS_AT_ONCE = 2048
_FEWEST_SHARED = 128  # tokens saved by sharing a prefix; the proof costs about as much as 100


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are drawn; see `draw_tokens` for temperature, top_k and top_p.

    max_tokens  maximum length of a completion, including the end token
    stop        a completion ends when its text contains one of these
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    stop: tuple[str, ...] = ()


def sample_groups(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    group_size: int,
    settings: SamplingSettings,
    seed: int,
    *,
    rows_at_once: int = _ROWS_AT_ONCE,
) -> Generator[int, None, list[Completion]]:
    """`group_size` completions of each prompt (tokens), prompt 0's first; yields the number of tokens drawn so far.

    It can be closed at any yield. The model's mode is the caller's at each yield, and `mx.random` is never used: a
    token depends on the seed, the number of its completion and its place in it. The same seed, model and prompts give
    the same bits. Raises DataError for a prompt without tokens, ModelError for a model whose cache has no batch form.
    """
    from mlx_lm.models.cache import make_prompt_cache

    _refuse_empty(prompts)
    if (name := unbatchable(make_prompt_cache(model))) is not None:
        raise ModelError(
            f"this model cannot be sampled in groups: mlx-lm's {name} has no batch form. "
            "Use another model, or a method that needs no rollouts."
        )
    rows = _rows_of(prompts, group_size, settings)
    yield from _sample(model, tokenizer, prompts, rows, settings, seed, rows_at_once)
    return [row.completion() for row in rows]


def sample_each(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    seed: int,
    room: Sequence[int] = (),
    on_tokens: Callable[[list[list[int]]], None] | None = None,
) -> list[Completion]:
    """One completion of each prompt, as `sampling_each` gives them.

    `on_tokens` is called repeatedly with the tokens of each so far.
    """
    sampling = sampling_each(model, tokenizer, prompts, settings, seed, room)
    while True:
        try:
            tokens = next(sampling)
        except StopIteration as ended:
            completions: list[Completion] = ended.value
            return completions
        if on_tokens is not None:
            on_tokens(tokens)


def sampling_each(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    seed: int,
    room: Sequence[int] = (),
) -> Generator[list[list[int]], None, list[Completion]]:
    """One completion of each prompt, with any kind of cache, none longer than its `room` if given.

    Yields the tokens of each so far, and can be closed at any yield. Raises DataError for a prompt without tokens.
    """
    _refuse_empty(prompts)
    rows = _rows_of(prompts, 1, settings, room)
    for _ in _sample(model, tokenizer, prompts, rows, settings, seed, _ROWS_AT_ONCE):
        yield [row.tokens for row in rows]
    return [row.completion() for row in rows]


def _rows_of(
    prompts: Sequence[Sequence[int]], group_size: int, settings: SamplingSettings, room: Sequence[int] = ()
) -> list[Row]:
    most = [min(settings.max_tokens, tokens) for tokens in room] or [settings.max_tokens] * len(prompts)
    indices = np.repeat(np.arange(len(prompts)), group_size).tolist()
    return [Row(number, index, most[index]) for number, index in enumerate(indices)]


def _refuse_empty(prompts: Sequence[Sequence[int]]) -> None:
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"prompt {index} has no tokens: nothing can be sampled after it. Drop its row.")


def _sample(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    rows: list[Row],
    settings: SamplingSettings,
    seed: int,
    rows_at_once: int,
) -> Iterator[int]:
    together = side_by_side(model) if len(rows) > 1 else SideBySide.ONE_BY_ONE
    waiting = Waiting(rows, [len(prompt) for prompt in prompts], together, rows_at_once)
    uniforms = _uniforms(seed, len(rows), settings.max_tokens)
    batch = _Batch(model, settings, uniforms, Endings(tokenizer, settings.stop), together)
    modules = model.modules()
    caches: dict[int, list[Any]] = {}
    shared, prefix_caches = _shared_length(model, prompts), None
    if shared:
        with evaluating(modules):
            prefix_caches = _read(model, prompts[0][:shared])
        yield batch.drawn
    while waiting.rows or batch.growing:
        if joining := waiting.next_rows(batch.growing):
            indices = dict.fromkeys(row.prompt_index for row in joining)
            for index in indices:
                if index not in caches:
                    with evaluating(modules):
                        caches[index] = _read(model, prompts[index][shared:-1], prefix_caches)
                    yield batch.drawn
            batch.join(joining, caches, [int(prompts[row.prompt_index][-1]) for row in joining])
            # Only the last group can have rows still to come.
            caches = {index: caches[index] for index in indices if waiting.is_next(index)}
        with evaluating(modules):
            batch.step()
        yield batch.drawn


def _uniforms(seed: int, rows: int, max_tokens: int) -> np.ndarray:
    """(rows, max_tokens, 2) float32 multiples of 2^-23 in [0, 1): the random numbers for `draw_tokens`."""
    random = np.random.default_rng(seed_for(seed, "rollout"))
    return random.integers(0, 1 << 23, (rows, max_tokens, 2), dtype=np.int32).astype(np.float32) / (1 << 23)


def _shared_length(model: nn.Module, prompts: Sequence[Sequence[int]]) -> int:
    """The length of the prefix that is processed once for all prompts, 0 where each is processed whole."""
    shared = min(map(len, prompts), default=1) - 1  # the last token of a prompt is each row's first input
    for prompt in prompts:
        shared = next((place for place in range(shared) if prompt[place] != prompts[0][place]), shared)
    saved = shared * (len(prompts) - 1)
    return shared if saved >= _FEWEST_SHARED and can_share_prefix(model, max(map(len, prompts))) else 0


def _read(model: nn.Module, tokens: Sequence[int], prefix_caches: list[Any] | None = None) -> list[Any]:
    """The model's caches after `tokens`, which follow those in `prefix_caches` if given; these stay unchanged."""
    from mlx_lm.models.cache import make_prompt_cache

    caches = make_prompt_cache(model) if prefix_caches is None else copy.deepcopy(prefix_caches)
    for first in range(0, len(tokens), _PROMPT_TOKENS_AT_ONCE):
        part = list(tokens[first : first + _PROMPT_TOKENS_AT_ONCE])
        model(mx.array(part, dtype=mx.int32)[None], cache=caches)
        mx.eval([cache.state for cache in caches])
    return caches


class _Drawn(NamedTuple):
    """A step's rows, and their tokens and log-probabilities as arrays on the device."""

    rows: list[Row]
    token_B: Any
    logprob_B: Any


class _Batch:
    """Rows that are decoded side by side. `drawn` counts the tokens that were read.

    On a GPU a step is launched before the previous one is read, so that Python and the device work at the same time. On
    a CPU they would compete for cores: each step is read at once, and drawn by NumPy.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: SamplingSettings,
        uniforms: np.ndarray,
        endings: Endings,
        together: SideBySide,
    ) -> None:
        self.drawn = 0
        self._merges = together is not SideBySide.ONE_BY_ONE
        self._model = model
        self._settings = settings
        self._uniforms = uniforms
        self._endings = endings
        self._rows: list[Row] = []
        self._caches: list[Any] = []
        self._inputs_B = mx.array([], dtype=mx.int32)
        self._unread: _Drawn | None = None
        self._on_cpu = is_cpu()

    @property
    def growing(self) -> int:
        """Rows that have not ended."""
        return sum(not row.ended for row in self._rows)

    def join(self, rows: list[Row], caches: dict[int, list[Any]], last_tokens: list[int]) -> None:
        """Add rows whose prompts were processed into `caches`, by prompt; rows that have ended are removed."""
        self._drop_ended()
        if not self._merges:
            self._caches = copy.deepcopy(caches[rows[0].prompt_index])
        elif self._rows:
            for cache, other in zip(self._caches, _for_rows(rows, caches), strict=True):
                cache.extend(other)
        else:
            self._caches = _for_rows(rows, caches)
        self._inputs_B = mx.concatenate([self._inputs_B, mx.array(last_tokens, dtype=mx.int32)])
        self._rows = self._rows + rows

    def step(self) -> None:
        """Launch the next token of each row, and read the tokens of this step or of the previous one."""
        launched = self._launch()
        ready, self._unread = (launched, None) if self._on_cpu else (self._unread, launched)
        if ready is None:
            return
        for row, token, logprob in zip(ready.rows, ready.token_B.tolist(), ready.logprob_B.tolist(), strict=True):
            if not row.ended:
                row.tokens.append(token)
                row.logprobs.append(logprob)
                self.drawn += 1
                self._endings.judge(row)
        if self.growing <= 0.75 * len(self._rows):
            self._drop_ended()

    def _launch(self) -> _Drawn | None:
        """Start computing one token for each row; None if no row needs another."""
        last = self._settings.max_tokens - 1
        if all(row.ended or row.launched > last for row in self._rows):
            return None
        uniform_B2 = self._uniforms[[row.number for row in self._rows], [min(row.launched, last) for row in self._rows]]
        logits_BV = self._model(self._inputs_B[:, None], cache=self._caches)[:, -1].astype(mx.float32)
        how = (self._settings.temperature, self._settings.top_k, self._settings.top_p)
        if self._on_cpu:
            token_B, logprob_B = draw_tokens(np.array(logits_BV), uniform_B2, *how)
        else:
            token_B, logprob_B = draw_tokens(logits_BV, mx.array(uniform_B2), *how)
            mx.async_eval(token_B, logprob_B)
        self._inputs_B = mx.array(token_B)
        for row in self._rows:
            row.launched += 1
        return _Drawn(self._rows, token_B, logprob_B)

    def _drop_ended(self) -> None:
        keep = [place for place, row in enumerate(self._rows) if not row.ended]
        if keep and len(keep) < len(self._rows):  # so the caches are merged ones
            for cache in self._caches:
                cache.filter(keep)
        self._inputs_B = self._inputs_B[mx.array(keep, dtype=mx.int32)]
        self._rows = [self._rows[place] for place in keep]


def _for_rows(rows: Sequence[Row], caches: dict[int, list[Any]]) -> list[Any]:
    """The caches of prompts combined to one for each layer, with a row for each completion."""
    place_of = {prompt_index: place for place, prompt_index in enumerate(caches)}
    joining = merged(list(caches.values()))
    for cache in joining:
        cache.filter([place_of[row.prompt_index] for row in rows])
    return joining
