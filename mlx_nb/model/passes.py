"""Tests of a model's forward passes on a few random tokens. Support is decided by these tests, never by model name.

mlx-lm has three kinds of forward pass: a whole row without a cache (training), token by token with a cache
(generation), and several rows with merged caches (batched generation). In some model families they disagree: one
shares keys and values only through its cache, another gives the queries of a short row the positions of the longest.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_nb.errors import ModelError
from mlx_nb.model.once_per_model import once_per_model
from mlx_nb.model.trees import named_arrays

# Root mean square difference between two passes, in standard deviations of the logits, in single and half precision.
# Rounding errors are 1e-5 and 1e-2. Batched generation has a tight tolerance: the smallest error seen in a broken
# family was 1e-4, and the fallback of one row at a time is only slower. Training is refused only for differences that
# rounding cannot explain: in broken families they were above 0.3.
_SIDE_BY_SIDE_TOLERANCE = (5e-5, 0.05)
_CACHE_TOLERANCE = (1e-3, 0.2)
# Rounding may decide a tie between two experts differently. That affects one draw of tokens; a real error affects all.
_DRAWS = 2
_FEWEST_TOKENS = 8  # an embedding with fewer rows is not a vocabulary

_FEW_TOKENS = 4
_MOST_LOGITS = 1 << 26  # 256 MB; larger windows, which few rows exceed, are not tested


class SideBySide(StrEnum):
    """Which rows a model can decode in one batch with the same logits as alone."""

    ANY_LENGTHS = "any lengths"
    EQUAL_LENGTHS = "equal lengths"
    ONE_BY_ONE = "one by one"


def cache_mismatch(model: nn.Module, longest: int = 0) -> str | None:
    """How the pass without a cache (training) differs from the pass with a cache (generation), as text.

    None if they agree on a few tokens, and also beyond the smallest sliding window if rows of `longest` tokens exceed
    it; None for a model without a cache. The model, its modes and `mx.random` are not changed.
    """
    mismatch = _mismatch_over(model, _FEW_TOKENS)
    if mismatch is not None:
        return mismatch
    window = _smallest_window(model)
    if window is None or window >= longest or (window + 2) * _vocabulary(model) > _MOST_LOGITS:
        return None
    mismatch = _mismatch_over(model, window + 2)
    return None if mismatch is None else f"past {window} tokens, its sliding window, {mismatch}"


def cache_mismatch_note(model: nn.Module) -> str | None:
    """A note for a model with a cache mismatch, which can generate but not be trained; otherwise None."""
    mismatch = cache_mismatch(model)
    return (
        None if mismatch is None else f"{family_of(model)} answers, but cannot be trained with this mlx-lm: {mismatch}."
    )


def refuse_cache_mismatch(model: nn.Module, longest: int = 0) -> None:
    """Raises ModelError for a model family with a cache mismatch: training would optimize a different function."""
    mismatch = cache_mismatch(model, longest)
    if mismatch is None:
        return
    advice = (
        "Choose another model." if cache_mismatch(model) else "Choose shorter rows (max_seq_length) or another model."
    )
    raise ModelError(f"{family_of(model)} cannot be trained with this mlx-lm: {mismatch}. {advice}")


@once_per_model(good=lambda mismatch: mismatch is None, from_json=lambda _null: None)
def _mismatch_over(model: nn.Module, count: int) -> str | None:
    """`cache_mismatch` on rows of `count` tokens, the last of which are read one at a time."""
    differences = []
    for draw in range(_DRAWS):
        row = random_tokens(model, count, draw)
        try:
            whole_TV = _logits(model(mx.array([row])))[0]
        except Exception as error:  # model code may raise anything
            return f"a pass without a cache, as training needs it, fails ({one_line(error)})"
        try:
            alone = _Alone(model)
            singly = 1 if count == _FEW_TOKENS else 2
            cached_TV = np.concatenate([alone.read(row[:-singly]), *(alone.read([token]) for token in row[-singly:])])
        except Exception:
            return None
        differences.append(_difference(cached_TV, whole_TV))
        if not differences[-1] > _CACHE_TOLERANCE[is_half(model)]:  # NaN proves nothing, so it is not an agreement
            return None
    return (
        "its logits without a cache (training) are not the same as with a cache (generation) "
        f"(they differ by {min(differences):.1%} of their spread)"
    )


@once_per_model(good=lambda found: found is SideBySide.ANY_LENGTHS, from_json=SideBySide)
def side_by_side(model: nn.Module) -> SideBySide:
    """Which rows can be decoded in one batch from caches that were filled separately, merged, extended and filtered.

    The test reads one token at a time and costs as much as generating 13 tokens. The model, its modes and `mx.random`
    are not changed.
    """
    if _proved(model, (1, 3), joining=2):
        return SideBySide.ANY_LENGTHS
    if _proved(model, (2, 2)) and _proved(model, (1, 1)):
        return SideBySide.EQUAL_LENGTHS
    return SideBySide.ONE_BY_ONE


def can_share_prefix(model: nn.Module, longest: int) -> bool:
    """Whether rows of up to `longest` tokens can start from copies of the caches of a common prefix.

    Tested on a few tokens, so it is refused for rows longer than the smallest sliding window. The model, its modes and
    `mx.random` stay unchanged.
    """
    window = _smallest_window(model)
    return (window is None or longest <= window) and _prefix_agrees(model)


@once_per_model(good=bool, from_json=bool)
def _prefix_agrees(model: nn.Module) -> bool:
    """Whether two rows continued from copies of one cache have the logits of the same rows read in one pass."""
    prefix, *rests = (random_tokens(model, 2 * _FEW_TOKENS, draw)[:_FEW_TOKENS] for draw in range(3))
    tolerance = _SIDE_BY_SIDE_TOLERANCE[is_half(model)]
    try:
        common = _Alone(model)
        common.read(prefix)
        copies = [copy.deepcopy(common.caches) for _ in rests]
        for rest, caches in zip(rests, copies, strict=True):
            expected_TV = _Alone(model).read([*prefix, *rest])[len(prefix) :]
            if not _difference(_logits(model(mx.array([rest]), cache=caches))[0], expected_TV) <= tolerance:
                return False
    except Exception:  # model code may raise anything; then prefixes are not shared
        return False
    return True


def family_of(model: nn.Module) -> str:
    """The name of the model family in mlx-lm."""
    return str(getattr(model, "model_type", None) or type(model).__module__.rsplit(".", 1)[-1])


def unbatchable(caches: Sequence[Any]) -> str | None:
    """The class name of the first cache without support for batches of rows; None if all support them."""
    for cache in caches:
        inner = unbatchable(getattr(cache, "caches", ()))
        if inner is not None:
            return inner
        if not hasattr(cache, "merge") or getattr(cache, "keep", 0) > 0:
            return type(cache).__name__
    return None


def merged(caches_of_rows: Sequence[Sequence[Any]]) -> list[Any]:
    """Merge the caches of separate rows into one batch cache per layer."""
    return [layer[0].merge(list(layer)) for layer in zip(*caches_of_rows, strict=True)]


class _Alone:
    """One row computed alone, with its own caches."""

    def __init__(self, model: nn.Module) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        self._model = model
        self.caches = make_prompt_cache(model)

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """Read `tokens` in one pass. Returns (T, V) float32 logits after each of them."""
        result: np.ndarray = _logits(self._model(mx.array([list(tokens)]), cache=self.caches))[0]
        return result


def _proved(model: nn.Module, lengths: tuple[int, ...], joining: int | None = None) -> bool:
    """Whether rows of these lengths get the same logits in a batch as alone. A row of length `joining` joins later."""
    try:
        tolerance = _SIDE_BY_SIDE_TOLERANCE[is_half(model)]
        return any(_side_by_side_difference(model, lengths, joining, draw) <= tolerance for draw in range(_DRAWS))
    except Exception:  # model code may raise anything; then batching is not supported
        return False


class _Row:
    """A row of random tokens, of which the first `length - 1` have been read alone."""

    def __init__(self, model: nn.Module, length: int, draw: int) -> None:
        self._tokens = iter(random_tokens(model, length + 3, draw))
        self._alone = _Alone(model)
        for _ in range(length - 1):
            self._alone.read([next(self._tokens)])
        self.caches = self._alone.caches

    def step(self) -> tuple[int, np.ndarray]:
        """The next token, and the logits (V,) after it when read alone."""
        token = next(self._tokens)
        return token, self._alone.read([token])[0]


def _side_by_side_difference(model: nn.Module, lengths: tuple[int, ...], joining: int | None, draw: int) -> float:
    """The largest difference between batched and separate logits, over all rows and steps."""
    rows = [_Row(model, length, 10 * draw + place) for place, length in enumerate(lengths)]
    if unbatchable(rows[0].caches) is not None:
        return float("inf")
    caches = merged([row.caches for row in rows])
    # In a rollout a prompt has several completions, so the second row is in the batch twice.
    beside = [rows[0], rows[1], rows[1]]
    for cache in caches:
        cache.filter([0, 1, 1])
    differences = [_step_difference(model, beside, caches)]
    if joining is not None:
        late = _Row(model, joining, 10 * draw + len(rows))
        for cache, other in zip(caches, merged([late.caches]), strict=True):
            cache.extend(other)
        beside.append(late)
        differences.append(_step_difference(model, beside, caches))
    for cache in caches:
        cache.filter(list(range(1, len(beside))))
    differences.append(_step_difference(model, beside[1:], caches))
    return max(differences)


def _step_difference(model: nn.Module, beside: Sequence[_Row], caches: list[Any]) -> float:
    """Read the next token of each row, batched and alone. Returns the difference between the logits."""
    steps = {row: row.step() for row in dict.fromkeys(beside)}
    tokens, alone_BV = zip(*(steps[row] for row in beside), strict=True)
    beside_BV = _logits(model(mx.array(tokens)[:, None], cache=caches))[:, -1]
    return _difference(beside_BV, np.stack(alone_BV))


def _smallest_window(model: nn.Module) -> int | None:
    """The size in tokens of the smallest sliding window of the model's caches; None without one."""
    from mlx_lm.models.cache import make_prompt_cache

    def sizes(caches: Sequence[Any]) -> Iterator[int]:
        for cache in caches:
            yield from sizes(getattr(cache, "caches", ()))
            size = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
            if size is not None:
                yield int(size)

    try:
        return min(sizes(make_prompt_cache(model)), default=None)
    except Exception:  # the model has no cache
        return None


