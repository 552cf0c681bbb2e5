"""Groups of completions sampled from the live model, with the log-probability of each token as it was drawn.

Each prompt is read once; its keys and values start every row of its group. Rows of many prompts are decoded side by
side through mlx-lm's batch caches, and a row that has ended makes room for the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_nb.errors import DataError, ModelError
from mlx_nb.model.backend import is_cpu
from mlx_nb.model.randomness import seed_for
from mlx_nb.rollouts.drawing import draw_tokens

_ROWS_AT_ONCE = 32
_PROMPT_TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are drawn; `draw_tokens` says what temperature, top_k and top_p do.

    max_tokens  where a completion is cut, the end token counted
    stop        a completion ends when its text contains one of these
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Completion:
    """What the model said to one prompt.

    tokens        (T,) int32, as drawn: with the end token, or with the tokens of the stop string
    logprobs      (T,) float32, log-probability of each under the model that drew it, before top_k and top_p
    text          without the end token; up to the stop string
    finished      False when it was cut at max_tokens
    prompt_index  which of the prompts it answers
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    text: str
    finished: bool
    prompt_index: int


def sample_groups(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    group_size: int,
    settings: SamplingSettings,
    seed: int,
    *,
    rows_at_once: int = _ROWS_AT_ONCE,
) -> Generator[int, None, list[Completion]]:
    """`group_size` completions of each prompt (tokens), prompt 0's first; yields the tokens drawn so far as it goes.

    It may be dropped at any yield. The model's mode is the caller's at each yield, and `mx.random` is never used: a
    token depends on the seed, the number of its completion and its place in it. The same seed, model and prompts give
    the same bits. Raises DataError for a prompt without tokens, ModelError for a model whose cache has no batch form.
    """
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"prompt {index} has no tokens: nothing can be sampled after it. Drop its row.")
    rows = [_Row(number, index) for number, index in enumerate(np.repeat(np.arange(len(prompts)), group_size).tolist())]
    waiting = deque(rows)
    batch = _Batch(model, settings, _uniforms(seed, len(rows), settings.max_tokens), _Endings(tokenizer, settings.stop))
    modules = model.modules()
    caches: dict[int, list[Any]] = {}
    while waiting or batch.growing:
        if waiting and batch.has_room(rows_at_once, len(waiting)):
            joining = [waiting.popleft() for _ in range(min(len(waiting), rows_at_once - batch.growing))]
            indices = dict.fromkeys(row.prompt_index for row in joining)
            for index in indices:
                if index not in caches:
                    with _evaluating(modules):
                        caches[index] = _read_prompt(model, prompts[index])
                    yield batch.drawn
            batch.join(joining, caches, [int(prompts[row.prompt_index][-1]) for row in joining])
            # Only the last group can have rows still to come.
            caches = {index: caches[index] for index in indices if waiting and waiting[0].prompt_index == index}
        with _evaluating(modules):
            batch.step()
        yield batch.drawn
    return [row.completion() for row in rows]


def _uniforms(seed: int, rows: int, max_tokens: int) -> np.ndarray:
    """(rows, max_tokens, 2) float32 multiples of 2^-23 in [0, 1): what `draw_tokens` draws by."""
    random = np.random.default_rng(seed_for(seed, "rollout"))
    return random.integers(0, 1 << 23, (rows, max_tokens, 2), dtype=np.int32).astype(np.float32) / (1 << 23)


@contextmanager
def _evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode while inside; each module's own mode afterwards."""
    training = [module for module in modules if module.training]
    for module in training:
        module._set_training_mode(False)
    try:
        yield
    finally:
        for module in training:
            module._set_training_mode(True)


def _read_prompt(model: nn.Module, prompt: Sequence[int]) -> list[Any]:
    """The model's caches after all tokens of a prompt but the last, which is each row's first input."""
    from mlx_lm.models.cache import make_prompt_cache

    caches = make_prompt_cache(model)
    _refuse_unbatchable(caches)
    for start in range(0, len(prompt) - 1, _PROMPT_TOKENS_AT_ONCE):
        part = list(prompt[start : min(start + _PROMPT_TOKENS_AT_ONCE, len(prompt) - 1)])
        model(mx.array(part, dtype=mx.int32)[None], cache=caches)
        mx.eval([cache.state for cache in caches])
    return caches


def _refuse_unbatchable(caches: Sequence[Any]) -> None:
    """Raises ModelError for a cache of mlx-lm's that cannot hold rows of different length."""
    for cache in caches:
        _refuse_unbatchable(getattr(cache, "caches", ()))
        if not hasattr(cache, "merge") or getattr(cache, "keep", 0) > 0:
            raise ModelError(
                f"this model cannot be sampled in groups: mlx-lm's {type(cache).__name__} has no batch form. "
                "Use another model, or a method that needs no rollouts."
            )


