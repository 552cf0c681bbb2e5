"""Which reward functions a run has, and what each of them is called with.

A reward function takes by name what it needs of N completions, and returns one number for each:

    def short(completions, answers, **columns): return [1.0 if len(text) < 80 else 0.0 for text in completions]

One that takes `completion` is called once for every completion and returns a number:

    def short(completion): return len(completion) < 80
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mlx_nb.config.fields import function_name
from mlx_nb.errors import ConfigError, did_you_mean
from mlx_nb.rollouts.rewards.builtin import REWARDS

# `prompt` and `answer`, the names of the columns, are also known to a function that takes all completions at once.
NAMES_FOR_ALL = ("prompts", "completions", "answers", "completion_tokens", "prompt", "answer")
RESERVED = ("spread",)
NAMES_FOR_ONE = ("prompt", "completion", "answer", "completion_tokens")


class PromptRow(Protocol):
    """The part of a row that a batch needs (`PromptExample`)."""

    @property
    def prompt(self) -> Any:
        """The prompt, as in the row."""

    @property
    def answer(self) -> Any:
        """The row's answer, None without one."""

    @property
    def columns(self) -> Mapping[str, Any]:
        """All other columns."""

    @property
    def row(self) -> int:
        """The row number."""


@dataclass(frozen=True)
class CompletionBatch:
    """N completions to be scored. Every field has one item per completion.

    prompts            text, or a list of messages: as in the row
    completions        text
    answers            the row's answer; None if it has none
    completion_tokens  token ids
    columns            {name: values} of the other columns; None if a row lacks the column
    rows               row numbers
    """

    prompts: Sequence[Any]
    completions: Sequence[str]
    answers: Sequence[Any]
    completion_tokens: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]
    rows: Sequence[int]

    def __post_init__(self) -> None:
        fields = (self.prompts, self.answers, self.completion_tokens, self.rows, *self.columns.values())
        if any(len(field) != len(self.completions) for field in fields):
            raise ValueError(f"every field of a CompletionBatch must have {len(self.completions)} items")

    def only(self, k: int) -> CompletionBatch:
        """The batch of completion k alone."""
        return CompletionBatch(
            prompts=[self.prompts[k]],
            completions=[self.completions[k]],
            answers=[self.answers[k]],
            completion_tokens=[self.completion_tokens[k]],
            columns={name: [values[k]] for name, values in self.columns.items()},
            rows=[self.rows[k]],
        )


def completion_batch(
    examples: Sequence[PromptRow],
    completions: Sequence[str],
    completion_tokens: Sequence[Sequence[int]],
    columns: Iterable[str],
) -> CompletionBatch:
    """A batch from completions and the row of each: `examples` has one item per completion, repeated within a group.

    `columns` are those of the whole split: a row that lacks one has None.
    """
    return CompletionBatch(
        prompts=[example.prompt for example in examples],
        completions=completions,
        answers=[example.answer for example in examples],
        completion_tokens=completion_tokens,
        columns={name: [example.columns.get(name) for example in examples] for name in columns},
        rows=[example.row for example in examples],
    )


@dataclass(frozen=True)
class Reward:
    """A reward function and its calling convention, read from its signature.

    word        what errors call it: a reward or a metric
    scores_one  called once per completion, with singular names
    takes       parameters that can be passed by name; needs: those of them without a default
    takes_all   it has **kwargs
    """

    name: str
    function: Callable[..., Any]
    scores_one: bool
    is_async: bool
    takes: tuple[str, ...]
    needs: tuple[str, ...]
    takes_all: bool
    word: str = "reward"

    def arguments(self, batch: CompletionBatch) -> dict[str, Any]:
        """The arguments for all completions of a batch: copies, which the function may change."""
        known = dict(batch.columns) | {
            "prompts": batch.prompts,
            "completions": batch.completions,
            "answers": batch.answers,
            "completion_tokens": batch.completion_tokens,
            "prompt": batch.prompts,
            "answer": batch.answers,
        }
        # Item by item: the completions of a group share the values of their row, and copies must not.
        return {name: [_copy(value) for value in values] for name, values in self._taken(known).items()}

    def arguments_for_one(self, batch: CompletionBatch, k: int) -> dict[str, Any]:
        """The arguments for completion k, if it scores one: copies as well."""
        known = {name: values[k] for name, values in batch.columns.items()} | {
            "prompt": batch.prompts[k],
            "completion": batch.completions[k],
            "answer": batch.answers[k],
            "completion_tokens": batch.completion_tokens[k],
        }
        return {name: _copy(value) for name, value in self._taken(known).items()}

    def _taken(self, known: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in known.items() if self.takes_all or name in self.takes}


def _copy(value: Any) -> Any:
    """A deep copy; the value itself if it cannot be copied (an open file, a lock). Tuples of ids become lists."""
    try:
        return list(value) if isinstance(value, tuple) else copy.deepcopy(value)
    except Exception:
        return value


