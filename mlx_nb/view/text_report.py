"""Events as text: the progress line, the summary and the table, for terminals and for outputs that must last."""

from __future__ import annotations

import html
import math

from mlx_nb.events import (
    BatchSkipped,
    CheckpointSaved,
    EvaluationCompleted,
    Event,
    MemoryLow,
    Progress,
    RequestRefused,
    Rewound,
    RunFailed,
    RunFinished,
    RunPaused,
    RunStarted,
    SampleGenerated,
    SettingChanged,
    StateChanged,
    StepCompleted,
)
from mlx_nb.view.history import History


def describe(event: Event) -> str:
    """One line of plain text about an event."""
    match event:
        case RunStarted():
            trained, total = event.trainable_parameters, event.total_parameters
            share = 100 * trained / max(1, total)
            return (
                f"{event.name}: {event.iters} updates, {event.train_rows} training and {event.valid_rows} validation "
                f"rows, {count(trained)} of {count(total)} parameters trained ({share:.2f}%)"
            )
        case StepCompleted():
            return (
                f"update {event.step}: loss {event.loss:.4f}, learning rate {event.learning_rate:.2e}, "
                f"gradient norm {event.gradient_norm:.3g}, {event.tokens / max(event.seconds, 1e-9):.0f} tokens/s"
            )
        case EvaluationCompleted():
            best = ", best so far" if event.best and event.step > 0 else ""
            return (
                f"update {event.step}: {event.split} loss {event.loss:.4f}, perplexity {event.perplexity:.2f} "
                f"({event.rows} rows{best})"
            )
        case SampleGenerated():
            return f"update {event.step}: {event.prompt!r} → {event.answer!r}"
        case Progress():
            return f"{event.what}: {event.done} of {event.total}"
        case StateChanged():
            return f"{event.state} at update {event.step}"
        case RequestRefused():
            return event.error
        case CheckpointSaved():
            return f"update {event.step}: saved {event.kind} adapter to {event.path}"
        case SettingChanged():
            return f"update {event.step}: {event.name} changed from {event.old} to {event.new}"
        case Rewound():
            return f"went back from update {event.from_step} to {event.step}"
        case BatchSkipped():
            return f"update {event.step}: left out the batch with rows {', '.join(map(str, event.rows))}"
        case MemoryLow():
            return (
                f"update {event.step}: memory is nearly full, {event.peak / 1e9:.1f} of {event.limit / 1e9:.1f} GB. "
                "A lower batch_size or max_seq_length needs less"
            )
        case RunPaused():
            return f"paused after update {event.step}: {event.reason}"
        case RunFinished():
            return f"finished after update {event.step} ({event.reason}), {duration(event.seconds)} of training"
        case RunFailed():
            return f"stopped after update {event.step}: {event.error}"
    return type(event).__name__


def progress_line(history: History, iters: int) -> str:
    """`update 12 of 60  loss 1.23  ...  4:10 left`; the time left is that of the last updates."""
    last = history.last_step
    if last is None:
        return f"update 0 of {iters}"
    recent = history["seconds"][-20:]
    tokens = history["tokens"][-20:]
    left = sum(recent) / len(recent) * (iters - last.step)
    parts = [
        f"update {last.step} of {iters}",
        f"loss {last.loss:.3f}",
        f"{sum(tokens) / max(sum(recent), 1e-9):.0f} tokens/s",
        f"memory {last.peak_memory / 1e9:.1f} GB",
    ]
    valid = history.evaluations("valid")
    if valid:
        parts.insert(2, f"validation {valid[-1]['loss']:.3f}")
    parts.append(f"{duration(left)} left" if left > 0.5 else duration(sum(history["seconds"])))
    return "  ·  ".join(parts)


def summary_rows(history: History) -> list[tuple[str, str]]:
    """What a person wants to know afterwards, as (label, value)."""
    started, last, finished = history.started, history.last_step, history.finished
    rows: list[tuple[str, str]] = []
    if started:
        trained = f"{count(started.trainable_parameters)} of {count(started.total_parameters)}"
        rows.append(("updates", f"{last.step if last else 0} of {started.iters}"))
        rows.append(("rows", f"{started.train_rows} training, {started.valid_rows} validation"))
        rows.append(("trained parameters", trained))
    if last:
        tokens, seconds = sum(history["tokens"]), sum(history["seconds"])
        rows.append(("training loss", f"{history['loss'][0]:.4f} → {last.loss:.4f}"))
        rows.append(("tokens", f"{count(tokens)}, {tokens / max(seconds, 1e-9):.0f} a second"))
        rows.append(("training time", duration(seconds)))
        rows.append(("peak memory", f"{last.peak_memory / 1e9:.2f} GB"))
    for split in ("valid", "test"):
        evaluations = history.evaluations(split)
        if evaluations:
            first, final = evaluations[0], evaluations[-1]
            label = "validation" if split == "valid" else split
            change = f"{first['loss']:.4f} → {final['loss']:.4f}" if len(evaluations) > 1 else f"{final['loss']:.4f}"
            rows.append((f"{label} loss", f"{change} (perplexity {final['perplexity']:.2f})"))
    if finished:
        if finished.best_step is not None:
            rows.append(("best validation", f"{finished.best_loss:.4f} at update {finished.best_step}"))
        rows.append(("adapter", str(finished.path)))
    return rows


def summary_text(history: History, title: str) -> str:
    """The summary as aligned plain text."""
    rows = summary_rows(history)
    width = max((len(label) for label, _ in rows), default=0)
    return "\n".join([title, *(f"  {label.ljust(width)}  {value}" for label, value in rows)])


def summary_html(history: History, title: str) -> str:
    """The summary and the validation table as HTML that survives an untrusted or exported notebook."""
    cell = "text-align:left;padding:2px 14px 2px 0;border:none"
    parts = [f'<div style="font-weight:600;margin-bottom:4px">{html.escape(title)}</div><table style="border:none">']
    parts += [
        f'<tr><td style="{cell};opacity:0.7">{html.escape(label)}</td>'
        f'<td style="{cell};overflow-wrap:anywhere">{html.escape(value)}</td></tr>'
        for label, value in summary_rows(history)
    ]
    return "".join([*parts, "</table>"])


def duration(seconds: float) -> str:
    """`45 s`, `3:05`, `1:02:03`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def count(number: float) -> str:
    """`512`, `4.9k`, `135M`: three significant digits."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            digits = max(0, 2 - math.floor(math.log10(number / size)))
            return f"{number / size:.{digits}f}{letter}"
    return f"{number:.0f}"
