"""History to pictures: a matplotlib figure that stays, and a small SVG that moves while training."""

from __future__ import annotations

import html
import math
from io import BytesIO
from typing import TYPE_CHECKING

from mlx_nb.events import SettingChanged
from mlx_nb.view.history import History, decimated, smoothed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAIN_COLOR = "#0072B2"
VALID_COLOR = "#D55E00"
LEFT_COLOR = "#8A8A8A"
_LIVE_POINTS = 300
_NAMED_CHANGES = 3


def plot_history(history: History, title: str = "") -> Figure:
    """Loss (train raw and smoothed, validation with the best marked) above learning rate and gradient norm.

    Made with the object interface, so no window opens and no global state of pyplot changes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(2.2, 1))
    loss, rate, norm = (
        figure.add_subplot(grid[0, :]),
        figure.add_subplot(grid[1, 0]),
        figure.add_subplot(grid[1, 1]),
    )
    steps = history["step"]
    values = history["loss"]
    for branch in history.abandoned():
        left = [row["step"] for row in branch], [row["loss"] for row in branch]
        loss.plot(*left, color=LEFT_COLOR, linewidth=1, linestyle=":", marker=".", markersize=3, label="rewound")
    if steps:
        loss.plot(steps, values, color=TRAIN_COLOR, alpha=0.3, linewidth=1, label="train, each update")
        loss.plot(steps, smoothed(values), color=TRAIN_COLOR, linewidth=1.8, label="train, smoothed")
    _draw_validation(loss, history)
    _mark_changes(loss, history)
    loss.set_ylabel("loss (nats per token)")
    loss.set_xlabel("update")
    if steps or history.evaluations():
        loss.legend(frameon=False, fontsize=8)
    if title:
        loss.set_title(title, loc="left", fontsize=10, fontweight="bold")
    for axes, column, label in (
        (rate, "learning_rate", "learning rate"),
        (norm, "gradient_norm", "gradient norm"),
    ):
        axes.plot(steps, history[column], color="#444444", linewidth=1.2)
        axes.set_ylabel(label, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        axes.yaxis.get_offset_text().set_fontsize(7)
    for axes in (loss, rate, norm):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    return figure


def _draw_validation(axes, history: History) -> None:
    valid = history.evaluations("valid")
    if not valid:
        return
    axes.plot(
        [row["step"] for row in valid],
        [row["loss"] for row in valid],
        color=VALID_COLOR,
        marker="o",
        markersize=4,
        linewidth=1.5,
        linestyle="--",
        label="validation",
    )
    best = min(valid, key=lambda row: row["loss"])
    axes.annotate(
        f"best {best['loss']:.3f}",
        (best["step"], best["loss"]),
        textcoords="offset points",
        xytext=(0, 9),
        ha="right" if best["step"] else "left",
        fontsize=8,
        color=VALID_COLOR,
    )


def _mark_changes(axes, history: History) -> None:
    """A thin line where a setting was changed, named at its top; of many changes, only the last are named."""
    changes = [event for event in history.standing if isinstance(event, SettingChanged)]
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
                color="#555555",
            )


def figure_png(figure: Figure) -> bytes:
    """The figure as PNG bytes."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def live_svg(history: History, iters: int, width: int = 560, height: int = 150) -> str:
    """The loss curve as a small SVG string, under a millisecond and 10 KB whatever the length of the run.

    Text takes the page's colour, so it reads on light and dark themes. Empty before the first two updates.
    """
    steps, losses = history["step"], history["loss"]
    points = [(step, value) for step, value in zip(steps, smoothed(losses)) if math.isfinite(value)]
    if len(points) < 2:
        return ""
    points = [points[index] for index in decimated(len(points), _LIVE_POINTS)]
    valid = [(row["step"], row["loss"]) for row in history.evaluations("valid") if math.isfinite(row["loss"])]
    low, high = _value_range([value for _, value in points + valid])
    left, top, bottom = 44, 10, height - 20

    def place(step: float, value: float) -> tuple[float, float]:
        x = left + (width - left - 10) * step / max(iters, 1)
        y = bottom - (bottom - top) * (min(value, high) - low) / (high - low)
        return round(x, 1), round(y, 1)

    def line(series: list[tuple[float, float]]) -> str:
        return " ".join(f"{x},{y}" for x, y in (place(*point) for point in series))

    label = 'fill="currentColor" font-size="10" font-family="sans-serif" opacity="0.75"'
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="100%" style="max-width:{width}px;display:block" role="img" '
        f'aria-label="{html.escape(f"training loss, now {losses[-1]:.3f}", quote=True)}">',
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
    return max(0.0, low - margin), high + margin
