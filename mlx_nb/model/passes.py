"""What holds of a model's passes, tried on a few random tokens: families are told apart by proof, never by name.

mlx-lm computes a row in three ways: whole and without a cache (training), with a cache token by token (an answer),
and with the caches of several rows merged (answers side by side). Nothing makes a family's three ways agree: one
shares keys and values only through its cache, another places the queries of a shorter row where the longest one is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, ParamSpec, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_nb.errors import ModelError
from mlx_nb.model.trees import named_arrays, trained_arrays_of

# Root mean squares of what two passes differ by, in standard deviations of the logits, in single and half precision.
# Rounding comes to 1e-5 and 1e-2. Rows side by side are held to little more: the smallest fault seen was 1e-4, and to
# grow one by one is only slow. Training is refused for what no rounding explains: such faults were above 0.3.
_SIDE_BY_SIDE_TOLERANCE = (5e-5, 0.05)
_CACHE_TOLERANCE = (1e-3, 0.2)
# Rounding may turn a tie between two experts: that strikes a token, while a fault strikes every draw of tokens.
_DRAWS = 2
_FEWEST_TOKENS = 8  # an embedding of fewer rows is not that of a vocabulary

_FEW_TOKENS = 4
_MOST_LOGITS = 1 << 26  # a quarter of a gigabyte: more is not spent on a window that few rows pass

Asked = ParamSpec("Asked")
Answer = TypeVar("Answer")


class SideBySide(Enum):
    """Which rows a model computes side by side as it computes each alone."""

    ANY_LENGTHS = "any lengths"
    EQUAL_LENGTHS = "equal lengths"
    ONE_BY_ONE = "one by one"


def once_a_model(good: Callable[[Any], bool]) -> Callable[[Callable[Asked, Answer]], Callable[Asked, Answer]]:
    """A question about a model, asked once in each way; the answer is kept for as long as the model lives.

    A `good` answer is that of every model of the same files (`made_of`), for as long as the process lives. Others are
    asked for anew: what was wrong may have been the memory that was left.
    """

    def ask_once(question: Callable[Asked, Answer]) -> Callable[Asked, Answer]:
        answers: dict[tuple[Any, ...], tuple[weakref.ref[nn.Module], Answer]] = {}
        of_files: dict[tuple[Any, ...], Answer] = {}

        def ask(*args: Asked.args, **kwargs: Asked.kwargs) -> Answer:
            model: Any = args[0]
            key, files = (id(model), *args[1:]), _files_of(model)
            if key in answers:
                return answers[key][1]
            if files is not None and (files, *args[1:]) in of_files:
                return of_files[files, *args[1:]]
            with evaluating(model.modules()):
                answer = question(*args, **kwargs)
            answers[key] = (weakref.ref(model, lambda _gone: answers.pop(key, None)), answer)
            if files is not None and good(answer):
                of_files[files, *args[1:]] = answer
            return answer

        return ask

    return ask_once


_files: dict[int, tuple[weakref.ref[nn.Module], Hashable]] = {}


def made_of(model: nn.Module, files: Hashable) -> None:
    """Note of which files a model is, and how they were read: two with equal ones are computed alike."""
    number = id(model)
    _files[number] = (weakref.ref(model, lambda _gone: _files.pop(number, None)), files)


def made_alike(model: nn.Module, other: nn.Module) -> None:
    """Note that a model is of the files of another one."""
    if (files := _files_of(other)) is not None:
        made_of(model, files)


def _files_of(model: nn.Module) -> Hashable | None:
    return _files[id(model)][1] if id(model) in _files else None


def trained_forms(model: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Name and shape of each array that is trained."""
    return tuple((name, tuple(array.shape)) for name, array in trained_arrays_of(model))


def cache_doubt(model: nn.Module, longest: int = 0) -> str | None:
    """In what the pass without a cache, which training takes, is not the pass with one, which answers take.

    None when they agree on a few tokens, and past the smallest sliding window where rows of `longest` tokens go there;
    also when the model takes no cache. The model, its modes and `mx.random` stay as they are.
    """
    doubt = _doubt_over(model, _FEW_TOKENS)
    if doubt is not None:
        return doubt
    window = _smallest_window(model)
    if window is None or window >= longest or (window + 2) * _vocabulary(model) > _MOST_LOGITS:
        return None
    doubt = _doubt_over(model, window + 2)
    return None if doubt is None else f"past {window} tokens, its sliding window, {doubt}"


