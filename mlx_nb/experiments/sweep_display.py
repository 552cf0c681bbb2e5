"""Shows a sweep: a table of its runs, curves as small multiples, and a heat map."""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from mlx_nb.errors import CommandError, shortened
from mlx_nb.events.history import smoothed
from mlx_nb.experiments.display import COLORS
from mlx_nb.experiments.sweep_space import SEED
from mlx_nb.view.event_text import setting_words

if TYPE_CHECKING:
    from mlx_nb.run.run import Run
    from mlx_nb.view.curves.shown_figure import ShownFigure

_CELL = "text-align:left;padding:2px 12px 2px 0;white-space:nowrap"
_LONGEST_VALUE = 24


class ShownTrial(Protocol):
    """The part of a trial that is shown."""

    run: Run
    values: dict[str, Any]
    dropped_at: int | None
    failure: str

    def best(self, until: int | None = None) -> tuple[float, int] | None:
        """(value, update) of its best validation."""

    def score(self, until: int | None = None) -> float:
        """The number that ranks it, lower is better."""


class Shown(NamedTuple):
    """What is shown of a sweep."""

    name: str
    axes: Mapping[str, list[Any]]
    trials: Sequence[Any]
    ranked: Sequence[Any]
    budget: str
    seconds_left: float | None
    repeats: Callable[[Any], Sequence[Any]]


def short_name(setting: str) -> str:
    """The last part of a name: `rank` of `lora_parameters.rank`."""
    return setting.rpartition(".")[2]


def _value_words(value: Any) -> str:
    return shortened(setting_words(value), _LONGEST_VALUE)


def _state(trial: ShownTrial) -> str:
    if trial.failure:
        return f"failed: {shortened(trial.failure, 60)}"
    if trial.dropped_at is not None:
        return f"dropped at {trial.dropped_at}"
    return "finished" if trial.run.finished else "-"


def _rows(shown: Shown) -> list[list[str]]:
    """The table, the best run first, with a head."""
    by = shown.trials[0].run.config.best_by or "loss"
    seeds = SEED in shown.axes
    head = ["run", *map(short_name, shown.axes), "update", "training loss", f"best validation {by.replace('_', ' ')}"]
    rows = [[*head, *(["mean over seeds"] if seeds else []), "state"]]
    for trial in shown.ranked:
        last, best = trial.run.history.last_step, trial.best()
        row = [trial.run.name, *(_value_words(trial.values[name]) for name in shown.axes)]
        row += [str(trial.run.step_count), f"{last.loss:.4f}" if last else "-"]
        row.append("-" if best is None else f"{best[0]:.4f} at {best[1]}")
        if seeds:
            found = [one.best() for one in shown.repeats(trial)]
            values = [one[0] for one in found if one is not None]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            row.append(f"{statistics.fmean(values):.4f}{spread}" if values else "-")
        rows.append([*row, _state(trial)])
    return rows


def _remarks(shown: Shown) -> list[str]:
    lines = [shown.budget]
    left = shown.seconds_left
    if left:
        lines.append(f"about {left / 60:.0f} min left" if left > 90 else f"about {left:.0f} s left")
    if math.isfinite(shown.ranked[0].score()):
        best = shown.ranked[0]
        values = ", ".join(f"{short_name(name)} {_value_words(best.values[name])}" for name in shown.axes)
        lines.append(f"best: {best.run.name} ({values}), in {best.run.folder}")
    return lines


def sweep_text(shown: Shown) -> str:
    """The table of a sweep as text, the best run first."""
    rows = _rows(shown)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, *_remarks(shown)])


def sweep_html(shown: Shown) -> str:
    """The table of a sweep with its curves as HTML."""
    lines = [
        "<tr>" + "".join(f'<t{kind} style="{_CELL}">{escape(text)}</t{kind}>' for text in row) + "</tr>"
        for kind, row in zip(["h", *"d" * len(shown.trials)], _rows(shown))
    ]
    parts = [f'<table style="border:none;font-size:.9em">{"".join(lines)}</table>']
    parts += [f"<div>{escape(line)}</div>" for line in _remarks(shown)]
    if any(len(trial.run.history) for trial in shown.trials):
        picture = base64.b64encode(small_multiples(shown)._repr_png_()).decode()
        parts.append(f'<img alt="losses of the runs by update" src="data:image/png;base64,{picture}">')
    return "".join(parts)


