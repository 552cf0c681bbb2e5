"""Metrics of what the model answers: greedy answers to rows, and the scores that metric functions give them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.nn as nn
import numpy as np

from mlx_nb.data.examples.prompt import PromptExample
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.data.rows.questions import NoReference
from mlx_nb.errors import DataError, counted
from mlx_nb.events import Event, Progress
from mlx_nb.model.limits import limits_of
from mlx_nb.process.interruptible import Interruptible
from mlx_nb.process.pieces import relayed
from mlx_nb.rollouts.intervals import Estimate, estimate
from mlx_nb.rollouts.rewards.resolve import Reward, check_rewards, completion_batch
from mlx_nb.rollouts.rewards.score import score_completions
from mlx_nb.rollouts.sampling import SamplingSettings, sampling_each

# Rows answered side by side. Which rows share a batch is a function of the rows alone, so that answers that were
# interrupted and continued are those of one go, bit for bit.
ROWS_AT_ONCE = 32
SECONDS_FOR_A_BATCH = 600.0  # for an asynchronous function, such as a judge; then it is cancelled
_REFUSALS = 3  # rows without a question that are named

Ask = Callable[[str, int], PromptExample]  # (split, row) -> its question; raises DataError


class Answer(NamedTuple):
    """A greedy answer: its text, its tokens, and whether it ended before the limit."""

    text: str
    tokens: list[int]
    finished: bool


class KeptAnswers(Protocol):
    """Answers kept from earlier evaluations, in batches by a key of everything that they depend on."""

    def read(self, key: str) -> list[Answer] | None:
        """The answers of a batch; None if they are not there."""

    def write(self, key: str, answers: Sequence[Answer]) -> None:
        """Keep the answers of a batch."""


@dataclass(frozen=True, eq=False)
class Answered:
    """The questions of N rows with their answers, and the values that F metric functions gave them.

    values_NF  float64, NaN where a function gave no number
    """

    questions: list[PromptExample]
    answers: list[Answer]
    names: list[str]
    values_NF: np.ndarray
    problems: tuple[str, ...]

    @property
    def rows(self) -> list[int]:
        """The numbers of the rows."""
        return [question.row for question in self.questions]

    @property
    def estimates(self) -> dict[str, Estimate]:
        """The mean of each metric that gave a number, with its interval."""
        found = {name: estimate(values_N.tolist()) for name, values_N in zip(self.names, self.values_NF.T)}
        return {name: one for name, one in found.items() if one.rows}


class AnswerMetrics:
    """Answers rows greedily and scores the answers with `metrics`. Uses no random numbers and changes no state.

    `ask` gives the question of a row. `user_code` is entered while a metric function runs, so that it can be
    interrupted.
    """

    def __init__(self, metrics: Sequence[Reward], ask: Ask, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.metrics = tuple(metrics)
        self.user_code = Interruptible()
        self._ask = ask
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._asked: dict[tuple[str, int], PromptExample] = {}  # read once, though the data may change later

    def check(self, split: str, rows: Sequence[int]) -> None:
        """Raise ConfigError or DataError as `measure` does, without answering."""
        questions, _ = self._questions(split, rows)
        check_rewards(self.metrics, None, _columns(questions))

    def measure(
        self,
        step: int,
        split: str,
        rows: Sequence[int],
        model: nn.Module,
        kept: KeptAnswers | None = None,
    ) -> Generator[Event, None, Answered]:
        """Answer and score `rows` of `split`, yielding Progress.

        Rows without a question are left out and named, except answers labeled false. Raises DataError if that is all of
        them, ConfigError if a function needs a column that the rows do not have.
        """
        questions, refusals = self._questions(split, list(dict.fromkeys(rows)))
        check_rewards(self.metrics, None, _columns(questions))
        positions = limits_of(model).positions
        answers: list[Answer] = []
        for start in range(0, len(questions), ROWS_AT_ONCE):
            yield Progress(step, f"{split} answers", start, len(questions))
            prompts = [one.prompt_tokens.tolist() for one in questions[start : start + ROWS_AT_ONCE]]
            key = hashlib.sha256(json.dumps([self._max_tokens, prompts]).encode()).hexdigest()
            batch = None if kept is None else kept.read(key)
            if batch is None:
                batch = yield from relayed(
                    self._answer(model, prompts, positions),
                    _progress(step, f"{split} answers", start, len(questions)),
                )
                if kept is not None:
                    kept.write(key, batch)
            answers += batch
        values_NF, problems = yield from self._score(step, questions, answers)
        names = [metric.name for metric in self.metrics]
        return Answered(questions, answers, names, values_NF, (*refusals, *problems))

    def _questions(self, split: str, rows: Sequence[int]) -> tuple[list[PromptExample], list[str]]:
        questions, refusals = [], []
        for row in rows:
            try:
                if (split, row) not in self._asked:
                    self._asked[split, row] = self._ask(split, row)
                questions.append(self._asked[split, row])
            except NoReference:
                continue
            except DataError as error:
                refusals.append(f"not evaluated: {error}")
        if not questions:
            raise DataError(refusals[0] if refusals else f"there are no rows in the {split} split to ask.")
        more = len(refusals) - _REFUSALS
        rest = [f"Not evaluated: {counted(more, 'more row')}."] if more > 0 else []
        return questions, [*refusals[:_REFUSALS], *rest]

    def _answer(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], positions: int | None
    ) -> Generator[float, None, list[Answer]]:
        """Answer some prompts side by side, yielding how many of them are done, by the tokens that may be needed."""
        most = self._max_tokens
        room = [most if positions is None else positions - len(prompt) for prompt in prompts]
        sampling = sampling_each(model, self._tokenizer, prompts, SamplingSettings(most, 0.0), 0, room)
        completions = yield from relayed(sampling, lambda tokens: sum(map(len, tokens)) / most)
        return [Answer(one.text, one.tokens.tolist(), one.finished) for one in completions]

    def _score(
        self, step: int, questions: Sequence[PromptExample], answers: Sequence[Answer]
    ) -> Generator[Event, None, tuple[np.ndarray, list[str]]]:
        texts, tokens = [answer.text for answer in answers], [answer.tokens for answer in answers]
        batch = completion_batch(questions, texts, tokens, _columns(questions))
        scoring = score_completions(self.metrics, None, batch, timeout=SECONDS_FOR_A_BATCH)
        scores = yield from relayed(
            scoring, lambda at: Progress(step, f"metric {at.function}", at.done, at.total), within=self.user_code
        )
        return scores.rewards_NF, [problem.error for problem in scores.problems]


def _progress(step: int, what: str, before: int, total: int) -> Callable[[float], Event]:
    """The Progress of a batch that comes after `before` rows, from how many of its rows are done."""
    return lambda done: Progress(step, what, before + int(done), total)


def _columns(questions: Sequence[PromptExample]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for question in questions for name in question.columns))


def measured_by(estimates: dict[str, Estimate]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The values, and the intervals that are known, of estimates by name."""
    values = {name: one.value for name, one in estimates.items()}
    return values, {name: [one.low, one.high] for name, one in estimates.items() if math.isfinite(one.low)}
