"""Plots of a history: a matplotlib figure, and a small SVG that is updated during training."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from mlx_nb.config.methods import Metric
from mlx_nb.errors import counted
from mlx_nb.events import SettingChanged
from mlx_nb.events.history import History, decimated, smoothed
from mlx_nb.view.curves.main_quantity import live_quantity, validations_of
from mlx_nb.view.curves.points import SHORT_RUN
from mlx_nb.view.metric_text import deciding, decimals, headline, main_metrics
from mlx_nb.view.theme import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mlx_nb.view.curves.shown_figure import ShownFigure

TRAIN_COLOR = "#0072B2"
VALID_COLOR = "#D55E00"
LEFT_COLOR = "#8A8A8A"
_LIVE_POINTS = 300
_NAMED_CHANGES = 3
_ANSWER_METRICS = 3  # drawn at most


def plot_history(
    history: History, title: str = "", metrics: Mapping[str, Metric] = MappingProxyType({})
) -> ShownFigure:
    """Loss (train raw and smoothed, validation with the best marked) above learning rate and gradient norm.

    For a method with rewards, the reward takes the place of the loss. The main metrics of the method are between
    them; `metrics` are those it declares. Uses the object interface, so no window opens and the global state of pyplot
    does not change. The background is transparent, for light and dark pages.
    """
    from mlx_nb.view.curves.shown_figure import ShownFigure
    from mlx_nb.view.curves.text_chart import text_chart

    large = live_quantity(history)
    measured = [*(name for name in metrics if name in history.step_metrics), *history.step_metrics]
    answers = history.answer_metrics[:_ANSWER_METRICS]
    small = [
        name for name in (*answers, *main_metrics(measured), *(["loss"] if large != "loss" else [])) if name != large
    ]
    heights = (2.2, 1.2, 1) if small else (2.2, 1)
    words = f"{title or 'run'}, {counted(len(history), 'update')}"
    figure = ShownFigure(words, (7.5, 6.2 if small else 4.6), text_chart(history))
    grid = figure.add_gridspec(len(heights), 6, height_ratios=heights)
    _draw_large(figure.add_subplot(grid[0, :]), history, large, title)
    width = 6 // max(1, len(small))
    for place, name in enumerate(small):
        axes = figure.add_subplot(grid[1, place * width : (place + 1) * width])
        _draw_metric(axes, history, name, metrics.get(name))
    for place, column in enumerate(("learning_rate", "gradient_norm")):
        axes = figure.add_subplot(grid[len(heights) - 1, 3 * place : 3 * place + 3])
        axes.plot(history["step"], history[column], color=LEFT_COLOR, linewidth=1.4)
        axes.set_ylabel(column.replace("_", " "), fontsize=8)
        axes.tick_params(labelsize=7)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useOffset=False)
        axes.yaxis.get_offset_text().set_fontsize(7)
    figure.finish()
    return figure


def _draw_large(axes: Axes, history: History, name: str, title: str) -> None:
    """The loss or the reward, with abandoned branches and changed settings."""
    for number, branch in enumerate(history.abandoned()):
        left = [row["step"] for row in branch], [row.get(name, math.nan) for row in branch]
        label = "_rewound" if number else "rewound"  # one entry in the legend
        axes.plot(*left, color=LEFT_COLOR, linewidth=1, linestyle=":", marker=".", markersize=3, label=label)
    _draw_updates(axes, history, name)
    _draw_validation(axes, validations_of(history, name))
    _mark_best(axes, history, name)
    _make_room_for_left(axes)
    _mark_changes(axes, history)
    in_nats = not history.step_metrics and all(row["perplexity"] is not None for row in history.evaluations())
    axes.set_ylabel("loss (nats per token)" if in_nats else name)
    axes.set_xlabel("update")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    if title:
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")


def _draw_updates(axes: Axes, history: History, name: str) -> None:
    """A quantity at the updates that have it, and smoothed."""
    known = [(step, value) for step, value in zip(history["step"], history[name]) if not math.isnan(value)]
    if known:
        steps, values = zip(*known)
        strong, faint = (1.8, 1.0), (1.0, 0.8)  # width and opacity
        # The average of a few updates mostly reflects the first one, so it is drawn faintly.
        each, average = (strong, faint) if len(values) < SHORT_RUN else (faint, strong)
        for heights, (width, opacity), label in (
            (values, each, "train, each update"),
            (smoothed(values), average, "train, smoothed"),
        ):
            axes.plot(steps, heights, color=TRAIN_COLOR, linewidth=width, alpha=opacity, label=label)


def _draw_metric(axes: Axes, history: History, name: str, metric: Metric | None) -> None:
    """One metric in updates and validations; its healthy direction is in the title."""
    if name in history.columns:
        _draw_updates(axes, history, name)
    rows = [row for row in history.evaluations("valid") if name != "loss" or headline(row)[0] == "loss"]
    _draw_validation(axes, [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))])
    healthy = metric.healthy if metric else ""
    axes.set_title(name.replace("_", " "), loc="left", fontsize=8)
    if healthy:
        axes.set_title(f"healthy: {healthy}", loc="right", fontsize=7)
    axes.tick_params(labelsize=7)


def _draw_validation(axes: Axes, valid: list[tuple[int, float]]) -> None:
    """Validations as (update, value)."""
    if valid:
        axes.plot(
            [step for step, _ in valid],
            [value for _, value in valid],
            color=VALID_COLOR,
            marker="o",
            markersize=4,
            linewidth=1.5,
            linestyle="--",
            label="validation",
        )


def _mark_best(axes: Axes, history: History, name: str) -> None:
    """Mark the best validation, as in the summary, with a ring, and write its value above the axes."""
    best = history.best_validation
    if best is None or deciding(best)[0] != name:
        return
    value = deciding(best)[1]
    axes.plot([best["step"]], [value], "o", markersize=9, markerfacecolor="none", markeredgecolor=VALID_COLOR)
    axes.annotate(
        f"best {decimals(value)}",
        (1, 1),
        xycoords="axes fraction",
        textcoords="offset points",
        xytext=(0, 6),
        ha="right",
        fontsize=8,
        color=VALID_COLOR,
    )


def _make_room_for_left(axes: Axes) -> None:
    """Extend the axes to include abandoned branches, as long as the current curve keeps a third of the height."""
    values: dict[bool, list[float]] = {True: [], False: []}
    for line in axes.get_lines():
        heights = [float(value) for value in np.asarray(line.get_ydata(), float) if math.isfinite(value)]
        values[str(line.get_label()).endswith("rewound")] += heights
    if values[True] and values[False]:
        low, high = _value_range(values[False])
        axes.set_ylim(*room_for_left(low, high, values[True]))


def room_for_left(low: float, high: float, left: list[float]) -> tuple[float, float]:
    """The range `low` to `high`, extended to the values of `left` by at most its own size on each side."""
    span, margin = high - low, 0.05 * (high - low)
    return (
        max(low - span, min(low, min(left) - margin)),
        min(high + span, max(high, max(left) + margin)),
    )


def _mark_changes(axes: Axes, history: History) -> None:
    """A thin line at each changed setting, labeled at the top; only the last few are labeled."""
    changes = [event for event in history.in_effect if isinstance(event, SettingChanged)]
    for number, event in enumerate(changes):
        axes.axvline(event.step, color=LEFT_COLOR, linewidth=0.8, linestyle="--", zorder=0)
        if number >= len(changes) - _NAMED_CHANGES:
            axes.annotate(
                f"{event.name} {event.new:g}" if isinstance(event.new, float) else f"{event.name} {event.new}"[:40],
                (event.step, 1.0),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                xytext=(3, -9 - 9 * (number % _NAMED_CHANGES)),
                fontsize=7,
                color=INK,
            )


def live_svg(history: History, iters: int, width: int = 560, height: int = 150) -> str:
    """The curve of the loss or the reward as a small SVG string, in under 1 ms and 10 KB for any run.

    Text uses the page's color, for light and dark themes. Empty before the first two updates.
    """
    name = live_quantity(history)
    steps, values = history["step"], history[name]
    heights = values if len(values) < SHORT_RUN else smoothed(values)
    points = [(step, value) for step, value in zip(steps, heights) if math.isfinite(value)]
    if len(points) < 2:
        return ""
    points = [points[index] for index in decimated(len(points), _LIVE_POINTS)]
    valid = validations_of(history, name)
    low, high = _value_range([value for _, value in points + valid])
    left, top, bottom = 44, 10, height - 20

    def place(step: float, value: float) -> tuple[float, float]:
        x = left + (width - left - 10) * step / max(iters, 1)
        y = bottom - (bottom - top) * (min(value, high) - low) / (high - low)
        return round(x, 1), round(y, 1)

    def line(series: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x},{y}" for x, y in (place(*point) for point in series))

    label = 'fill="currentColor" font-size="10" font-family="sans-serif" opacity="0.75"'
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="100%" style="max-width:{width}px;display:block" role="img" '
        f'aria-label="{html.escape(f"training {name}, now {values[-1]:.3f}", quote=True)}">',
        f'<line x1="{left}" y1="{bottom}" x2="{width - 10}" y2="{bottom}" stroke="currentColor" opacity="0.3"/>',
        f'<text x="{left - 5}" y="{top + 6}" text-anchor="end" {label}>{high:.2f}</text>',
        f'<text x="{left - 5}" y="{bottom}" text-anchor="end" {label}>{low:.2f}</text>',
        f'<text x="{left}" y="{height - 6}" {label}>0</text>',
        f'<text x="{width - 10}" y="{height - 6}" text-anchor="end" {label}>{iters} updates</text>',
        f'<polyline points="{line(points)}" fill="none" stroke="{TRAIN_COLOR}" stroke-width="2"/>',
    ]
    if valid:
        parts.append(
            f'<polyline points="{line(valid)}" fill="none" stroke="{VALID_COLOR}" stroke-width="1.5" '
            'stroke-dasharray="5 3"/>'
        )
        parts += [
            f'<circle cx="{x}" cy="{y}" r="3" fill="{VALID_COLOR}"/>' for x, y in (place(*point) for point in valid)
        ]
    return "".join([*parts, "</svg>"])


def _value_range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin
