"""Compares runs in a table: progress, losses, and the settings that differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlx_nb.view.event_text import setting_words
from mlx_nb.view.metric_text import deciding

if TYPE_CHECKING:
    from mlx_nb.run.run import Run


def compared(runs: list[Run]) -> str:
    """A table with a column for each run: its progress, its losses, and the settings that differ."""
    described = [run.config.described() for run in runs]
    names = [name for name in described[0] if len({repr(one.get(name)) for one in described}) > 1]
    table = [("", *(run.name for run in runs))]
    table.append(("update", *(_updates(run) for run in runs)))
    table.append(("training loss", *(_loss(run) for run in runs)))
    table.append(("best validation", *(_best(run) for run in runs)))
    table += [(name, *(_short(one.get(name)) for one in described)) for name in names if name != "adapter_path"]
    if len(table) == 4:
        table.append(("settings", *("the same" for _ in runs)))
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in table)


def _updates(run: Run) -> str:
    return f"{run.step_count} of {run.trainer.iters}" if run.prepared else "not started"


def _loss(run: Run) -> str:
    last = run.history.last_step
    return f"{run.history['loss'][0]:.4f} → {last.loss:.4f}" if last else "-"


def _best(run: Run) -> str:
    best = run.history.best_validation
    if best is None:
        return "-"
    name, value = deciding(best)
    return f"{'' if name == 'loss' else f'{name} '}{value:.4f} at {best['step']}"


def _short(value: Any) -> str:
    text = setting_words(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
