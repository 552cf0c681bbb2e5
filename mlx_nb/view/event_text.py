"""Events as text: one line per event, the progress line and the summary, for terminals and lasting outputs."""

from __future__ import annotations

import html
import json
import math
import statistics
from typing import Any

from mlx_nb.errors import counted
from mlx_nb.events import (
    AdapterSaved,
    BatchSkipped,
    CheckpointSaved,
    DataChanged,
    EvaluationCompleted,
    Event,
    LossSpiked,
    MemoryLow,
    NothingLearned,
    Progress,
    RequestRefused,
    Rewound,
    RolloutCompleted,
    RunFailed,
    RunFinished,
    RunPaused,
    RunStarted,
    RunState,
    SampleGenerated,
    SettingChanged,
    StateChanged,
    StepCompleted,
)
from mlx_nb.events.history import History, evaluation_row
from mlx_nb.view.metric_text import deciding, decimals, headline, main_metrics, metric_words, number, side_metrics
from mlx_nb.view.pace import FEW_UPDATES, time_left, tokens_per_second

# The state of a run, in a sentence that starts with its name.
STATES = {
    RunState.BUILT: "has not started",
    RunState.RUNNING: "is running",
    RunState.PAUSED: "is paused",
    RunState.STOPPED: "has stopped",
    RunState.FINISHED: "has finished",
    RunState.FAILED: "has failed",
}
AT_NO_UPDATE = "but no update is left; `%finetune run 20` does 20 more"
_NOTHING = "All gradients were 0, or all completions of each prompt got the same reward. Look at rewards and rows"


def describe(event: Event) -> str:
    """One line of plain text about an event."""
    match event:
        case RunStarted():
            trained, total = event.trainable_parameters, event.total_parameters
            share = 100 * trained / max(1, total)
            return (
                f"{event.name}: {event.iters} updates, {event.train_rows} training and {event.valid_rows} validation "
                f"rows, {count(trained)} of {count(total)} parameters trained ({share:.2f}%)"
                + (f": {event.trained}" if event.trained else "")
            )
        case StepCompleted():
            measured = metric_words({name: event.metrics[name] for name in main_metrics(event.metrics, 2)})
            return (
                f"update {event.step}: loss {event.loss:.4f}, {measured}{', ' if measured else ''}"
                f"learning rate {event.learning_rate:.2e}, gradient norm {event.gradient_norm:.3g}, "
                f"{event.tokens / max(event.seconds, 1e-9):.0f} tokens/s"
            )
        case EvaluationCompleted():
            best = ", best so far" if event.best and event.step > 0 else ""
            row = evaluation_row(event)
            name, value = headline(row)
            described = f"{event.split} {name} {value:.4f}"
            measured = side_metrics(row, event.metrics)
            described += f", {measured}" if measured else ""
            judged = metric_words({name: event.metrics[name] for name in event.answer_metrics})
            described += f", {judged}" if judged and judged not in described else ""
            return f"update {event.step}: {described} ({counted(event.rows, 'row')}{best})"
        case SampleGenerated():
            return f"update {event.step}: {event.prompt!r} → {event.answer!r}"
        case RolloutCompleted():
            return f"update {event.step}: {rollout_words(event)}"
        case Progress():
            return progress_words(event)
        case StateChanged():
            return f"{event.state} at update {event.step}"
        case RequestRefused():
            return event.error
        case CheckpointSaved():
            return f"update {event.step}: saved checkpoint ({event.kind}) to {event.path}"
        case AdapterSaved():
            return f"update {event.step}: saved {event.kind} adapter to {event.path}"
        case SettingChanged():
            note = f". {event.note}" if event.note else ""
            old, new = setting_words(event.old), setting_words(event.new)
            return f"update {event.step}: {event.name} changed from {old} to {new}{note}"
        case Rewound():
            return f"went back from update {event.from_step} to {event.step}"
        case BatchSkipped():
            rows = ", ".join(map(str, dict.fromkeys(event.rows)))
            return (
                f"update {event.step}: left out the {f'batch with rows {rows}' if rows else 'prompts that were next'}"
            )
        case MemoryLow():
            return (
                f"update {event.step}: memory is nearly full, {event.peak / 1e9:.1f} of {event.limit / 1e9:.1f} GB. "
                "A lower batch_size or max_seq_length needs less"
            )
        case LossSpiked():
            return f"update {event.step}: {event.words}. The update was applied; repeated spikes pause the run"
        case DataChanged():
            return (
                f"update {event.step}: {event.path} was changed after it was read. The run continues with the "
                "original rows; a later resume needs them again (or `--allow-changed data`)"
            )
        case NothingLearned():
            return f"update {event.step}: the last {event.updates} updates had nothing to learn from. {_NOTHING}"
        case RunPaused():
            return f"paused after update {event.step}: {event.reason}"
        case RunFinished():
            learned = "" if event.learned else f". Nothing was learned. {_NOTHING}"
            return (
                f"finished after update {event.step} ({event.reason}), {duration(event.seconds)} of training{learned}"
            )
        case RunFailed():
            return f"stopped after update {event.step}: {event.error}"
    return type(event).__name__


