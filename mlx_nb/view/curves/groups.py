"""The charts that the panel offers for a run: their labels, help and lines. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from mlx_nb.config.methods import Metric
from mlx_nb.view.metric_text import SECONDS, main_metrics

LOSS, NATS = "loss", "loss (nats per token)"
QUANTITIES = {
    "learning rate": "learning rate",
    "gradient norm": "gradient norm (L2, before clipping)",
    "tokens per second": "tokens per second",
    "memory (GB)": "peak memory (GB)",
}
# Pairs of metrics that share a chart.
PAIRS = {
    "rewards": ("reward_chosen", "reward_rejected"),
    "log-probabilities": ("logprob_chosen", "logprob_rejected"),
    "rewards by label": ("reward_desirable", "reward_undesirable"),
}
_BEST = {"up": "high", "down": "low"}


class Line(NamedTuple):
    """One line: its name, its role (how it is drawn), and its column in the updates or the validations."""

    name: str
    role: str
    column: str
    of_validation: bool = False
    smooth: bool = False


class Group(NamedTuple):
    """One chart. `best` says which validation is best: low, high, or empty."""

    name: str
    label: str
    help: str
    best: str
    lines: tuple[Line, ...]

    @property
    def columns(self) -> list[str]:
        """The distinct columns of the updates that it shows."""
        return list(dict.fromkeys(line.column for line in self.lines if not line.of_validation and line.role != "raw"))


def groups_of(
    measured: Sequence[str],
    validated: Collection[str],
    metrics: Mapping[str, Metric],
    *,
    in_nats: bool,
    judged: Sequence[str] = (),
) -> list[Group]:
    """The charts for the metrics that were `measured` in updates and `validated`.

    `judged` are metrics of answers, which only validations measure. The loss, these and the declared `metrics` of the
    method come first, then the quantities of every run, other metrics, and times.
    """
    declared = [name for name in metrics if name in measured]
    pairs = {name: pair for name, pair in PAIRS.items() if set(pair) <= set(declared) and name not in measured}
    paired = {column for pair in pairs.values() for column in pair}
    alone = [name for name in declared if name not in paired]
    first = main_metrics(alone)
    others = [name for name in measured if name not in metrics]
    times = [name for name in others if name.startswith(SECONDS)]
    singles = {name: _single(name, name in first, name in validated, metrics) for name in (*alone, *others)}
    return [
        _loss(in_nats),
        *(_of_answers(name) for name in judged),
        *(singles[name] for name in first),
        *(_pair(name, pair, validated, metrics) for name, pair in pairs.items()),
        *(singles[name] for name in alone if name not in first),
        *(Group(name, label, "", "", (Line(name, "train", name),)) for name, label in QUANTITIES.items()),
        *(singles[name] for name in others if name not in times),
        *(singles[name] for name in times),
    ]


def first_groups(groups: Sequence[Group], metrics: Mapping[str, Metric]) -> list[str]:
    """Names of the most informative charts for a method that declares `metrics`."""
    names = [group.name for group in groups]
    answers = [group.name for group in groups if all(line.of_validation for line in group.lines)]
    return [
        LOSS,
        *answers,
        *main_metrics(name for name in metrics if name in names),
        *(name for name in PAIRS if name in names),
    ]


def _loss(in_nats: bool) -> Group:
    lines = (
        Line("train, each update", "raw", LOSS),
        Line("train, smoothed", "train", "smoothed"),
        Line("validation", "valid", LOSS, of_validation=True),
    )
    return Group(LOSS, NATS if in_nats else LOSS, "", "low", lines)


def _of_answers(name: str) -> Group:
    line = Line("validation", "valid", name, of_validation=True)
    return Group(name, name.replace("_", " "), "mean over the answers to the validation rows", "high", (line,))


def _single(name: str, main: bool, validated: bool, metrics: Mapping[str, Metric]) -> Group:
    lines = [Line(name, "train", name)]
    if main:
        lines = [Line("train, each update", "raw", name), Line("train, smoothed", "train", name, smooth=True)]
    if validated:
        lines.append(Line("validation", "valid", name, of_validation=True))
    known = metrics.get(name)
    label = name if known is None else name.replace("_", " ")
    return Group(name, label, _words(known), _BEST.get(known.healthy, "") if known else "", tuple(lines))


def _pair(name: str, pair: tuple[str, str], validated: Collection[str], metrics: Mapping[str, Metric]) -> Group:
    lines = []
    for column, role, valid_role in zip(pair, ("train", "second"), ("valid-first", "valid-second")):
        which = column.rpartition("_")[2]
        lines.append(Line(f"{which}, smoothed", role, column, smooth=True))
        if column in validated:
            lines.append(Line(f"{which}, validation", valid_role, column, of_validation=True))
    helps = " · ".join(_words(metrics[column]) for column in pair)
    return Group(name, name, helps, "", tuple(lines))


def _words(metric: Metric | None) -> str:
    """The help of a metric, with its healthy direction."""
    if metric is None:
        return ""
    return f"{metric.help}; healthy: {metric.healthy}" if metric.healthy else metric.help
