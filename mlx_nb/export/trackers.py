"""Reports the numbers of a run to wandb, trackio, TensorBoard, MLflow and SwanLab, through their own packages.

Names and keys are those of mlx-lm's reports (`train_loss`, `val_loss`, `learning_rate`, ...), so that its dashboards
work; an object with the methods of mlx-lm's TrainingCallback gets the same numbers. A new tracker is a function in
_OPENED and its name in `config.checks.TRACKERS`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mlx_nb.config.checks import TRACKERS, tracker_names
from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import ConfigError
from mlx_nb.events import EvaluationCompleted, Event, Rewound, RunFailed, RunFinished, StepCompleted
from mlx_nb.events.history import History

PROJECT = "mlx_nb"
_PACKAGES = {name: "mlflow-skinny" if name == "mlflow" else name for name in TRACKERS}


class TrainingCallback(Protocol):
    """The shape of mlx-lm's callbacks."""

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Take the numbers of an update."""

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Take the numbers of a validation."""


class Tracked(NamedTuple):
    """What a tracker is told once: the project, the name and id of the run, its settings, the folder it works in."""

    project: str
    name: str
    run_id: str
    settings: Mapping[str, Any]
    folder: Path


class Tracker(NamedTuple):
    """An open report: takes numbers at an update, and is closed with whether the run succeeded."""

    log: Callable[[Mapping[str, float], int], None]
    close: Callable[[bool], None]


def refuse_missing_packages(config: RunConfig) -> None:
    """Raise ConfigError for a tracker in `report_to` whose package is not installed."""
    for name in tracker_names(config.report_to):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"`report_to: {name}` needs a package that is not installed: `pip install {_PACKAGES[name]}`."
            )


class Reports:
    """A listener of a run that reports to trackers, which are opened at the first number.

    `history` gives the run's history as it is then: a resumed run has that of its checkpoint.
    """

    def __init__(self, names: Sequence[str], tracked: Callable[[], Tracked], history: Callable[[], History]) -> None:
        self._names, self._tracked, self._numbers = names, tracked, TrainInfo(history)
        self._open: list[Tracker] = []

    def __call__(self, event: Event) -> None:
        """Report the numbers of an event."""
        if isinstance(event, RunFinished | RunFailed):
            for tracker in self._open:
                tracker.close(isinstance(event, RunFinished))
            self._open = []
        kind, numbers = self._numbers.of(event)
        if kind is None:
            return
        if not self._open:
            tracked = self._tracked()
            self._open = [
                _OPENED[name](importlib.import_module(_MODULES.get(name, name)), tracked) for name in self._names
            ]
        for tracker in self._open:
            tracker.log(numbers, event.step)


class Callback:
    """A listener of a run that calls an object of mlx-lm's TrainingCallback shape."""

    def __init__(self, callback: TrainingCallback, history: Callable[[], History]) -> None:
        self.callback, self._numbers = callback, TrainInfo(history)

    def __call__(self, event: Event) -> None:
        """Call the method for the event, if it has one."""
        kind, numbers = self._numbers.of(event)
        if kind == "train":
            self.callback.on_train_loss_report({"iteration": event.step, **numbers})
        elif kind == "val":
            self.callback.on_val_loss_report({"iteration": event.step, **numbers})

    def __eq__(self, other: object) -> bool:
        return other is self.callback or (isinstance(other, Callback) and other.callback is self.callback)

    __hash__ = None  # type: ignore[assignment]


class TrainInfo:
    """The numbers of events under mlx-lm's keys. `trained_tokens` counts those of the whole run."""

    def __init__(self, history: Callable[[], History]) -> None:
        self._history = history
        self._trained: float | None = None

    def of(self, event: Event) -> tuple[str | None, dict[str, float]]:
        """`train` or `val` with the numbers; (None, {}) for an event without."""
        if isinstance(event, Rewound):
            self._trained = None
        if isinstance(event, StepCompleted):
            if self._trained is None:
                before = [one for one in self._history().in_effect if isinstance(one, StepCompleted)]
                self._trained = sum(one.target_tokens for one in before if one.step < event.step)
            self._trained += event.target_tokens
            seconds = max(event.seconds, 1e-9)
            return "train", {
                "train_loss": event.loss,
                "learning_rate": event.learning_rate,
                "iterations_per_second": 1 / seconds,
                "tokens_per_second": event.target_tokens / seconds,
                "trained_tokens": self._trained,
                "peak_memory": event.peak_memory / 1e9,
                "gradient_norm": event.gradient_norm,
                **{f"train_{name}": value for name, value in event.metrics.items()},
            }
        if isinstance(event, EvaluationCompleted) and event.split in ("valid", "test"):
            start = "val" if event.split == "valid" else "test"
            further = {"perplexity": event.perplexity, "bits_per_byte": event.bits_per_byte, **event.metrics}
            numbers = {f"{start}_{name}": value for name, value in further.items() if value is not None}
            return "val", {f"{start}_loss": event.loss, f"{start}_time": event.seconds, **numbers}
        return None, {}


def _wandb(wandb: Any, run: Tracked) -> Tracker:
    report = wandb.init(
        project=run.project,
        name=run.name,
        id=run.run_id,
        resume="allow",
        reinit="create_new",  # beside one that the person has open
        config=dict(run.settings),
    )
    return Tracker(
        lambda numbers, step: report.log(dict(numbers), step=step), lambda good: report.finish(int(not good))
    )


def _trackio(trackio: Any, run: Tracked) -> Tracker:
    trackio.init(project=run.project, name=run.name, resume="allow", config=dict(run.settings))
    return Tracker(lambda numbers, step: trackio.log(dict(numbers), step=step), lambda good: trackio.finish())


def _swanlab(swanlab: Any, run: Tracked) -> Tracker:
    swanlab.init(project=run.project, experiment_name=run.name, config=dict(run.settings))
    return Tracker(lambda numbers, step: swanlab.log(dict(numbers), step=step), lambda good: swanlab.finish())


def _tensorboard(summary: Any, run: Tracked) -> Tracker:
    writer = summary.Writer(str(run.folder / "runs" / run.project / run.name))

    def log(numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker(log, lambda good: writer.close())


def _mlflow(mlflow: Any, run: Tracked) -> Tracker:
    client = mlflow.MlflowClient()  # leaves a run alone that the person has active
    experiment = client.get_experiment_by_name(run.project)
    number = client.create_experiment(run.project) if experiment is None else experiment.experiment_id
    there = client.create_run(number, run_name=run.name).info.run_id
    for name, value in run.settings.items():
        client.log_param(there, name, str(value)[:500])

    def log(numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            client.log_metric(there, name, value, step=step)

    return Tracker(log, lambda good: client.set_terminated(there, "FINISHED" if good else "FAILED"))


_MODULES = {"tensorboard": "tensorboard.summary"}
_OPENED: dict[str, Callable[[Any, Tracked], Tracker]] = {
    "wandb": _wandb,
    "trackio": _trackio,
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "swanlab": _swanlab,
}