def small_multiples(shown: Shown) -> ShownFigure:
    """Training loss above validation, by update: lines by the first swept setting, a column for each of the second."""
    from mlx_nb.view.curves.shown_figure import ShownFigure

    names = [name for name in shown.axes if name != SEED] or list(shown.axes)
    lines, columns = names[0], names[1] if len(names) > 1 else None
    groups: list[Any] = [None] if columns is None else _tried(shown, columns)
    values = _tried(shown, lines)
    by = shown.trials[0].run.config.best_by or "loss"
    figure = ShownFigure(f"losses of the runs of {shown.name}", (max(4.5, 3.0 * len(groups)), 5.0))
    grid = figure.subplots(2, len(groups), squeeze=False, sharex=True, sharey="row")
    for place, group in enumerate(groups):
        above, below = grid[0][place], grid[1][place]
        for trial in shown.trials:
            if columns is not None and trial.values[columns] != group:
                continue
            color = COLORS[values.index(trial.values[lines]) % len(COLORS)]
            label = f"{short_name(lines)} {_value_words(trial.values[lines])}"
            known = {text.get_label() for text in above.get_lines()}
            history = trial.run.history
            shape = {"color": color, "marker": "o", "markersize": 3 if len(history) == 1 else 0}
            named = f"_{label}" if label in known else label
            above.plot(history["step"], smoothed(history["loss"]), label=named, **shape)
            valid = [
                (row["step"], row[by]) for row in history.evaluations("valid") if math.isfinite(row.get(by, math.nan))
            ]
            if valid:
                below.plot(*zip(*valid), color=color, marker="o", markersize=3)
        if columns is not None:
            above.set_title(f"{short_name(columns)} {_value_words(group)}", fontsize=9)
        below.set_xlabel("update")
    grid[0][0].set_ylabel("training loss, smoothed")
    grid[1][0].set_ylabel(f"validation {by.replace('_', ' ')}")
    if grid[0][0].get_legend_handles_labels()[0]:
        grid[0][0].legend(frameon=False, fontsize=7)
    figure.finish()
    return figure


def _tried(shown: Shown, axis: str) -> list[Any]:
    """The values of a swept setting that a run has, in order."""
    there = [trial.values[axis] for trial in shown.trials]
    return [value for value in shown.axes[axis] if value in there]


def heat_map(shown: Shown) -> ShownFigure:
    """The best validation by two swept settings, the mean over seeds; the best framed."""
    from mlx_nb.view.curves.shown_figure import ShownFigure

    names = [name for name in shown.axes if name != SEED]
    if len(names) != 2:
        raise CommandError(f"a heat map is of two settings, and {shown.name} has several values of {len(names)}.")
    rows, columns = (_tried(shown, name) for name in names)
    numbers = [[math.nan] * len(columns) for _ in rows]
    for trial in shown.trials:
        found = [one.best() for one in shown.repeats(trial)]
        known = [one[0] for one in found if one is not None]
        place = rows.index(trial.values[names[0]]), columns.index(trial.values[names[1]])
        numbers[place[0]][place[1]] = statistics.fmean(known) if known else math.nan
    by = shown.trials[0].run.config.best_by or "loss"
    words = f"best validation {by.replace('_', ' ')} of {shown.name}"
    figure = ShownFigure(words, (1.6 + 1.1 * len(columns), 1.4 + 0.6 * len(rows)))
    axes = figure.add_subplot()
    axes.imshow(numbers, cmap="cividis", aspect="auto", alpha=0.55)
    for row, line in enumerate(numbers):
        for column, number in enumerate(line):
            axes.text(column, row, "-" if math.isnan(number) else f"{number:.4f}", ha="center", va="center", fontsize=8)
    figure.finish()  # before the names of the values, because it sets whole numbers as ticks, and a grid
    axes.grid(visible=False)
    axes.set_xticks(range(len(columns)), [_value_words(value) for value in columns])
    axes.set_yticks(range(len(rows)), [_value_words(value) for value in rows])
    axes.set_xlabel(short_name(names[1]))
    axes.set_ylabel(short_name(names[0]))
    axes.set_title(words, loc="left", fontsize=9)
    return figure
