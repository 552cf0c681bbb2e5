"""Compares runs on the same rows: paired differences with intervals, and the rows that became worse or better."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_nb.errors import CommandError
from mlx_nb.events import Event
from mlx_nb.experiments.blind import BlindVote
from mlx_nb.experiments.comparison import LOSS, Comparison, Difference, RowChange
from mlx_nb.experiments.contestants import Contestant, contestants, differing_rows, other_rows, rows_of_split
from mlx_nb.experiments.display import RowComparison, comparison_html, comparison_text, curves_figure
from mlx_nb.rollouts.intervals import paired, ratio
from mlx_nb.run.run import Run
from mlx_nb.train.answer_metrics import Answered, AnswerMetrics
from mlx_nb.train.interrupts import Interrupts

if TYPE_CHECKING:
    from mlx_nb.view.curves.shown_figure import ShownFigure


class ShownComparison(Comparison):
    """A comparison that displays itself."""

    def row(self, row: int) -> RowComparison:
        """One row token by token, colored by the change of its loss, with the answers to it; displays itself."""
        if row not in self.examples:
            raise CommandError(f"row {row} was not compared. There are {', '.join(map(str, self.examples))}.")
        return RowComparison(self, row)

    def blind(self, seed: int = 0) -> BlindVote:
        """The answers of the last two names in random order, to vote on without knowing whose they are."""
        return BlindVote(self, seed)

    def curves(self) -> ShownFigure:
        """The losses of the runs over each other, as a matplotlib Figure that displays itself."""
        return curves_figure(self.runs)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": repr(self), "text/html": comparison_html(self)}

    def __repr__(self) -> str:
        return comparison_text(self)


def compare(
    *runs: Run,
    base: bool = False,
    split: str = "valid",
    rows: Any = None,
    metrics: Any = None,
    max_tokens: int = 128,
    answers: int = 3,
    on_progress: Callable[[Event], None] | None = None,
) -> ShownComparison:
    """Compare two runs, or one with its `base`, on the fixed rows of `split`: `compare(a, b)`.

    The loss of every row is measured for each, and `metrics` judge their greedy answers to all of the rows, as in
    `Run.evaluate`. Without metrics, the `answers` rows that became worse most, and as many that became better, are
    answered. The rows are those of the first run, or `rows`: anything that the setting `data` takes, or `"general"`,
    48 rows of the package that show what a run forgot; a column `group` gives each group a number of its own.
    `on_progress` takes the progress. Nothing is changed. Raises CommandError for runs that train at the moment or have
    different tokenizers, DataError for rows that cannot be measured.
    """
    if not runs or len(runs) + base < 2:
        raise CommandError("compare takes two runs, or one run with base=True.")
    names = [run.name for run in runs]
    if len({id(run) for run in runs}) > 1 and len(set(names)) < len(names):
        raise CommandError(f"two of the runs are called {names[0]}. Give one of them another name.")
    with Interrupts(lambda pause: None) as interrupts:
        work = _comparing(list(runs), base, split, rows, metrics, max_tokens, answers)
        try:
            while not interrupts.count:
                event = next(work)
                if on_progress is not None:
                    on_progress(event)
        except StopIteration as ended:
            found: ShownComparison = ended.value
            return found
        finally:
            work.close()
    raise KeyboardInterrupt


def _comparing(
    runs: list[Run], base: bool, split: str, others: Any, metrics: Any, max_tokens: int, answers: int
) -> Generator[Event, None, ShownComparison]:
    first = runs[0]
    chosen = rows_of_split(first, split) if others is None else other_rows(first, others)
    asking = (chosen.ask, first.tokenizer, max_tokens)
    judged = AnswerMetrics(first.inputs.metric_functions(metrics), *asking) if metrics is not None else None
    rows = chosen.examples
    there = contestants(runs, base)
    losses: dict[str, dict[int, np.ndarray]] = {}
    for one in there:
        if one.name not in losses:
            measured = yield from one.row_losses(rows)
            losses[one.name] = {example.row: loss for example, loss in zip(rows, measured)}
    examples = {example.row: example for example in rows}
    notes = differing_rows(runs, split) if others is None else []
    names, words = [one.name for one in there], split if others is None else chosen.words
    found = ShownComparison(runs, names, words, examples, losses, [], notes=notes, groups=chosen.groups)
    pairs = [(one.name, other.name) for k, one in enumerate(there) for other in there[k + 1 :]]
    if judged is not None:
        yield from _answer(found, there, judged, list(examples))
    found.differences = [_difference(found, before, after) for before, after in pairs]
    if judged is None and answers:
        changed = found.differences[-1].rows
        ends = list(dict.fromkeys(row.row for row in (*changed[:answers], *changed[-answers:])))
        yield from _answer(found, there, AnswerMetrics((), *asking), ends)
    return found


def _answer(
    found: Comparison, there: Sequence[Contestant], metrics: AnswerMetrics, rows: Sequence[int]
) -> Generator[Event, None, None]:
    """Fill in the answers of all contestants to some rows, with their scores."""
    for one in there:
        if one.name in found.answers:
            continue
        answered: Answered = yield from one.answers(metrics, found.split, rows)
        found.answers[one.name] = dict(zip(answered.rows, (answer.text for answer in answered.answers)))
        for name, values_N in zip(answered.names, answered.values_NF.T.tolist()):
            found.scores.setdefault(name, {})[one.name] = dict(zip(answered.rows, values_N))
        found.references |= {question.row: question.answer for question in answered.questions}
        found.prompts |= {question.row: question.prompt for question in answered.questions}
        found.notes += [f"{one.name}: {problem}" for problem in answered.problems]


def _difference(found: Comparison, before: str, after: str) -> Difference:
    changes, sums, units = [], [], []
    in_groups: dict[str, tuple[list[float], list[float]]] = {}
    for row, example in found.examples.items():
        weight = example.loss_mask
        total = float(weight[1:].sum())
        one, other = (
            float((found.token_losses[name][row][1:] * weight[1:]).sum()) / total if total else math.nan
            for name in (before, after)
        )
        changes.append(RowChange(row, one, other))
        if total:
            sums.append((other - one) * total)
            units.append(total)
            if row in found.groups:
                of_group = in_groups.setdefault(found.groups[row], ([], []))
                of_group[0].append(sums[-1])
                of_group[1].append(total)
    estimates = {LOSS: ratio(sums, units)} if units else {}
    estimates |= {f"{LOSS}, {group}": ratio(*numbers) for group, numbers in in_groups.items()}
    for name, by_name in found.scores.items():
        rows = list(by_name[before])
        values = ([by_name[who].get(row, math.nan) for row in rows] for who in (before, after))
        estimates[name] = paired(*values)
    by_metric = next(iter(found.scores.values()), {})

    def worse(change: RowChange) -> float:
        if not math.isnan(change.change):
            return change.change
        fell = by_metric.get(before, {}).get(change.row, 0.0) - by_metric.get(after, {}).get(change.row, 0.0)
        return 0.0 if math.isnan(fell) else fell

    return Difference(before, after, estimates, sorted(changes, key=worse, reverse=True))
