"""Events and requests of a run: frozen records that convert to JSON lines and back.

Training reports to the views through events only; the views control training through requests only. The comment at a
field is its description in the reference.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


@dataclass(frozen=True)
class Event:
    """Base of all events."""

    step: int  # optimizer updates done when it happened

    def to_json(self) -> str:
        """One JSON line; `event_from_json` reads it back."""
        return json.dumps({"event": type(self).__name__, **dataclasses.asdict(self)})


@dataclass(frozen=True)
class RunStarted(Event):
    """Training starts or continues."""

    name: str  # name of the run
    iters: int  # updates in the whole run
    trainable_parameters: int  # numbers, not arrays, that are trained
    total_parameters: int  # numbers in the model, adapter included
    train_rows: int  # examples that are trained on
    valid_rows: int  # examples to validate on
    notes: tuple[str, ...] = ()  # what should be known about model, rows and settings, in sentences
    trained: str = ""  # what is trained and what is frozen, in words


@dataclass(frozen=True)
class StepCompleted(Event):
    """One optimizer update."""

    # mean over the whole update; for `sft` the negative log-likelihood in nats per target token.
    loss: float
    learning_rate: float  # the rate that this update used
    gradient_norm: float  # L2 norm before clipping
    target_tokens: float  # units of the loss: target tokens, pairs, answers or completions
    tokens: int  # all tokens of the batches, without padding
    seconds: float  # wall time of the update
    peak_memory: int  # bytes at most so far, without the updates that are kept to rewind to
    epoch: float  # passes over the training rows done so far
    rows: tuple[int, ...]  # numbers of the training rows in the update
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # what the method measures, by name
    row_losses: tuple[tuple[int, float], ...] = ()  # (row, its mean loss before the update)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """One line, where a notebook or IPython shows it; `repr` has every field."""
        printer.text(
            f"update {self.step}: loss {self.loss:.4f}, learning rate {self.learning_rate:.3g}, gradient norm "
            f"{self.gradient_norm:.3g}, {self.seconds:.2f} s"
        )


@dataclass(frozen=True)
class EvaluationCompleted(Event):
    """The loss of the method over a fixed set of rows of one split, and its metrics."""

    split: str  # `train`, `valid` or `test`
    loss: float  # mean over the rows; for `grpo` minus the mean reward
    perplexity: float | None  # exp(loss) for `sft`, whose loss is in nats per target token; None for other methods
    target_tokens: float  # units of the loss: target tokens, pairs, answers or completions
    rows: int  # how many rows were measured
    seconds: float  # wall time of the evaluation
    best: bool = False  # whether it is the best validation of the run so far, by the loss or `best_by`
    row_losses: tuple[tuple[int, float], ...] = ()  # (row, its mean loss)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # what the method and `metrics` measure
    bits_per_byte: float | None = None  # loss in bits per byte of the target text, for `sft`; None for other methods
    # 95% confidence intervals over the rows, as [low, high], of the loss, perplexity, bits per byte and `metrics`
    intervals: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    best_by: str = ""  # the metric that decides which validation is best; empty for the loss
    problems: tuple[str, ...] = ()  # what went wrong in metric functions, in sentences

    @property
    def answer_metrics(self) -> list[str]:
        """The names of the `metrics` that judge answers, which are those with an interval."""
        return [name for name in self.metrics if name in self.intervals]

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """A table with a line for each number, where a notebook or IPython shows it; `repr` has every field."""
        numbers = {"loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        lines = [f"{self.split}, {self.rows} rows, update {self.step}"]
        for name, value in {**numbers, **self.metrics}.items():
            if value is not None:
                low, high = self.intervals.get(name, (math.nan, math.nan))
                interval = "" if math.isnan(low) else f"   95% interval {low:.4f} to {high:.4f}"
                lines.append(f"  {name.replace('_', ' '):<16} {value:.4f}{interval}")
        printer.text("\n".join([*lines, *self.problems]))


@dataclass(frozen=True)
class SampleGenerated(Event):
    """An answer to one of the `sample_prompts`."""

    prompt: str  # one of the `sample_prompts`
    answer: str  # what the model answers, as it is at this step
    base_answer: str | None  # what the base answers, without the adapter; None when the base itself is trained
    seconds: float = field(default=0.0, compare=False)  # wall time of the answers


@dataclass(frozen=True)
class RolloutCompleted(Event):
    """Completions were sampled and scored; the following updates train on them."""

    # for each prompt {row, prompt, completions}; for each completion {text, rewards: {function: number}, reward: their
    # weighted sum, advantage, tokens, finished}. A number is None where a function gave none.
    groups: tuple[dict[str, Any], ...]
    seconds: float  # wall time of sampling
    reward_seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # wall time of each reward function
    problems: tuple[str, ...] = ()  # what went wrong in reward functions, in sentences


@dataclass(frozen=True)
class Progress(Event):
    """Progress of work that takes longer than an update, such as loading. Not kept in the history."""

    what: str  # what is being done, in words
    done: int  # parts that are done
    total: int  # parts in all; 0 when that is not known
    seconds: float = 0.0  # time spent on them so far; 0 when that is not known


class RunState(StrEnum):
    """State of a run. Each member equals its string value and is displayed as that."""

    __repr__ = str.__repr__

    BUILT = "built"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True)
class StateChanged(Event):
    """The run started or stopped running in the background. Not kept in the history."""

    state: str  # one of the words of `RunState`


@dataclass(frozen=True)
class RequestRefused(Event):
    """A request could not be carried out and nothing has changed. Not kept in the history."""

    error: str  # why, and what can be done, in a sentence


@dataclass(frozen=True)
class AdapterSaved(Event):
    """An adapter was written."""

    path: str  # file with its weights
    kind: str  # `last`, `best`, or `step` for one that is kept under its update number


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """An exact checkpoint was written. Not kept in the history."""

    path: str  # folder of the checkpoint
    kind: str  # why: `step` or `best` with that adapter, `auto`, `pause`, `error`, `final`, `rewind` or `exit`


@dataclass(frozen=True)
class SettingChanged(Event):
    """A live setting changed at a step boundary."""

    name: str  # name of the setting
    old: Any  # its value before
    new: Any  # its value from now on
    iters: int | None = None  # updates in the whole run from now on; None if that has not changed
    note: str = ""  # what else the change does, in words


@dataclass(frozen=True)
class RunPaused(Event):
    """Training stopped at a step boundary and can continue."""

    reason: str  # why, in words


@dataclass(frozen=True)
class Rewound(Event):
    """The run went back to `step`."""

    from_step: int  # the update it was at
    kept: int  # how many of the events so far still count; the later ones belong to the branch that was left


# Why a run ended.
ITERS_REACHED, EARLY_STOPPING, STOPPED = "iters reached", "early stopping", "stopped"


@dataclass(frozen=True)
class RunFinished(Event):
    """The run is over."""

    reason: str  # `iters reached`, `early stopping` or `stopped`
    seconds: float  # wall time of all updates
    tokens: int  # tokens trained on, without padding
    target_tokens: float  # units of the loss trained on: target tokens, pairs, answers or completions
    best_loss: float | None  # the lowest validation loss, or that of the best by `best_by`; None without validation
    best_step: int | None  # the update that had it
    path: str | None  # the folder with the adapter
    learned: bool = True  # False when no update had anything to learn from: the adapter is what it was before


@dataclass(frozen=True)
class RunFailed(Event):
    """An update was not applied. Parameters and optimizer are those of `step`, and the run can continue from there."""

    reason: str  # `not finite`, `loss spike`, `out of memory`, `loss raised`, `model changed` or `error`
    error: str  # what happened and what can be done, in words
    rows: tuple[int, ...] = ()  # numbers of the training rows in the update
    largest_gradients: tuple[tuple[str, float], ...] = ()  # (parameter, L2 norm), NaN first, then the largest


@dataclass(frozen=True)
class BatchSkipped(Event):
    """The batch that would have been next was left out."""

    rows: tuple[int, ...]  # numbers of its training rows


@dataclass(frozen=True)
class LossSpiked(Event):
    """An update that was kept had a loss far above those of similar rows."""

    words: str  # how far


@dataclass(frozen=True)
class NothingLearned(Event):
    """The last updates had nothing to learn from: a gradient of 0, or equal rewards in every group."""

    updates: int  # how many in a row


@dataclass(frozen=True)
class DataChanged(Event):
    """A data file no longer has the content that the run read. The run continues with the rows it has read.

    Reported once.
    """

    path: str  # path of the file


@dataclass(frozen=True)
class MemoryLow(Event):
    """Peak mlx memory is close to the capacity of the device."""

    peak: int  # peak use in bytes so far
    limit: int  # capacity of the device in bytes


EVENT_TYPES: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (
        RunStarted,
        StepCompleted,
        EvaluationCompleted,
        SampleGenerated,
        RolloutCompleted,
        Progress,
        StateChanged,
        RequestRefused,
        AdapterSaved,
        CheckpointSaved,
        SettingChanged,
        RunPaused,
        Rewound,
        RunFinished,
        RunFailed,
        BatchSkipped,
        LossSpiked,
        NothingLearned,
        DataChanged,
        MemoryLow,
    )
}


def event_from_json(line: str) -> Event:
    """The event that `Event.to_json` wrote."""
    values = json.loads(line)
    kind = EVENT_TYPES[values.pop("event")]
    for declared in dataclasses.fields(kind):
        if isinstance(values.get(declared.name), list):
            values[declared.name] = tuple(tuple(v) if isinstance(v, list) else v for v in values[declared.name])
    return kind(**values)


@dataclass(frozen=True)
class Request:
    """Base of all requests to a run; read at step boundaries only."""

    def to_json(self) -> str:
        """One JSON line; `request_from_json` reads it back."""
        return json.dumps({"request": type(self).__name__, **dataclasses.asdict(self)})


@dataclass(frozen=True)
class Pause(Request):
    """Stop at the next step boundary; the run can continue."""

    reason: str = "pause requested"  # the reason that `RunPaused` will give
    at_once: bool = False  # drop the update or evaluation in progress, as if it had never begun


@dataclass(frozen=True)
class Cancel(Request):
    """Skip the answers to `sample_prompts` that are due now, and a requested validation."""


@dataclass(frozen=True)
class Stop(Request):
    """End the run at the next step boundary; the adapter is saved."""


@dataclass(frozen=True)
class Skip(Request):
    """Leave out the next batch."""


@dataclass(frozen=True)
class Save(Request):
    """Write the adapter now."""


@dataclass(frozen=True)
class Evaluate(Request):
    """Validate now."""


@dataclass(frozen=True)
class Sample(Request):
    """Answer the `sample_prompts` now."""


@dataclass(frozen=True)
class Rewind(Request):
    """Go back to an update."""

    to: int  # number of the update


@dataclass(frozen=True)
class ChangeSetting(Request):
    """Change a live setting."""

    name: str  # name of the setting
    value: Any  # its new value


@dataclass(frozen=True)
class Question(Request):
    """Ask the live model, and receive its answer as it grows."""

    messages: str | Sequence[Mapping[str, Any]]  # a text, or the messages of a chat
    # Called with (text so far, whether it is complete) after each token; the answer ends there if it returns True.
    on_text: Callable[[str, bool], bool | None]
    base: bool = False  # whether the base answers, with the adapter switched off
    max_tokens: int = 256  # tokens of the answer at most


# Who handles which request. Each of the two matches on every kind of its own; the type checker fails if one is missing.
TrainerRequest = Pause | Stop | Skip | Save | Evaluate | Sample | ChangeSetting | Cancel
RunRequest = Question | Rewind
# Pending requests are saved in checkpoints, except those that end a run: whoever resumes it wants it to continue.
KEPT_REQUESTS = (Skip, Save, Evaluate, Sample, Rewind, ChangeSetting)


def request_from_json(line: str) -> Request:
    """Parse a request written by `Request.to_json`, of the kinds that a checkpoint stores."""
    values = json.loads(line)
    kinds = {kind.__name__: kind for kind in KEPT_REQUESTS}
    return kinds[values.pop("request")](**values)