def visits_text(visits: list[tuple[int, float]]) -> str:
    """The losses of one row at its latest visits, as a line; empty if there are none."""
    if not visits:
        return ""
    shown = ", ".join(f"{loss:.3f} after update {step}" for step, loss in visits[-6:])
    return f"loss when visited ({len(visits)}×): {'… ' if len(visits) > 6 else ''}{shown}"


def progress_words(progress: Progress) -> str:
    """The activity and its progress, as text."""
    done, total = progress.done, progress.total
    kind, _, name = progress.what.partition(" ")
    if kind == "completions":
        return f"sampling completions: {done:,} of at most {total:,} tokens"
    if kind == "reward" and name:
        return f"reward {name}: {done:,} of {total:,} completions"
    if kind == "metric" and name:
        return f"metric {name}: {done:,} of {total:,} answers"
    if name == "answers":
        return f"answering {kind} rows: {done:,} of {total:,}"
    if kind == "loading":
        return f"loading the model: {name}" + (f", {done:,} of {total:,}" if total else "")
    if kind == "tokenizing":
        pace = done / max(progress.seconds, 1e-9)
        return f"tokenizing {name} rows: {done:,} of {total:,}, {pace:,.0f} rows a second"
    if kind == "reference":
        return f"log-probabilities of the reference: {done:,} of {total:,} completions"
    if kind == "sample":
        return f"answering the sample prompts: {done:,} of at most {total:,} tokens"
    if kind == "answer":
        return f"answering: {done:,} of at most {total:,} tokens"
    return f"{progress.what}: {done} of {total}"