def read_reward(name: str, function: Any, word: str = "reward") -> Reward:
    """The calling convention of a function. Raises ConfigError if it cannot be called by name."""
    if not callable(function) or isinstance(function, type):
        raise ConfigError(f"{word} {name} is a {type(function).__name__}, not a function.")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise ConfigError(
            f"{word} {name} has no signature that can be read. Wrap it in a function with `def`."
        ) from None
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise ConfigError(f"{word} {name} takes `{parameter.name}` by position only. Remove the `/` after it.")
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    takes = tuple(one.name for one in named)
    singular = {"prompt", "answer"} & set(takes) and not {"prompts", "completions", "answers"} & set(takes)
    return Reward(
        name=name,
        function=function,
        scores_one="completion" in takes or bool(singular),
        is_async=inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__),
        takes=takes,
        needs=tuple(one.name for one in named if one.default is one.empty),
        takes_all=any(one.kind is one.VAR_KEYWORD for one in parameters),
        word=word,
    )


def resolve_rewards(
    names: Iterable[Any], namespace: Mapping[str, Any], setting: str = "rewards", reserved: Collection[str] = RESERVED
) -> tuple[Reward, ...]:
    """The functions that `rewards:`, or another setting, names.

    names      callables, names of functions in the notebook or of built-in ones, and mappings such as `{regex: "^Yes"}`
    namespace  the notebook's variables; its functions take precedence over built-in ones
    reserved   names of other metrics, which no function may have

    Raises ConfigError for one that is unknown, not a function, has a wrong value, or has the name of another.
    """
    word = setting.removesuffix("s")
    entries = [names] if isinstance(names, (str, Mapping)) or callable(names) else list(names)
    if not entries:
        raise ConfigError(f"`{setting}` is empty. Name at least one {word} function.")
    rewards = tuple(_resolve(entry, namespace, setting, word) for entry in entries)
    for k, reward in enumerate(rewards):
        if reward.name in reserved:
            taken = f"reward_{reward.name}" if setting == "rewards" else reward.name
            raise ConfigError(f"`{setting}`: {taken} is a metric already. Give {reward.name} another name.")
        if reward.name in [earlier.name for earlier in rewards[:k]]:
            raise ConfigError(f"`{setting}` has {reward.name} twice. Give one of them a name of its own, with `def`.")
    return rewards


def _resolve(entry: Any, namespace: Mapping[str, Any], setting: str, word: str) -> Reward:
    if isinstance(entry, str):
        return _named(entry, namespace, word)
    if isinstance(entry, Mapping) and len(entry) == 1:
        return _with_value(*next(iter(entry.items())), word)
    if callable(entry):
        return read_reward(function_name(entry), entry, word)
    raise ConfigError(f"`{setting}` cannot hold {entry!r}. It takes names, functions, and mappings with one key.")


def _named(name: str, namespace: Mapping[str, Any], word: str) -> Reward:
    if callable(namespace.get(name)):
        return read_reward(name, namespace[name], word)
    if name in REWARDS:
        built_in = REWARDS[name]
        if built_in.example is not None:
            raise ConfigError(f"{word} {name} needs a value: `{name}: {built_in.example}`.")
        built_in.require(name)
        return read_reward(name, built_in.function, word)
    if name in namespace:
        raise ConfigError(f"{word} {name} is a {type(namespace[name]).__name__} in the notebook, not a function.")
    own = [known for known, value in namespace.items() if callable(value) and not known.startswith("_")]
    near = did_you_mean(name, [*own, *REWARDS])
    again = "" if near else f" If `{name}` is a function of yours, run the cell that defines it first."
    raise ConfigError(
        f"{word} {name!r} is neither a function of yours nor built in.{near}{again} Built in: {', '.join(REWARDS)}."
    )


def _with_value(name: Any, value: Any, word: str) -> Reward:
    with_value = [known for known, built_in in REWARDS.items() if built_in.example is not None]
    if name in with_value:
        return read_reward(name, REWARDS[name].function(value), word)
    if name in REWARDS:
        raise ConfigError(f"{word} {name} takes no value: write `{name}`.")
    raise ConfigError(
        f"{word} {name!r} with a value is not built in.{did_you_mean(str(name), with_value)} "
        f"With a value: {', '.join(with_value)}."
    )


def check_rewards(rewards: Sequence[Reward], weights: Sequence[float] | None, columns: Iterable[str]) -> None:
    """Raise ConfigError if a function needs a missing parameter, or the weights do not fit; calls nothing.

    weights  one for each reward; None = 1 for each
    columns  names of the columns of the rows besides prompt and answer
    """
    columns = list(columns)
    for reward in rewards:
        known = [*(NAMES_FOR_ONE if reward.scores_one else NAMES_FOR_ALL), *columns]
        for parameter in reward.needs:
            if parameter not in known:
                how = "scores one completion at a time" if reward.scores_one else "scores all completions at once"
                raise ConfigError(
                    f"{reward.word} {reward.name} requires parameter `{parameter}`, but no column or argument has that "
                    f"name. It {how} and can take: "
                    f"{', '.join(known)}.{did_you_mean(parameter, known)}"
                )
    if weights is None:
        return
    if len(weights) != len(rewards):
        names = ", ".join(reward.name for reward in rewards)
        raise ConfigError(f"`reward_weights` has {len(weights)} numbers for {len(rewards)} rewards ({names}).")
    if not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise ConfigError(f"`reward_weights` must be finite and not all 0, not {list(weights)}.")
