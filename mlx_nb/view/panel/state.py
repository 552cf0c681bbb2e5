"""The data that the panel sends to its page: state, progress, activity, rows, samples, settings, checkpoints. Pure."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlx_nb.config.checks import warnings_about
from mlx_nb.config.run_config import LIVE_SETTINGS, SETTINGS, RunConfig
from mlx_nb.events import Progress, RunStarted, RunState, SampleGenerated, StepCompleted
from mlx_nb.events.history import History, losses_by_row
from mlx_nb.view.event_text import count, duration, progress_words, validation_words
from mlx_nb.view.metric_text import decimals
from mlx_nb.view.pace import RECENT_UPDATES, time_left, tokens_per_second
from mlx_nb.view.panel.run_handle import RunHandle
from mlx_nb.view.theme import visible_parts

PageData = dict[str, Any]

# A symbol in addition to the color, for readers who cannot see colors.
SIGNS = {"built": "○", "running": "▶", "paused": "❚❚", "stopped": "■", "finished": "✓", "failed": "✗"}
ANSWERS_OF_A_PROMPT = 8
MOST_ROWS = 200


def visible(text: str) -> str:
    """The text with hidden and reordering characters shown by name; line breaks are kept."""
    return "".join(part for part, _ in visible_parts(text, edges=False))


def head_of(run: RunHandle, device: str, warning: str | None = None) -> PageData:
    """Name, state and failure; method, model, parameters, device and memory as `facts`; how to continue or resume.

    `notes` are [is a warning, text]: what is known about settings, model and rows. `warning` is that of the device.
    """
    last = run.history.last_step
    begun = (event for event in reversed(run.history.events) if isinstance(event, RunStarted))
    started = run.history.started or next(begun, None)  # a rewind may have undone its start
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
    return {
        "name": run.name,
        "state": str(run.state),
        "sign": SIGNS[run.state],
        "facts": facts,
        "notes": _notes_of(run, started, warning),
        "failure": run.let_go or run.failure,
        "next_step": _next_step(run),
        "resume": f"%finetune resume {shown_path(run.folder, run.config)}" if run.step_count else "",
    }


def _notes_of(run: RunHandle, started: RunStarted | None, warning: str | None) -> list[tuple[bool, str]]:
    """Warnings that hold now, and the other notes of the start."""
    first_rate = run.history.first_value("learning_rate", run.config.learning_rate)
    warnings = [*([warning] if warning else []), *warnings_about(run.config)]
    known = {*warnings, *warnings_about(run.config, first_rate)}
    notes = [note for note in (started.notes if started else ()) if note not in known]
    return [*((True, words) for words in warnings), *((False, visible(note)) for note in notes)]


def _next_step(run: RunHandle) -> str:
    """How to continue a finished run, or restart one that could not start; empty for any other run."""
    if run.let_go:
        return ""
    if run.over:
        return "All updates are done. %finetune run 20 does 20 more."
    if cannot_begin(run):
        return "Fix the problem, then execute the cell again."
    return ""


def cannot_begin(run: RunHandle) -> bool:
    """Whether it failed before it was loaded, so that its settings or data must change."""
    return run.state == RunState.FAILED and not run.prepared


def shown_path(path: str | Path, config: RunConfig) -> str:
    """A path as the user would type it: relative to the working folder if inside it."""
    folder = config.working_folder
    return str(Path(path).relative_to(folder) if folder and Path(path).is_relative_to(folder) else path)


def progress_of(history: History, iters: int | None, tokens: int) -> PageData:
    """`step` of `iters`; loss, tokens, elapsed time and time left as text `parts`; `pace` in seconds per update.

    `tokens` is the total over all updates.
    """
    last = history.last_step
    step = last.step if last else 0
    parts = [f"update {step} of {iters}" if iters else "not loaded yet"]
    if last:
        parts.append(f"loss {decimals(last.loss)}")
        parts += [f"reward {decimals(last.metrics['reward'])}"] if "reward" in last.metrics else []
        parts += [validation_words(row) for row in history.evaluations("valid")[-1:]]
        parts.append(f"{count(tokens)} tokens, {tokens_per_second(history):.0f} a second")
        parts.append(f"{duration(history.elapsed)} elapsed")
        left = time_left(history, iters or step)
        parts += [f"{duration(left)} left"] if left > 0.5 else []
    recent = [event.seconds for event in history.last_steps(RECENT_UPDATES)]
    return {"step": step, "iters": iters or 0, "parts": parts, "pace": sum(recent) / len(recent) if recent else 0.0}


class Activity:
    """The current activity, with an estimate of the time left from its progress so far."""

    def __init__(self) -> None:
        self._what = ""
        self._begun = 0.0
        self._first = 0
        self._progress: Progress | None = None

    def note(self, progress: Progress | None) -> bool:
        """Record the progress of an activity; None while an update is computed. Returns whether an activity begins."""
        begins = progress is not None and (progress.what != self._what or self._progress is None)
        if progress is not None and begins:
            self._what, self._begun, self._first = progress.what, time.monotonic(), progress.done
        self._progress = progress
        return begins

    def as_data(self, run: RunHandle, iters: int | None) -> PageData:
        """`words`, `done` of `total` (0: unknown) and seconds `left` (None: unknown); empty while the run is idle."""
        if not run.active:
            return {}
        progress, step = self._progress, run.step_count
        if progress is None and not run.trains:
            return {"words": "carrying out a request", "done": 0, "total": 0, "left": None, "update": 0}
        if progress is None and not run.prepared:
            return {"words": "loading", "done": 0, "total": 0, "left": None, "update": 0}
        if progress is None and iters is not None and step >= iters:
            return {"words": "finishing the run", "done": 0, "total": 0, "left": None, "update": 0}
        if progress is None:
            words = f"computing update {step + 1}" if step else "computing the first update"
            return {"words": words, "done": 0, "total": 0, "left": None, "update": step + 1}
        done = progress.done - self._first
        left = (time.monotonic() - self._begun) / done * (progress.total - progress.done) if done > 0 else None
        words = progress_words(progress)
        return {"words": words, "done": progress.done, "total": progress.total, "left": left, "update": 0}


def rows_of(event: StepCompleted | None, location: Callable[[int], str]) -> PageData:
    """The rows of an update with their location and their losses before it, highest first."""
    if event is None:
        return {"update": None, "rows": [], "note": "no update has been done yet; these are the rows of the next one"}
    losses = sorted(losses_by_row(event), key=lambda pair: -pair[1])
    note = f"rows of update {event.step} (epoch {event.epoch:.2f}), with their losses before it"
    return {"update": event.step, "rows": listed_rows(losses, location), "note": note}


def listed_rows(losses: Sequence[tuple[int, float | None]], location: Callable[[int], str]) -> list[list[Any]]:
    """[row, loss or None, location] for at most `MOST_ROWS` rows."""
    return [
        [row, round(loss, 4) if loss is not None and math.isfinite(loss) else None, location(row)]
        for row, loss in losses[:MOST_ROWS]
    ]


def samples_of(history: History, config: RunConfig) -> list[PageData]:
    """Each kept or answered prompt: `base` answer (None: none) and the newest `answers` as [update, text]."""
    found: dict[str, PageData] = {}
    for event in history.in_effect:
        if isinstance(event, SampleGenerated):
            sample = found.setdefault(event.prompt, {"prompt": visible(event.prompt), "base": None, "answers": []})
            sample["base"] = visible(event.base_answer) if event.base_answer is not None else sample["base"]
            before = [one for one in sample["answers"] if one[0] != event.step]  # answered again at the same update
            sample["answers"] = [*before[1 - ANSWERS_OF_A_PROMPT :], [event.step, visible(event.answer)]]
    for prompt in config.sample_prompts or ():
        found.setdefault(prompt, {"prompt": visible(prompt), "base": None, "answers": []})
    return list(found.values())


def settings_of(config: RunConfig) -> list[list[str]]:
    """[name, value, help] of the live settings; `null` means off."""
    settings = []
    for name in LIVE_SETTINGS:
        if name != "sample_prompts":
            value = getattr(config, name)
            settings.append([name, "null" if value is None else str(value), SETTINGS[name].metadata["help"]])
    return settings


def checkpoints_of(infos: Sequence[Any]) -> list[list[Any]]:
    """[save, update, kind, time of day, MB] of each checkpoint, the newest first."""
    return [
        [
            info.save,
            info.step,
            info.kind,
            time.strftime("%H:%M:%S", time.localtime(info.time)),
            f"{info.bytes / 1e6:.1f}",
        ]
        for info in reversed(infos)
    ]