def setting_words(value: Any) -> str:
    """The value of a setting as written in a cell: `null`, `true`, `[umbrella, garden chair]`."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(setting_words, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {setting_words(one)}" for name, one in value.items()) + "}"
    return str(value)


def rollout_words(rollout: RolloutCompleted) -> str:
    """`8 completions of 2 prompts, reward 0.43 ± 0.21, 3 cut off, sampled in 3 s, 1 problem`."""
    completions = [completion for group in rollout.groups for completion in group["completions"]]
    prompts = len(rollout.groups)
    rewards = [completion["reward"] for completion in completions if completion["reward"] is not None]
    parts = [f"{counted(len(completions), 'completion')} of {counted(prompts, 'prompt')}"]
    if rewards:
        spread = f" ± {statistics.pstdev(rewards):.3g}" if len(rewards) > 1 else ""
        parts.append(f"reward {statistics.fmean(rewards):.3g}{spread}")
    else:
        parts.append("no reward")
    cut = sum(not completion["finished"] for completion in completions)
    parts += [f"{cut} cut off"] if cut else []
    parts.append(f"sampled in {duration(rollout.seconds) if rollout.seconds >= 10 else f'{rollout.seconds:.1f} s'}")
    problems = len(rollout.problems)
    parts += [f"{problems} problem{'s' * (problems != 1)}"] if problems else []
    return ", ".join(parts)


def remarks(event: Event) -> tuple[str, ...]:
    """Additional remarks: notes at the start of a run, problems of reward functions, effects of a changed setting."""
    match event:
        case RunStarted():
            return event.notes
        case SettingChanged():
            return (event.note,) if event.note else ()
        case _:
            return getattr(event, "problems", ())


def progress_line(history: History, iters: int) -> str:
    """`update 12 of 60  loss 1.23  ...  4:10 left`; the time left is estimated from the latest updates."""
    last = history.last_step
    if last is None:
        return f"update 0 of {iters}"
    left = time_left(history, iters)
    parts = [
        f"update {last.step} of {iters}",
        f"loss {decimals(last.loss)}",
        f"{tokens_per_second(history):.0f} tokens/s"
        + (f" (of {counted(len(history), 'update')})" if len(history) < FEW_UPDATES else ""),
        f"memory {last.peak_memory / 1e9:.1f} GB",
    ]
    valid = history.evaluations("valid")
    if valid:
        parts.insert(2, validation_words(valid[-1]))
    if "reward" in last.metrics:
        parts.insert(2, f"reward {decimals(last.metrics['reward'])}")
    parts.append(f"{duration(left)} left" if left > 0.5 else duration(history.elapsed))
    return "  ·  ".join(parts)


def validation_words(evaluation: dict[str, Any]) -> str:
    """The newest validation in two or three words."""
    name, value = headline(evaluation)
    return f"validation {decimals(value)}" if name == "loss" else f"validation {name} {decimals(value)}"


def summary_rows(history: History) -> list[tuple[str, str]]:
    """The rows of the summary, as (label, value)."""
    started, last, finished = history.started, history.last_step, history.finished
    rows: list[tuple[str, str]] = []
    if started:
        trained = f"{count(started.trainable_parameters)} of {count(started.total_parameters)}"
        rows.append(("updates", f"{last.step if last else 0} of {history.iters}"))
        rows.append(("rows", f"{started.train_rows} training, {started.valid_rows} validation"))
        rows.append(("trained parameters", trained))
        rows += [("trained", started.trained)] if started.trained else []
    if last:
        tokens, seconds = sum(history["tokens"]), sum(history["seconds"])
        rows.append(("training loss", f"{history['loss'][0]:.4f} → {last.loss:.4f}"))
        for name in main_metrics(history.step_metrics, 2):
            known = [value for value in history[name] if math.isfinite(value)]
            rows += [(f"training {name}", f"{number(known[0])} → {number(known[-1])}")] if known else []
        few = f" (of {counted(len(history), 'update')})" if len(history) < FEW_UPDATES else ""
        rows.append(("tokens", f"{count(tokens)}, {tokens / max(seconds, 1e-9):.0f} a second{few}"))
        rows.append(("elapsed", elapsed_words(history)))
        rows.append(("peak memory", f"{last.peak_memory / 1e9:.2f} GB"))
    for split in ("valid", "test"):
        evaluations = history.evaluations(split)
        if evaluations:
            first, final = evaluations[0], evaluations[-1]
            label = "validation" if split == "valid" else split
            name, value = headline(final)
            change = f"{headline(first)[1]:.4f} → {value:.4f}" if len(evaluations) > 1 else f"{value:.4f}"
            measured = side_metrics(final, history.evaluation_metrics)
            rows.append((f"{label} {name}", f"{change} ({measured})" if measured else change))
            for judged in history.answer_metrics:
                known = [row[judged] for row in evaluations if judged in row]
                rows += [(f"{label} {judged}", " → ".join(map(number, dict.fromkeys(known[:: len(known) - 1 or 1]))))]
    best = history.best_validation
    if best is not None:
        name, value = deciding(best)
        described = f"{value:.4f}" if name == "loss" else f"{name} {value:.4f}"
        rows.append(("best validation", f"{described} at update {best['step']}"))
        rows += [("overfitting", words)] if (words := overfitting(history)) else []
    if finished and not finished.learned:
        rows.append(("learned", f"nothing. {_NOTHING}"))
    if finished and last and finished.step >= last.step:
        rows.append(("adapter", history.folder or str(finished.path)))
    return rows


def elapsed_words(history: History) -> str:
    """`3:20: training 2:05, validation 40 s, waiting 35 s`: the elapsed time by activity."""
    spent = history.spent()
    spent["waiting"] = history.elapsed - sum(spent.values())
    parts = [f"{what} {duration(seconds)}" for what, seconds in spent.items() if seconds >= 0.5]
    return f"{duration(history.elapsed)}{': ' if parts else ''}{', '.join(parts)}"


def overfitting(history: History) -> str:
    """A warning that the validation loss rose after its best, and where the best adapter is; empty otherwise."""
    best, valid, finished = history.best_validation, history.evaluations("valid"), history.finished
    if best is None or finished is None or finished.path is None or not 0 < best["step"] < finished.step:
        return ""
    name, final = headline(valid[-1])
    if name == "loss" and final > best["loss"] + max(0.01, 0.02 * abs(best["loss"])):
        return (
            f"validation loss rose from {best['loss']:.4f} at update {best['step']} to {final:.4f}. The adapter of "
            f"update {best['step']} is in {finished.path}/best"
        )
    return ""


def summary_text(history: History, title: str) -> str:
    """The summary as aligned plain text."""
    rows = summary_rows(history)
    width = max((len(label) for label, _ in rows), default=0)
    return "\n".join([title, *(f"  {label.ljust(width)}  {value}" for label, value in rows)])


def summary_html(history: History, title: str) -> str:
    """The summary and the validation table as HTML that survives an untrusted or exported notebook."""
    cell = "text-align:left;padding:2px 14px 2px 0;border:none;overflow-wrap:break-word"
    parts = [f'<div style="font-weight:600;margin-bottom:4px">{html.escape(title)}</div><table style="border:none">']
    parts += [
        f'<tr><td style="{cell};opacity:0.7">{html.escape(label)}</td><td style="{cell}">{html.escape(value)}</td></tr>'
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