def doubt_note(model: nn.Module) -> str | None:
    """One line for who asks such a model for answers, None when there is nothing to say."""
    doubt = cache_doubt(model)
    return None if doubt is None else f"{family_of(model)} answers, but cannot be trained with this mlx-lm: {doubt}."


def refuse_cache_doubt(model: nn.Module, longest: int = 0) -> None:
    """Raises ModelError, by the family's name, for a model whose training would not be of the model that answers."""
    doubt = cache_doubt(model, longest)
    if doubt is None:
        return
    advice = "Choose another model." if cache_doubt(model) else "Choose shorter rows (max_seq_length) or another model."
    raise ModelError(f"{family_of(model)} cannot be trained with this mlx-lm: {doubt}. {advice}")


@once_a_model(good=lambda doubt: doubt is None)
def _doubt_over(model: nn.Module, count: int) -> str | None:
    """The same on rows of so many tokens, the last of which are read one after the other."""
    differences = []
    for draw in range(_DRAWS):
        row = random_tokens(model, count, draw)
        try:
            whole_TV = _logits(model(mx.array([row])))[0]
        except Exception as error:  # whatever a family's own code raises
            return f"a pass without a cache, as training needs it, fails ({one_line(error)})"
        try:
            alone = _Alone(model)
            singly = 1 if count == _FEW_TOKENS else 2
            cached_TV = np.concatenate([alone.read(row[:-singly]), *(alone.read([token]) for token in row[-singly:])])
        except Exception:
            return None
        differences.append(_difference(cached_TV, whole_TV))
        if not differences[-1] > _CACHE_TOLERANCE[is_half(model)]:  # nor does NaN tell
            return None
    return (
        "its logits without a cache, as training computes them, are not those with one, as answers are computed "
        f"(they differ by {min(differences):.1%} of their spread)"
    )


@once_a_model(good=lambda found: found is SideBySide.ANY_LENGTHS)
def side_by_side(model: nn.Module) -> SideBySide:
    """Which rows may be decoded side by side from caches that were filled alone, merged, extended and filtered.

    Every token is read singly, which costs as much as 13 tokens of an answer. The model, its modes and `mx.random` stay
    as they are.
    """
    if _proved(model, (1, 3), joining=2):
        return SideBySide.ANY_LENGTHS
    if _proved(model, (2, 2)) and _proved(model, (1, 1)):
        return SideBySide.EQUAL_LENGTHS
    return SideBySide.ONE_BY_ONE


def family_of(model: nn.Module) -> str:
    """The name by which mlx-lm knows the model's family."""
    return str(getattr(model, "model_type", None) or type(model).__module__.rsplit(".", 1)[-1])


def unbatchable(caches: Sequence[Any]) -> str | None:
    """The name of the first cache that cannot hold rows of different length, None when all can."""
    for cache in caches:
        inner = unbatchable(getattr(cache, "caches", ()))
        if inner is not None:
            return inner
        if not hasattr(cache, "merge") or getattr(cache, "keep", 0) > 0:
            return type(cache).__name__
    return None


def merged(caches_of_rows: Sequence[Sequence[Any]]) -> list[Any]:
    """The caches of rows that were read alone as one for each layer, to decode them side by side."""
    return [layer[0].merge(list(layer)) for layer in zip(*caches_of_rows, strict=True)]


@contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode while inside; each module's own mode afterwards."""
    training = [module for module in modules if module.training]
    for module in training:
        module._set_training_mode(False)
    try:
        yield
    finally:
        for module in training:
            module._set_training_mode(True)


class _Alone:
    """One row as it is computed alone, with caches of its own."""

    def __init__(self, model: nn.Module) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        self._model = model
        self.caches = make_prompt_cache(model)

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """(T, V) float32 logits after each of the tokens, read in one pass."""
        result: np.ndarray = _logits(self._model(mx.array([list(tokens)]), cache=self.caches))[0]
        return result


