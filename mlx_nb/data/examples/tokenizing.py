"""Tokenizes the rows of a split piece by piece, and caches the result for the next run."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Generator
from datetime import date
from typing import Any

from mlx_nb.data.examples.examples import Examples, split_examples
from mlx_nb.data.examples.kinds import ROW_KINDS, Result
from mlx_nb.data.examples.settings import LeftOut
from mlx_nb.data.masks.render import unwrapped
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.process.pieces import SECONDS_BETWEEN_PIECES, on_thread

# Bytes of tokens and masks that stay cached when no run uses them any more.
MOST_KEPT = 256 << 20

Outcome = tuple[list[Any], list[LeftOut]]
"""The examples that can be trained, and the rows that were left out."""

_kept: OrderedDict[str, tuple[Outcome, int]] = OrderedDict()


def tokenize_split(examples: Examples) -> Generator[tuple[int, float], None, Outcome]:
    """Tokenize all rows; yields (rows done, seconds taken) many times a second, and returns the outcome.

    The generator can be suspended at any point. Rows that were tokenized before in this process with the same tokenizer
    and settings come from the cache. Raises TooLong at the first long row if `truncate` is `error`.
    """
    for _ in on_thread(examples.source.fingerprint):  # for rows in memory this takes as long as reading them
        yield 0, 0.0
    key = _key(examples)
    if key in _kept and not examples.source.changed():
        _kept.move_to_end(key)
        (kept, left_out), _ = _kept[key]
        return list(kept), list(left_out)
    results: list[Result] = []
    spent, since = 0.0, time.monotonic()
    for done, made in enumerate(examples.each_row(), 1):
        results += made
        passed = time.monotonic() - since
        if passed >= SECONDS_BETWEEN_PIECES:
            spent += passed
            yield done, spent
            since = time.monotonic()
    kept, left_out = split_examples(list(examples.completed(results)))
    # Reward functions receive the contents of prompts and may change them. Rows of a file are read one by one.
    if ROW_KINDS[examples.kind].answered and not examples.source.changed():
        _keep(key, (kept, left_out))
    return list(kept), list(left_out)


def _keep(key: str, outcome: Outcome) -> None:
    sequences = [sequence for example in outcome[0] for sequence in example.sequences]
    _kept[key] = outcome, sum(sequence.tokens.nbytes + sequence.loss_mask.nbytes for sequence in sequences)
    while sum(size for _, size in _kept.values()) > MOST_KEPT:
        _kept.popitem(last=False)


def _key(examples: Examples) -> str:
    """A key of everything that the outcome depends on: the rows and their source, tokenizer, template and settings."""
    tokenizer: Tokenizer = examples.tokenizer
    inner = unwrapped(tokenizer)
    parts = [
        examples.source.fingerprint(),
        examples.source.name,
        examples.kind,
        repr(examples.settings),
        inner.backend_tokenizer.to_str() if hasattr(inner, "backend_tokenizer") else repr(id(inner)),
        repr(getattr(inner, "chat_template", None)),
        repr(sorted(inner.special_tokens_map.items())),
        # What mlx-lm's wrapper adds: code of its own for some models, an argument, end-of-turn tokens.
        repr([getattr(tokenizer, name, None) for name in ("_chat_template", "has_thinking", "_thinking_kwarg")]),
        repr(sorted(getattr(tokenizer, "eos_token_ids", None) or ())),
        # Some templates write today's date.
        date.today().isoformat(),
    ]
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()
