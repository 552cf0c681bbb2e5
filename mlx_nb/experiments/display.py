"""Comparisons as text, HTML and figures."""

from __future__ import annotations

import base64
import math
from html import escape
from typing import TYPE_CHECKING, Any

from mlx_nb.errors import counted, shortened
from mlx_nb.events.history import smoothed
from mlx_nb.rollouts.intervals import Estimate
from mlx_nb.run.run import Run
from mlx_nb.view.event_text import setting_words
from mlx_nb.view.theme import change_tint, visible_html

if TYPE_CHECKING:
    from mlx_nb.experiments.comparison import Comparison, Difference
    from mlx_nb.view.curves.shown_figure import ShownFigure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_SHOWN_ROWS = 5  # of each kind, in the text
_EXCERPT = 60
_CELL = "text-align:left;vertical-align:top;padding:2px 12px 2px 0"


def different_settings(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) of the settings that differ, except the folder."""
    described = [run.config.described() for run in runs]
    names = [name for name in described[0] if len({repr(one.get(name)) for one in described}) > 1]
    return [
        (name, [shortened(setting_words(one.get(name)), 40) for one in described])
        for name in names
        if name != "adapter_path"
    ]


def difference_lines(found: Difference) -> list[str]:
    """A difference in words: each number with its interval, and how many rows became worse or better."""
    title = f"{found.after} minus {found.before}"
    if found.same:
        return [f"{title}: 0 on every row. They are the same."]
    worse, better = found.counts
    lines = [f"{title}:"]
    width = max(14, *map(len, found.estimates))
    for name, one in found.estimates.items():
        counts = f"; {worse} rows worse, {better} better" if name == "loss" else ""
        lines.append(f"  {name:<{width}} {_estimate_words(one)}{counts}")
    return lines


def _estimate_words(one: Estimate) -> str:
    if math.isnan(one.value):
        return "no row has a number"
    if math.isnan(one.low):
        return f"{one.value:+.4f} (one row)"
    decided = "" if one.low <= 0 <= one.high and (one.low, one.high) != (0.0, 0.0) else ", not 0"
    if one.low == one.high == 0.0:
        return "0 on every row"
    return f"{one.value:+.4f}, 95% interval {one.low:+.4f} to {one.high:+.4f}{decided}"


def comparison_text(found: Comparison) -> str:
    """A comparison as text: settings, differences, and the rows that changed most."""
    lines = [f"{' and '.join(dict.fromkeys(found.names))} on {counted(len(found.examples), 'row')} of {found.split}"]
    lines += [f"note: {note}" for note in found.notes]
    for name, values in different_settings(found.runs):
        lines.append(f"  {name}: {' → '.join(values)}")
    for one in found.differences:
        lines += difference_lines(one)
    last = found.differences[-1]
    if not last.same:
        ends = [("worse", last.rows[:_SHOWN_ROWS], 1), ("better", last.rows[::-1][:_SHOWN_ROWS], -1)]
        for word, rows, sign in ends:
            shown = [f"{row.row} ({row.change:+.3f})" for row in rows if sign * row.change > 0]
            lines += (
                [f"rows that became {word} most, with the change of their loss: {', '.join(shown)}"] if shown else []
            )
    return "\n".join(lines)


def comparison_html(found: Comparison) -> str:
    """A comparison as HTML: curves, settings, differences, and rows with their answers side by side, worse first."""
    names = list(dict.fromkeys(found.names))
    title = f"{' and '.join(names)} on {counted(len(found.examples), 'row')} of {found.split}"
    parts = [f"<b>{escape(title)}</b>"]
    parts += [f"<div>{escape(note)}</div>" for note in found.notes]
    settings = [[name, *values] for name, values in different_settings(found.runs)]
    parts += [_table(["setting", *(run.name for run in found.runs)], settings)] if settings else []
    for one in found.differences:
        parts.append(f'<pre style="margin:4px 0">{escape(chr(10).join(difference_lines(one)))}</pre>')
    if any(len(run.history) for run in found.runs):
        picture = base64.b64encode(curves_figure(found.runs)._repr_png_()).decode()
        parts.append(f'<img alt="losses of the runs by update" src="data:image/png;base64,{picture}">')
    last = found.differences[-1]
    answered = [row for row in last.rows if any(row.row in of_one for of_one in found.answers.values())]
    if answered:
        measures = list(found.scores)
        rows = []
        for row in answered:
            change = "" if math.isnan(row.change) else f"{row.change:+.3f}"
            cells = [str(row.row), change, prompt_text(found.prompts.get(row.row)), str(found.references.get(row.row))]
            cells += [_answer_with_scores(found, name, row.row, measures) for name in names]
            rows.append(cells)
        heads = ["row", "change of the loss", "prompt", "reference", *names]
        inner = _table(heads, rows)
        parts.append(f"<details open><summary>answers, rows that became worse first</summary>{inner}</details>")
    return "".join(f"<div>{part}</div>" for part in parts)


def _answer_with_scores(found: Comparison, name: str, row: int, measures: list[str]) -> str:
    scores = [f"{measure} {found.scores[measure][name].get(row, math.nan):.3g}" for measure in measures]
    answer = found.answers.get(name, {}).get(row, "")
    return f"{answer}\n[{', '.join(scores)}]" if scores else answer


def prompt_text(prompt: Any) -> str:
    """A prompt in one text; of messages the last."""
    if isinstance(prompt, str) or not prompt:
        return prompt or ""
    return str(prompt[-1].get("content", ""))


def _table(heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f'<th style="{_CELL}">{escape(text)}</th>' for text in heads)
    body = "".join(
        "<tr>"
        + "".join(f'<td style="{_CELL};white-space:pre-wrap">{visible_html(text, edges=False)}</td>' for text in row)
        + "</tr>"
        for row in rows
    )
    return f'<table style="border:none;font-size:.9em"><tr>{head}</tr>{body}</table>'


def curves_figure(runs: list[Run]) -> ShownFigure:
    """Training losses, smoothed, and validation losses of several runs over each other."""
    from mlx_nb.view.curves.shown_figure import ShownFigure

    there = list({id(run): run for run in runs}.values())
    figure = ShownFigure(f"losses of {', '.join(run.name for run in there)}", (7.5, 3.4))
    axes = figure.add_subplot()
    for run, color in zip(there, COLORS * len(there)):
        axes.plot(run.history["step"], run.history["loss"], color=color, linewidth=0.8, alpha=0.3)
        axes.plot(run.history["step"], smoothed(run.history["loss"]), color=color, linewidth=1.6, label=run.name)
        valid = [(row["step"], row["loss"]) for row in run.history.evaluations("valid")]
        if valid:
            label = f"{run.name}, validation"
            axes.plot(*zip(*valid), color=color, linestyle="--", marker="o", markersize=4, label=label)
    axes.set_xlabel("update")
    axes.set_ylabel("loss")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    figure.finish()
    return figure


class RowComparison:
    """One row of a comparison: its tokens with the change of their loss, and the answers to it."""

    def __init__(self, found: Comparison, row: int) -> None:
        self._found = found
        self._row = row
        last = found.differences[-1]
        self.before, self.after = last.before, last.after
        example = found.examples[row]
        # The tokens whose loss is trained, each with its change; positive is worse.
        losses = [found.token_losses[name][row] for name in (self.before, self.after)]
        tokenizer = found.runs[0].tokenizer
        self.tokens = [
            (tokenizer.decode([int(token)]), float(losses[1][place] - losses[0][place]) if weight else math.nan)
            for place, (token, weight) in enumerate(zip(example.tokens, example.loss_mask))
        ]

    def __repr__(self) -> str:
        trained = [(text, change) for text, change in self.tokens if not math.isnan(change)]
        worst = sorted(trained, key=lambda one: -abs(one[1]))[:_SHOWN_ROWS]
        words = ", ".join(f"{text!r} {change:+.3f}" for text, change in worst)
        lines = [f"row {self._row}, {self.after} minus {self.before}: {words}"]
        lines += [f"{name}: {of_one[self._row]}" for name, of_one in self._found.answers.items() if self._row in of_one]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        spans = []
        for text, change in self.tokens:
            style = "opacity:.6" if math.isnan(change) else f"background:{change_tint(-change)}"
            title = "" if math.isnan(change) else f' title="{change:+.4f} nats"'
            spans.append(f'<span style="{style}"{title}>{visible_html(text, edges=False)}</span>')
        legend = f"loss of {self.after} minus {self.before}, token by token; hover for the number"
        answers = [[name, of_one[self._row]] for name, of_one in self._found.answers.items() if self._row in of_one]
        table = _table(["", "answer"], answers) if answers else ""
        return f'<div>{escape(legend)}</div><div style="white-space:pre-wrap">{"".join(spans)}</div>{table}'