def _proved(model: nn.Module, lengths: tuple[int, ...], joining: int | None = None) -> bool:
    """Whether rows of these lengths come out side by side as alone; a row of length `joining` comes in later."""
    try:
        tolerance = _SIDE_BY_SIDE_TOLERANCE[is_half(model)]
        return any(_side_by_side_difference(model, lengths, joining, draw) <= tolerance for draw in range(_DRAWS))
    except Exception:  # whatever a family's own code raises there: it is no proof
        return False


class _Row:
    """A row of random tokens, of which all but one of its `length` first ones were read alone."""

    def __init__(self, model: nn.Module, length: int, draw: int) -> None:
        self._tokens = iter(random_tokens(model, length + 3, draw))
        self._alone = _Alone(model)
        for _ in range(length - 1):
            self._alone.read([next(self._tokens)])
        self.caches = self._alone.caches

    def step(self) -> tuple[int, np.ndarray]:
        """The next token, and (V,) the logits after it alone."""
        token = next(self._tokens)
        return token, self._alone.read([token])[0]


def _side_by_side_difference(model: nn.Module, lengths: tuple[int, ...], joining: int | None, draw: int) -> float:
    """The largest difference of any row's logits at any step, side by side from alone."""
    rows = [_Row(model, length, 10 * draw + place) for place, length in enumerate(lengths)]
    if unbatchable(rows[0].caches) is not None:
        return float("inf")
    caches = merged([row.caches for row in rows])
    # A prompt has as many rows as completions. So here the second row is there twice.
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
    """The same token after each row, side by side and alone."""
    steps = {row: row.step() for row in dict.fromkeys(beside)}
    tokens, alone_BV = zip(*(steps[row] for row in beside), strict=True)
    beside_BV = _logits(model(mx.array(tokens)[:, None], cache=caches))[:, -1]
    return _difference(beside_BV, np.stack(alone_BV))


def _smallest_window(model: nn.Module) -> int | None:
    """How many tokens the model's narrowest cache holds, None where none forgets."""
    from mlx_lm.models.cache import make_prompt_cache

    def sizes(caches: Sequence[Any]) -> Iterator[int]:
        for cache in caches:
            yield from sizes(getattr(cache, "caches", ()))
            size = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
            if size is not None:
                yield int(size)

    try:
        return min(sizes(make_prompt_cache(model)), default=None)
    except Exception:  # it takes no cache
        return None


def _vocabulary(model: nn.Module) -> int:
    """The rows of its largest embedding."""
    return max(_embedding_sizes(model), default=_FEWEST_TOKENS)


def _embedding_sizes(model: nn.Module) -> list[int]:
    kinds = (nn.Embedding, nn.QuantizedEmbedding)
    return [module.weight.shape[0] for module in model.modules() if isinstance(module, kinds)]


def random_tokens(model: nn.Module, count: int, draw: int) -> list[int]:
    """Ids that every embedding of the model has, 0 left out: it is often a padding that models treat apart."""
    sizes = [size for size in _embedding_sizes(model) if size >= _FEWEST_TOKENS]
    limit = min(sizes, default=_FEWEST_TOKENS)
    result: list[int] = np.random.default_rng([draw, count]).integers(1, limit, count).tolist()
    return result


def _logits(logits_BTV: mx.array) -> np.ndarray:
    return np.array(logits_BTV.astype(mx.float32))


def _difference(found_TV: np.ndarray, expected_TV: np.ndarray) -> float:
    """Root mean square at the worst position, in standard deviations of the logits there. NaN when either is NaN."""
    apart_T = np.sqrt(np.mean((found_TV - expected_TV) ** 2, axis=-1))
    return float(np.max(apart_T / np.maximum(expected_TV.std(axis=-1), 1e-9)))


def is_half(model: nn.Module) -> bool:
    """Whether some of its numbers are of half precision."""
    return any(array.dtype in (mx.float16, mx.bfloat16) for _, array in named_arrays(model.parameters()))


def one_line(error: Exception) -> str:
    """What an error says, without line breaks and not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}…"
