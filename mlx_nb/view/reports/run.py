"""The report of a run: one self-contained HTML page without scripts, for light and dark mode and for print."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from types import MappingProxyType
from typing import Any

from mlx_nb.config.methods import Metric
from mlx_nb.config.run_config import RunConfig
from mlx_nb.events import SampleGenerated, StepCompleted
from mlx_nb.events.history import EVALUATION_COLUMNS, History
from mlx_nb.view.curves.figure import plot_history
from mlx_nb.view.event_text import describe, summary_rows
from mlx_nb.view.metric_text import SECONDS, reward_of
from mlx_nb.view.reports.completions import completions_html
from mlx_nb.view.theme import visible_html

LONGEST_LOG = 500
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 860px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 1.8em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; max-width: 100%; }
td, th { text-align: left; vertical-align: top; padding: 2px 16px 2px 0; overflow-wrap: anywhere; font-weight: normal; }
th { opacity: .75; }
img { max-width: 100%; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85em; }
.scroll { overflow-x: auto; }
@media print { details { display: block; } body { margin: 0; } }
"""


def report_html(
    history: History,
    *,
    title: str,
    mark: str = "",
    settings: Mapping[str, Any],
    metrics: Mapping[str, Metric] = MappingProxyType({}),
    worst_rows: Sequence[tuple[int, float, str]] = (),
) -> str:
    """The page as text.

    mark        an HTML element for the head that identifies the run
    metrics     the metrics that the method declares
    worst_rows  (row, loss, excerpt) of the rows with the highest loss
    """
    standard = RunConfig().to_dict()
    changed = {name: value for name, value in settings.items() if value != standard.get(name)}
    parts = [
        f"<h1>{escape(title)}</h1>",
        _pairs(summary_rows(history)),
        _figure(history, title, metrics),
        _section("Validation", _evaluations(history)),
        _section("Samples", _samples(history)),
        _section("Completions of the last rollout", "".join(map(completions_html, history.last_rollouts(1)))),
        _section("Rows with the highest loss", _worst(worst_rows)),
        _section("Settings that differ from their defaults", _pairs([(name, str(changed[name])) for name in changed])),
        "<details><summary>All settings</summary>",
        _pairs([(name, str(value)) for name, value in settings.items()]),
        "</details>",
        _section("What happened", _log(history)),
    ]
    viewport = '<meta name="viewport" content="width=device-width">'
    head = f'<meta charset="utf-8">{mark}{viewport}<title>{escape(title)}</title>'
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>{"".join(parts)}</body></html>'
    )


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>{content}" if content else ""


def _table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> str:
    """A table whose cells are already HTML."""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    head = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in header)}</tr>" if header else ""
    return f'<div class="scroll"><table>{head}{body}</table></div>' if body else ""


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    return _table((escape(label), visible_html(value, edges=False)) for label, value in pairs)


def _figure(history: History, title: str, metrics: Mapping[str, Metric]) -> str:
    if not len(history):
        return ""
    picture = base64.b64encode(plot_history(history, title, metrics)._repr_png_()).decode()
    return f'<p><img alt="{escape(title, quote=True)}: loss by update" src="data:image/png;base64,{picture}"></p>'


def _evaluations(history: History) -> str:
    evaluations = history.evaluations()
    hidden = {"seconds", "best"}
    if all(row["perplexity"] is None for row in evaluations):
        hidden.add("perplexity")
    if evaluations and all(reward_of(row) is not None for row in evaluations):
        hidden.add("loss")  # minus the reward
    measured = [name for name in history.evaluation_metrics if not name.startswith(SECONDS)]
    shown = [name for name in (*EVALUATION_COLUMNS, *measured) if name not in hidden]
    rows = (
        [escape(f"{value:.4f}" if isinstance(value, float) else str(value)) for value in values]
        for values in ([row.get(name, "") for name in shown] for row in evaluations)
    )
    return _table(rows, [name.replace("_", " ") for name in shown])


def _samples(history: History) -> str:
    answers = [event for event in history.in_effect if isinstance(event, SampleGenerated)]
    rows = (
        [
            str(event.step),
            *(visible_html(text or "", edges=False) for text in (event.prompt, event.base_answer, event.answer)),
        ]
        for event in answers
    )
    return _table(rows, ("update", "prompt", "base", "model"))


def _worst(worst_rows: Sequence[tuple[int, float, str]]) -> str:
    rows = ([str(row), f"{loss:.3f}", visible_html(excerpt, edges=False)] for row, loss, excerpt in worst_rows)
    return _table(rows, ("row", "loss", "begins"))


def _log(history: History) -> str:
    """All events except the updates, which are in the figure."""
    events = [event for event in history.events if not isinstance(event, StepCompleted)]
    left_out = len(events) - LONGEST_LOG
    lines = [f"… {left_out} earlier lines are left out"] if left_out > 0 else []
    lines += [describe(event) for event in events[-LONGEST_LOG:]]
    content = "\n".join(escape(line) for line in lines)
    return f"<details><summary>{len(events)} events</summary><pre>{content}</pre></details>"
