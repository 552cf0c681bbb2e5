"""The first lines of the panel: which run, in what state, how far, and how long it will take."""

from __future__ import annotations

from html import escape

from mlx_nb.events import Progress
from mlx_nb.history import History
from mlx_nb.view.event_text import count, duration, progress_words, validation_words
from mlx_nb.view.pace import time_left, tokens_a_second
from mlx_nb.view.panel.run_handle import RunHandle
from mlx_nb.view.theme import BLUE, GREEN, GREY, ORANGE, WRAP, Color, tint

# A sign besides the color, so that a state is known without seeing colors.
STATES: dict[str, tuple[str, Color]] = {
    "built": ("○", GREY),
    "running": ("▶", BLUE),
    "paused": ("❚❚", GREY),
    "stopped": ("■", GREY),
    "finished": ("✓", GREEN),
    "failed": ("✗", ORANGE),
}


def head_html(run: RunHandle, device: str, warning: str | None = None) -> str:
    """Name, state, method, model, parameters, device and memory of a run in two lines, and a `warning` below."""
    sign, color = STATES[run.state]
    pill = (
        f'<span role="status" style="border:1px solid {tint(color, 0.9)};background:{tint(color, 0.18)};'
        f'border-radius:9px;padding:0 8px;font-size:.9em;white-space:nowrap">{sign} {run.state}</span>'
    )
    started, last = run.history.started, run.history.last_step
    adapter = run.config.fine_tune_type.replace("lora", "LoRA").replace("doRA", "DoRA")
    facts = [adapter if run.config.method == "sft" else f"{run.config.method}, {adapter}", run.config.model]
    if started:
        share = 100 * started.trainable_parameters / max(1, started.total_parameters)
        facts.append(
            f"{count(started.trainable_parameters)} of {count(started.total_parameters)} parameters ({share:.2g}%)"
        )
        facts += [started.trained] if started.trained else []
    facts.append(device)
    if last:
        facts.append(f"peak {last.peak_memory / 1e9:.2f} GB")
    line = "&ensp;·&ensp;".join(escape(fact) for fact in facts)
    warned = f'<div role="note" style="font-size:.9em">⚠ {escape(warning)}</div>' if warning else ""
    return (
        f'<div style="{WRAP};line-height:1.5"><b style="font-size:1.1em">{escape(run.name)}</b>&ensp;{pill}'
        f'<div style="font-size:.9em">{line}</div>{warned}</div>'
    )


def progress_html(history: History, iters: int | None, activity: str, tokens: int, seconds: float) -> str:
    """A bar and a line: updates, loss, tokens, time elapsed and time left, and what is being done besides updates.

    `tokens` and `seconds` are those of all updates.
    """
    last = history.last_step
    done = last.step if last else 0
    share = min(1.0, done / iters) if iters else 0.0
    bar = (
        f'<div style="height:5px;background:{tint(GREY, 0.25)};border-radius:3px;margin:3px 0" role="progressbar" '
        f'aria-valuenow="{done}" aria-valuemin="0" aria-valuemax="{iters or 0}">'
        f'<div style="height:5px;width:{100 * share:.1f}%;background:{tint(BLUE, 1)};border-radius:3px"></div></div>'
    )
    parts = [f"update {done} of {iters}" if iters else "not loaded yet"]
    if last:
        parts.append(f"loss {last.loss:.3f}")
        parts += [f"reward {last.metrics['reward']:.3f}"] if "reward" in last.metrics else []
        parts += [validation_words(row) for row in history.evaluations("valid")[-1:]]
        parts.append(f"{count(tokens)} tokens, {tokens_a_second(history):.0f} a second")
        parts.append(f"{duration(seconds)} elapsed")
        left = time_left(history, iters or done)
        if left > 0.5:
            parts.append(f"{duration(left)} left")
    if activity:
        parts.append(activity)
    line = "&ensp;·&ensp;".join(escape(part) for part in parts)
    return f'{bar}<div style="font-size:.9em;font-variant-numeric:tabular-nums;{WRAP}">{line}</div>'


def activity_text(progress: Progress | None) -> str:
    """What is being done besides updates, as a few words."""
    if progress is None:
        return ""
    return progress_words(progress)
