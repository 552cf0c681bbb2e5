"""Sweeps: runs with several values of some settings, side by side on one base model, and the best of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_nb.config.methods import lower_is_better
from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import CommandError, counted
from mlx_nb.events import Event, RunFailed, RunPaused
from mlx_nb.experiments.sweep_display import Shown, heat_map, small_multiples, sweep_html, sweep_text
from mlx_nb.experiments.sweep_space import SEED, axes_of, points_of, read_settings, refuse_incomparable, settings_at
from mlx_nb.process.ipython import in_ipython
from mlx_nb.run.run import Run
from mlx_nb.train.interrupts import Interrupts

if TYPE_CHECKING:
    from mlx_nb.events import Pause
    from mlx_nb.view.curves.shown_figure import ShownFigure


@dataclass(eq=False)
class Trial:
    """One run of a sweep.

    values      its values of the swept settings
    dropped_at  the update at which halving dropped it, or None
    failure     why its training failed, or ""
    """

    run: Run
    values: dict[str, Any]
    dropped_at: int | None = None
    failure: str = ""

    @property
    def alive(self) -> bool:
        """Whether it still trains in the sweep."""
        return self.dropped_at is None and not self.failure

    def best(self, until: int | None = None) -> tuple[float, int] | None:
        """(value, update) of its best validation up to update `until`, by the loss or `best_by`; None without any."""
        name, last = self.run.config.best_by or "loss", math.inf if until is None else until
        found = [
            (row[name], row["step"])
            for row in self.run.history.evaluations("valid")
            if row["step"] <= last and math.isfinite(row.get(name, math.nan))
        ]
        return min(found, key=lambda one: self._signed(one[0]), default=None)

    def score(self, until: int | None = None) -> float:
        """The number that ranks it, lower is better; infinity without a validation, or after a failure."""
        found = self.best(until)
        return math.inf if found is None or self.failure else self._signed(found[0])

    def _signed(self, value: float) -> float:
        name = self.run.config.best_by
        return value if name is None or lower_is_better(self.run.config.method, name) else -value


class Sweep:
    """Runs on one base model in memory that differ in some settings, trained in turns of one update.

    `run()` trains them all, and again after an interrupt, from where it was. The object displays itself as a table;
    `best` is the best run, `cell()` its settings as a cell, `plot()` the curves, `heat_map()` two settings in a grid.
    Each run is a `Run` of its own in a folder of its own, with the losses that it would have alone, bit for bit.
    """

    def __init__(self, trials: list[Trial], axes: Mapping[str, list[Any]], name: str, halving: bool) -> None:
        self.trials, self.axes, self.name, self.halving = trials, dict(axes), name, halving
        self._driven: Run | None = None

    @property
    def runs(self) -> list[Run]:
        """The runs in the order of the grid."""
        return [trial.run for trial in self.trials]

    @property
    def ranked(self) -> list[Trial]:
        """The trials, the best first: by their best validation, or with several seeds by the mean over these."""
        means = {id(trial): statistics.fmean(one.score() for one in self.repeats(trial)) for trial in self.trials}
        return sorted(self.trials, key=lambda trial: (means[id(trial)], trial.score()))

    def repeats(self, trial: Trial) -> list[Trial]:
        """The trials that differ from `trial` in their seed at most."""

        def but_seed(one: Trial) -> dict[str, Any]:
            return {name: value for name, value in one.values.items() if name != SEED}

        return [one for one in self.trials if but_seed(one) == but_seed(trial)]

    @property
    def best(self) -> Run:
        """The best run so far. Raises CommandError before the first validation."""
        first = self.ranked[0]
        if not math.isfinite(first.score()):
            raise CommandError(f"no run of {self.name} has a validation yet. `run()` trains them.")
        return first.run

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return all(trial.run.finished for trial in self.trials if trial.alive)

    @property
    def length(self) -> int | None:
        """The length of the longest run in updates; None if it is in epochs and no rows are loaded."""
        lengths = [run.trainer.iters if run.prepared else run.config.iters for run in self.runs]
        return None if None in lengths else max(one for one in lengths if one is not None)

    @property
    def rungs(self) -> list[int]:
        """The updates at which halving drops the worse half of the runs: 15 and 30 for 4 runs of 60 updates."""
        if not self.halving or self.length is None:
            return []
        rounds = math.ceil(math.log2(len(self.trials)))
        return sorted({self.length // 2**back for back in range(1, rounds + 1)} - {0})

    @property
    def planned_updates(self) -> int | None:
        """The updates of all runs together, if none fails; None if the length is not known yet."""
        if (length := self.length) is None:
            return None
        if not self.halving:
            return sum(run.trainer.iters if run.prepared else run.config.iters or 0 for run in self.runs)
        total, alive, before = 0, len(self.trials), 0
        for rung in [*self.rungs, length]:
            total += alive * (rung - before)
            alive, before = math.ceil(alive / 2), rung
        return total

    @property
    def budget(self) -> str:
        """What the sweep will take, in a sentence: runs, updates, and the memory of each further run."""
        planned, runs = self.planned_updates, counted(len(self.trials), "run")
        words = f"{self.name}: {runs} on one base model" + ("" if planned is None else f", {planned:,} updates")
        if self.rungs:
            *most, last = map(str, self.rungs)
            words += f"; the worse half ends at update {', '.join(most)}{' and ' if most else ''}{last}"
        held = [run.trainer.stepper.arrays() for run in self.runs if run.prepared]
        if held:
            own = max(sum(array.nbytes for group in one.values() for array in group.values()) for one in held)
            words += f"; each run holds {own / 1e6:.1f} MB of its own"
        return f"{words}."

    @property
    def seconds_left(self) -> float | None:
        """About how long the rest takes, from the updates done so far; None before the first."""
        done = sum(run.step_count for run in self.runs)
        spent = sum(sum(run.history.spent().values()) for run in self.runs)
        planned = self.planned_updates
        return None if not done or planned is None else spent / done * max(0, planned - done)

    def run(self, on_event: Callable[[Event], None] | None = None) -> Sweep:
        """Train to the end, in turns of one update. Returns itself.

        A run that fails is left out, with its reason in the table. An interrupt ends it between two pieces of work,
        and saves every run; outside a notebook it is then raised as KeyboardInterrupt. Raises CommandError without
        validation rows, or for a run that trains elsewhere.
        """
        try:
            with Interrupts(self._strike) as interrupts, closing(self._events()) as events:
                for event in events:
                    if on_event is not None:
                        on_event(event)
                    if interrupts.count:
                        break
        finally:
            self._driven = None
            for run in self.runs:
                if run.prepared:
                    run.trainer.clear_pauses()
                    run.save_unsaved()
        if interrupts.count and not in_ipython():
            raise KeyboardInterrupt(f"{self.name} is paused, and saved.")
        return self

    def _strike(self, pause: Pause) -> None:
        """Pass a second interrupt on to the run at work, which may be inside a function of the person."""
        if pause.at_once and self._driven is not None:
            self._driven.request(pause)

    def _events(self) -> Generator[Event, None, None]:
        yield from self._load()
        for rung in [*self.rungs, None]:
            yield from self._train_to(rung)
            self._measure(rung)
            if rung is not None:
                self._drop_worse_half(rung)

    def _load(self) -> Iterator[Event]:
        first = self.runs[0]
        if first.splits.valid is None:
            raise CommandError(
                f"{first.name} has no validation rows, which decide a sweep. Give some (valid.jsonl), or "
                "`val_set_size: 50`."
            )
        for trial in self.trials:
            if not trial.run.prepared:
                if trial.run is not first:
                    trial.run.inputs = first.inputs.sharing_rows(trial.run.config)
                yield from self._drive(trial, 0)

    def _train_to(self, update: int | None) -> Iterator[Event]:
        def behind() -> list[Trial]:
            end = math.inf if update is None else update
            return [one for one in self.trials if one.alive and not one.run.finished and one.run.step_count < end]

        while turn := behind():
            for trial in turn:
                yield from self._drive(trial, 1)

    def _drive(self, trial: Trial, updates: int) -> Iterator[Event]:
        """Train one run for some updates, and note its failure."""
        self._driven = trial.run
        paused = None
        for event in trial.run.events(updates):
            trial.failure = event.error if isinstance(event, RunFailed) else trial.failure
            paused = event if isinstance(event, RunPaused) else paused
            yield event
        self._driven = None
        if paused is not None:
            raise CommandError(f"{trial.run.name} paused: {paused.reason}")

    def _measure(self, update: int | None) -> None:
        """Validate the runs that were not validated at this update, so that each has a number from there."""
        for trial in self.trials:
            run = trial.run
            at_rung = update is None or run.step_count == update
            known = {row["step"] for row in run.history.evaluations("valid")}
            if trial.alive and at_rung and run.step_count not in known:
                run.evaluate()

    def _drop_worse_half(self, rung: int) -> None:
        alive = sorted((one for one in self.trials if one.alive), key=lambda one: one.score(rung))
        keep = math.ceil(len(alive) / 2)
        for trial in alive[keep:]:
            trial.dropped_at = rung

    def cell(self, name: str | None = None) -> str:
        """The best run's settings as the text of a `%%finetune` cell."""
        config = self.best.config
        settings = config.replace(adapter_path=None, snapshot_memory=_SNAPSHOT_MEMORY).to_yaml()
        return f"%%finetune --name {name or f'{self.name}-best'}\n{settings}"

    def plot(self) -> ShownFigure:
        """Training and validation losses by update: a column for each value of the second swept setting."""
        return small_multiples(self._shown())

    def heat_map(self) -> ShownFigure:
        """The best validation by two swept settings. Raises CommandError unless exactly two, besides `seed`, vary."""
        return heat_map(self._shown())

    def _shown(self) -> Shown:
        return Shown(self.name, self.axes, self.trials, self.ranked, self.budget, self.seconds_left, self.repeats)

    def __repr__(self) -> str:
        return sweep_text(self._shown())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": repr(self), "text/html": sweep_html(self._shown())}