@dataclass(eq=False)
class _Row:
    """One completion as it grows. `launched` counts the tokens asked of the device, `tokens` those that came."""

    number: int
    prompt_index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    launched: int = 0
    ended: bool = False
    finished: bool = False
    text: str = ""

    def completion(self) -> Completion:
        return Completion(
            np.array(self.tokens, np.int32),
            np.array(self.logprobs, np.float32),
            self.text,
            self.finished,
            self.prompt_index,
        )


class _Drawn(NamedTuple):
    """A step's rows, and their tokens and log-probabilities where the device left them."""

    rows: list[_Row]
    token_B: Any
    logprob_B: Any


class _Endings:
    """Where a completion ends: an end token of the tokenizer, or a stop string in the text."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        # Every token but a special one is a byte or more; the spare ones keep the window's edge off the stop string.
        self._window = max((len(text.encode()) for text in stop), default=0) + 4

    def judge(self, row: _Row, max_tokens: int) -> None:
        """After a new token: mark the row as ended when it is, and give it its text."""
        if row.tokens[-1] in self._tokenizer.eos_token_ids:
            row.ended = row.finished = True
            row.text = self._tokenizer.decode(row.tokens[:-1])
        elif self._stop and self._first_stop(self._tokenizer.decode(row.tokens[-self._window :])) is not None:
            text = self._tokenizer.decode(row.tokens)
            end = self._first_stop(text)
            if end is not None:
                row.ended = row.finished = True
                row.text = text[:end]
        if not row.ended and len(row.tokens) == max_tokens:
            row.ended = True
            row.text = self._tokenizer.decode(row.tokens)

    def _first_stop(self, text: str) -> int | None:
        return min((start for stop in self._stop if (start := text.find(stop)) >= 0), default=None)


class _Batch:
    """Rows that are decoded side by side. `drawn` counts the tokens that were read.

    On a GPU a step is asked of the device before the one before it is read, so that Python and the device work at
    once. On a CPU they would share the cores: each step is read at once, and drawn by NumPy.
    """

    def __init__(self, model: nn.Module, settings: SamplingSettings, uniforms: np.ndarray, endings: _Endings) -> None:
        self.drawn = 0
        self._model = model
        self._settings = settings
        self._uniforms = uniforms
        self._endings = endings
        self._rows: list[_Row] = []
        self._caches: list[Any] = []
        self._inputs_B = mx.array([], dtype=mx.int32)
        self._unread: _Drawn | None = None
        self._on_cpu = is_cpu()

    @property
    def growing(self) -> int:
        """Rows that have not ended."""
        return sum(not row.ended for row in self._rows)

    def has_room(self, rows_at_once: int, waiting: int) -> bool:
        """Whether enough rows have ended for others to join: moving the caches costs about a step."""
        return rows_at_once - self.growing >= min(waiting, max(1, rows_at_once // 4))

    def join(self, rows: list[_Row], caches: dict[int, list[Any]], last_tokens: list[int]) -> None:
        """Take in rows whose prompts were read into `caches`, by prompt; rows that have ended leave."""
        self._drop_ended()
        place_of = {prompt_index: place for place, prompt_index in enumerate(caches)}
        places = [place_of[row.prompt_index] for row in rows]
        joining = [layer[0].merge(layer) for layer in zip(*caches.values(), strict=True)]
        for cache in joining:
            cache.filter(places)  # one row of each prompt becomes one for each completion
        if self._rows:
            for cache, other in zip(self._caches, joining, strict=True):
                cache.extend(other)
        else:
            self._caches = joining
        self._inputs_B = mx.concatenate([self._inputs_B, mx.array(last_tokens, dtype=mx.int32)])
        self._rows = self._rows + rows

    def step(self) -> None:
        """Ask for the next token of each row, and read the tokens of this step or of the one before."""
        launched = self._launch()
        ready, self._unread = (launched, None) if self._on_cpu else (self._unread, launched)
        if ready is None:
            return
        for row, token, logprob in zip(ready.rows, ready.token_B.tolist(), ready.logprob_B.tolist(), strict=True):
            if not row.ended:
                row.tokens.append(token)
                row.logprobs.append(logprob)
                self.drawn += 1
                self._endings.judge(row, self._settings.max_tokens)
        if self.growing <= 0.75 * len(self._rows):
            self._drop_ended()

    def _launch(self) -> _Drawn | None:
        """Start computing one token for each row; None when no row needs another."""
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
        if keep and len(keep) < len(self._rows):
            for cache in self._caches:
                cache.filter(keep)
        self._inputs_B = self._inputs_B[mx.array(keep, dtype=mx.int32)]
        self._rows = [self._rows[place] for place in keep]