def _vocabulary(model: nn.Module) -> int:
    """The number of rows of the largest embedding."""
    return max(_embedding_sizes(model), default=_FEWEST_TOKENS)


def _embedding_sizes(model: nn.Module) -> list[int]:
    kinds = (nn.Embedding, nn.QuantizedEmbedding)
    return [module.weight.shape[0] for module in model.modules() if isinstance(module, kinds)]


def random_tokens(model: nn.Module, count: int, draw: int) -> list[int]:
    """Random ids that exist in every embedding of the model. 0 is excluded: it is often padding."""
    sizes = [size for size in _embedding_sizes(model) if size >= _FEWEST_TOKENS]
    limit = min(sizes, default=_FEWEST_TOKENS)
    result: list[int] = np.random.default_rng([draw, count]).integers(1, limit, count).tolist()
    return result


def _logits(logits_BTV: mx.array) -> np.ndarray:
    return np.array(logits_BTV.astype(mx.float32))


def _difference(found_TV: np.ndarray, expected_TV: np.ndarray) -> float:
    """Root mean square difference at the worst position, in standard deviations of the logits there. NaN stays NaN."""
    apart_T = np.sqrt(np.mean((found_TV - expected_TV) ** 2, axis=-1))
    return float(np.max(apart_T / np.maximum(expected_TV.std(axis=-1), 1e-9)))


def is_half(model: nn.Module) -> bool:
    """Whether the model has parameters in half precision."""
    return any(array.dtype in (mx.float16, mx.bfloat16) for _, array in named_arrays(model.parameters()))


def one_line(error: Exception) -> str:
    """The message of an error on one line, shortened to 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}…"