_SNAPSHOT_MEMORY = RunConfig().snapshot_memory


def sweep(
    settings: str | Path | Mapping[str, Any],
    *,
    name: str = "sweep",
    halving: bool = False,
    trials: int | None = None,
    seed: int = 0,
    resume: bool = False,
    namespace: Mapping[str, Any] | None = None,
) -> Sweep:
    """Prepare a sweep, `mlx_nb.sweep(yaml).run()`: a run for each combination of the settings that have a list.

    `settings` is YAML text, a file or a dict: `learning_rate: [1e-5, 1e-4]`, `lora_parameters: {rank: [8, 32]}`,
    `seed: [0, 1, 2]` to repeat each. `trials` takes as many combinations at random, by `seed`. With `halving` the worse
    half of the runs ends at each of a few updates, by the best validation so far. `resume` continues the runs of that
    name from their newest checkpoints. The runs are called NAME-1, NAME-2, ... and keep no updates to rewind to, unless
    `snapshot_memory` is given. Raises ConfigError and CommandError.
    """
    axes, fixed = axes_of(read_settings(settings))
    refuse_incomparable(axes, fixed, halving)
    if fixed.get("fine_tune_type") == "full" or "full" in axes.get("fine_tune_type", ()):
        raise CommandError(
            "full fine-tuning changes the base model, which the runs of a sweep share. Use lora or dora."
        )
    fixed.setdefault("snapshot_memory", 0)
    points = points_of(axes, trials, seed)
    configs = []
    for number, point in enumerate(points, start=1):
        values = settings_at(fixed, point)
        if values.get("adapter_path") is not None:
            values["adapter_path"] = f"{values['adapter_path']}/{number}"
        configs.append(RunConfig.from_dict(values))
    made = []
    for number, (point, config) in enumerate(zip(points, configs), start=1):
        run = Run(config, name=f"{name}-{number}", namespace=namespace)
        run.inputs.check_names()
        made.append(Trial(run, point))
    if resume:
        for trial in made:
            if trial.run.has_checkpoint:
                trial.run = Run.resume(trial.run.folder, config=trial.run.config, namespace=namespace)
    return Sweep(made, {key: values for key, values in axes.items() if len(values) > 1}, name, halving)
