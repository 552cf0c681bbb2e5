"""What a page is told of a run, as data for JSON: its state, how far it is, what can be clicked, what it has. Pure."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlx_nb.config.run_config import LIVE_SETTINGS, SETTINGS, RunConfig
from mlx_nb.events import Progress, RunStarted, RunState, SampleGenerated, StepCompleted
from mlx_nb.events.history import History, losses_by_row
from mlx_nb.view.event_text import count, duration, progress_words, validation_words
from mlx_nb.view.pace import RECENT_UPDATES, time_left, tokens_a_second
from mlx_nb.view.panel.run_handle import RunHandle
from mlx_nb.view.theme import visible_parts

Told = dict[str, Any]

# A sign besides the color, so that a state is known without seeing colors.
SIGNS = {"built": "○", "running": "▶", "paused": "❚❚", "stopped": "■", "finished": "✓", "failed": "✗"}
ANSWERS_OF_A_PROMPT = 8
MOST_ROWS = 200


def visible(text: str) -> str:
    """The text with every character that hides or reorders others named; lines stay lines."""
    return "".join(part for part, _ in visible_parts(text, edges=False))


def head_of(run: RunHandle, device: str, warning: str | None = None) -> Told:
    """Name, state and why it failed; method, model, parameters, device and memory as `facts`; how to resume it."""
    last = run.history.last_step
    begun = (event for event in reversed(run.history.events) if isinstance(event, RunStarted))
    started = run.history.started or next(begun, None)  # it may have gone back to before its start
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
        "warning": warning or "",
        "failure": run.let_go or run.failure,
        "way_on": _way_on(run),
        "resume": f"%finetune resume {shown_path(run.folder, run.config)}" if run.step_count else "",
    }


def _way_on(run: RunHandle) -> str:
    """How a run that is over trains on, or one that could not begin begins; empty for every other."""
    if run.let_go:
        return ""
    if run.over:
        return "All its updates are done. %finetune run 20 does 20 more, from here."
    if cannot_begin(run):
        return "Mend that, and execute its cell again."
    return ""


def cannot_begin(run: RunHandle) -> bool:
    """Whether it failed before it was loaded: what it was made from would fail again."""
    return run.state == RunState.FAILED and not run.prepared


def shown_path(path: str | Path, config: RunConfig) -> str:
    """A path as a person would type it: from the working folder where it is inside that."""
    folder = config.working_folder
    return str(Path(path).relative_to(folder) if folder and Path(path).is_relative_to(folder) else path)


def progress_of(history: History, iters: int | None, tokens: int, seconds: float) -> Told:
    """`step` of `iters`, and the loss, tokens, time elapsed and time left as words; `pace` in seconds an update.

    `tokens` and `seconds` are those of all updates.
    """
    last = history.last_step
    step = last.step if last else 0
    parts = [f"update {step} of {iters}" if iters else "not loaded yet"]
    if last:
        parts.append(f"loss {last.loss:.3f}")
        parts += [f"reward {last.metrics['reward']:.3f}"] if "reward" in last.metrics else []
        parts += [validation_words(row) for row in history.evaluations("valid")[-1:]]
        parts.append(f"{count(tokens)} tokens, {tokens_a_second(history):.0f} a second")
        parts.append(f"{duration(seconds)} elapsed")
        left = time_left(history, iters or step)
        parts += [f"{duration(left)} left"] if left > 0.5 else []
    recent = [event.seconds for event in history.last_steps(RECENT_UPDATES)]
    return {"step": step, "iters": iters or 0, "parts": parts, "pace": sum(recent) / len(recent) if recent else 0.0}


class Activity:
    """What is being done besides finished updates, and how long it will take by what was seen of it so far."""

    def __init__(self) -> None:
        self._what = ""
        self._begun = 0.0
        self._first = 0
        self._progress: Progress | None = None

    def note(self, progress: Progress | None) -> None:
        """Take note of how far something is; None when it is an update that is being computed."""
        if progress is not None and (progress.what != self._what or self._progress is None):
            self._what, self._begun, self._first = progress.what, time.monotonic(), progress.done
        self._progress = progress

    def told(self, run: RunHandle, iters: int | None) -> Told:
        """`words`, `done` of `total` (0: unknown) and seconds `left` (None: unknown); empty while the run stands."""
        if not run.active:
            return {}
        progress, step = self._progress, run.step_count
        if progress is None and not run.trains:
            return {"words": "doing what was asked", "done": 0, "total": 0, "left": None, "update": 0}
        if progress is None and not run.prepared:
            return {"words": "loading", "done": 0, "total": 0, "left": None, "update": 0}
        if progress is None and iters is not None and step >= iters:
            return {"words": "ending the run", "done": 0, "total": 0, "left": None, "update": 0}
        if progress is None:
            words = f"computing update {step + 1}" if step else "computing the first update"
            return {"words": words, "done": 0, "total": 0, "left": None, "update": step + 1}
        done = progress.done - self._first
        left = (time.monotonic() - self._begun) / done * (progress.total - progress.done) if done > 0 else None
        words = progress_words(progress)
        return {"words": words, "done": progress.done, "total": progress.total, "left": left, "update": 0}


def rows_of(event: StepCompleted | None, location: Callable[[int], str]) -> Told:
    """The rows of an update with their losses before it, the highest first, and where each comes from."""
    if event is None:
        return {"update": None, "rows": [], "note": "no update was done yet; these are the rows of the next one"}
    losses = sorted(losses_by_row(event), key=lambda pair: -pair[1])
    note = f"rows of update {event.step}, losses before it, epoch {event.epoch:.2f}"
    return {"update": event.step, "rows": listed_rows(losses, location), "note": note}


def listed_rows(losses: Sequence[tuple[int, float | None]], location: Callable[[int], str]) -> list[list[Any]]:
    """[row, loss or None, where it comes from] of each, `MOST_ROWS` at most."""
    return [
        [row, round(loss, 4) if loss is not None and math.isfinite(loss) else None, location(row)]
        for row, loss in losses[:MOST_ROWS]
    ]


def samples_of(history: History, config: RunConfig) -> list[Told]:
    """Each kept or answered prompt: `base` answer (None: none) and the newest `answers` as [update, text]."""
    found: dict[str, Told] = {}
    for event in history.in_effect:
        if isinstance(event, SampleGenerated):
            told = found.setdefault(event.prompt, {"prompt": visible(event.prompt), "base": None, "answers": []})
            told["base"] = visible(event.base_answer) if event.base_answer is not None else told["base"]
            before = [one for one in told["answers"] if one[0] != event.step]  # answered again at the same update
            told["answers"] = [*before[1 - ANSWERS_OF_A_PROMPT :], [event.step, visible(event.answer)]]
    for prompt in config.sample_prompts or ():
        found.setdefault(prompt, {"prompt": visible(prompt), "base": None, "answers": []})
    return list(found.values())


def settings_of(config: RunConfig) -> list[list[str]]:
    """[name, value, help] of what may change during the run; `null` is what is switched off."""
    told = []
    for name in LIVE_SETTINGS:
        if name != "sample_prompts":
            value = getattr(config, name)
            told.append([name, "null" if value is None else str(value), SETTINGS[name].metadata["help"]])
    return told


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
