"""What happened in a run: frozen records that turn into JSON lines and back.

Events are the only thing training tells the views; requests are the only thing the views tell training.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


@dataclass(frozen=True)
class Event:
    """Base of all events. `step` counts the optimizer updates done when it happened."""

    step: int

    def to_json(self) -> str:
        """One JSON line; `event_from_json` reads it back."""
        return json.dumps({"event": type(self).__name__, **dataclasses.asdict(self)})


@dataclass(frozen=True)
class RunStarted(Event):
    """Training begins or goes on. `trainable_parameters` and `total_parameters` count numbers, not arrays.

    `trained` says in words what is trained and what is frozen.
    """

    name: str
    iters: int
    trainable_parameters: int
    total_parameters: int
    train_rows: int
    valid_rows: int
    notes: tuple[str, ...] = ()
    trained: str = ""


@dataclass(frozen=True)
class StepCompleted(Event):
    """One optimizer update.

    loss             of the method, mean over the whole update; for `sft` negative log-likelihood, nats per target token
    learning_rate    the rate this update used
    gradient_norm    L2 norm before clipping
    target_tokens    units of the loss: target tokens, pairs, answers, completions;  tokens: all without padding
    seconds          wall time of the update
    peak_memory      bytes at most so far, without the updates that are kept to rewind to
    rows             numbers of the training rows in the update
    row_losses       (row, its mean loss) of each of them, before the update
    """

    loss: float
    learning_rate: float
    gradient_norm: float
    target_tokens: float
    tokens: int
    seconds: float
    peak_memory: int
    epoch: float
    rows: tuple[int, ...]
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    row_losses: tuple[tuple[int, float], ...] = ()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """One line, where a notebook or IPython shows it; `repr` has every field."""
        printer.text(
            f"update {self.step}: loss {self.loss:.4f}, learning rate {self.learning_rate:.3g}, gradient norm "
            f"{self.gradient_norm:.3g}, {self.seconds:.2f} s"
        )


@dataclass(frozen=True)
class EvaluationCompleted(Event):
    """The loss of the method over a fixed set of rows of one split, and its metrics.

    perplexity     exp(loss) for `sft`, whose loss is in nats per target token; None for other methods
    target_tokens  units of the loss: target tokens, pairs, or completions
    row_losses     (row, its mean loss).  For `grpo` a loss is minus a reward
    """

    split: str
    loss: float
    perplexity: float | None
    target_tokens: float
    rows: int
    seconds: float
    best: bool = False
    row_losses: tuple[tuple[int, float], ...] = ()
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class SampleGenerated(Event):
    """What the model answered to a prompt at this step, and its base; None when the base is trained itself."""

    prompt: str
    answer: str
    base_answer: str | None


@dataclass(frozen=True)
class RolloutCompleted(Event):
    """Completions were sampled and scored; the next updates are made with them.

    groups    for each prompt {row, prompt, completions}, and of each completion {text, rewards: {function: number},
              reward: their weighted sum, advantage, tokens, finished}; None where a function gave no number
    seconds   of sampling, and `reward_seconds` of each reward function
    problems  what went wrong in reward functions, in words
    """

    groups: tuple[dict[str, Any], ...]
    seconds: float
    reward_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Progress(Event):
    """Something longer than an update is at `done` of `total` parts, after `seconds` of work if that is known.

    Not kept in the history.
    """

    what: str
    done: int
    total: int
    seconds: float = 0.0


class RunState(StrEnum):
    """What a run is doing; each is equal to its word, and shown as it."""

    __repr__ = str.__repr__

    BUILT = "built"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True)
class StateChanged(Event):
    """The run began or ceased to move in the background. Not kept in the history."""

    state: str


@dataclass(frozen=True)
class RequestRefused(Event):
    """Something that was asked for could not be done, and nothing has changed. Not kept in the history."""

    error: str


@dataclass(frozen=True)
class AdapterSaved(Event):
    """An adapter was written. `kind` is `last`, `best` or `step`."""

    path: str
    kind: str


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """An exact checkpoint was written to the folder `path`. Not kept in the history.

    `kind` says why: `step` or `best` with that adapter, `auto`, `pause`, `error`, `final`, `rewind`, `exit`.
    """

    path: str
    kind: str


@dataclass(frozen=True)
class SettingChanged(Event):
    """A live setting changed at a step boundary.

    `iters` is how many updates the run has from then on, and `note` what else the change does, in words.
    """

    name: str
    old: Any
    new: Any
    iters: int | None = None
    note: str = ""


@dataclass(frozen=True)
class RunPaused(Event):
    """Training stopped at a step boundary and can go on."""

    reason: str


@dataclass(frozen=True)
class Rewound(Event):
    """The run went back to `step` from `from_step`. Of the events that stood, the first `kept` still do."""

    from_step: int
    kept: int


# Why a run ended.
ITERS_REACHED, EARLY_STOPPING, STOPPED = "iters reached", "early stopping", "stopped"


@dataclass(frozen=True)
class RunFinished(Event):
    """The run is over. `reason` is `iters reached`, `early stopping` or `stopped`.

    `learned` is False when no update of the run had anything to learn from: the adapter says what it said before.
    """

    reason: str
    seconds: float
    tokens: int
    target_tokens: float
    best_loss: float | None
    best_step: int | None
    path: str | None
    learned: bool = True


@dataclass(frozen=True)
class RunFailed(Event):
    """An update was not applied. Parameters and optimizer are those of `step`, and the run can go on from there.

    reason             `not finite`, `loss spike`, `out of memory`, `loss raised` or `model changed`
    error              what happened and what can be done, in words
    rows               numbers of the training rows in the update
    largest_gradients  (parameter, L2 norm) of those with the largest gradients, NaN first
    """

    reason: str
    error: str
    rows: tuple[int, ...] = ()
    largest_gradients: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class BatchSkipped(Event):
    """The batch that would have been next was left out; `rows` are the numbers of its training rows."""

    rows: tuple[int, ...]


@dataclass(frozen=True)
class LossSpiked(Event):
    """An update that was kept had a loss far above those of like rows; `words` says how far."""

    words: str


@dataclass(frozen=True)
class NothingLearned(Event):
    """The last `updates` updates had nothing to learn from: a gradient of 0, or equal rewards in every group."""

    updates: int


@dataclass(frozen=True)
class DataChanged(Event):
    """A file of rows is no longer what the run read from it; the run goes on with the rows as they were. Said once."""

    path: str


@dataclass(frozen=True)
class MemoryLow(Event):
    """The most that mlx has used, `peak` bytes, is close to the `limit` of the device."""

    peak: int
    limit: int


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
    """Base of what a person may ask of a run; read at step boundaries only."""

    def to_json(self) -> str:
        """One JSON line; `request_from_json` reads it back."""
        return json.dumps({"request": type(self).__name__, **dataclasses.asdict(self)})


@dataclass(frozen=True)
class Pause(Request):
    """Stop at the next step boundary; the run can go on. `at_once` drops the update or evaluation in hand."""

    reason: str = "asked to pause"
    at_once: bool = False


@dataclass(frozen=True)
class Cancel(Request):
    """Leave out the answers to kept prompts that are due now, and a validation that was asked for."""


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
    """Answer the kept prompts now."""


@dataclass(frozen=True)
class Rewind(Request):
    """Go back to an update."""

    to: int


@dataclass(frozen=True)
class ChangeSetting(Request):
    """Change a live setting."""

    name: str
    value: Any


@dataclass(frozen=True)
class Question(Request):
    """What a person asks the live model: a text, or the messages of a chat, and who gets the answer as it grows.

    `on_text(text so far, whether it is complete)` is called after each token; the answer ends there if it returns True.
    """

    messages: str | Sequence[Mapping[str, Any]]
    on_text: Callable[[str, bool], bool | None]
    base: bool = False
    max_tokens: int = 256


# Who answers which: each of the two has a branch for every kind of its own, which the type checker holds it to.
TrainerRequest = Pause | Stop | Skip | Save | Evaluate | Sample | ChangeSetting | Cancel
RunRequest = Question | Rewind
# What was asked and not done yet is part of a checkpoint, but for what ends a run: who resumes it wants it to go on.
KEPT_REQUESTS = (Skip, Save, Evaluate, Sample, Rewind, ChangeSetting)


def request_from_json(line: str) -> Request:
    """The request that `Request.to_json` wrote, of those that a checkpoint keeps."""
    values = json.loads(line)
    kinds = {kind.__name__: kind for kind in KEPT_REQUESTS}
    return kinds[values.pop("request")](**values)
