"""The public class Run: one fine-tuning run. Model and rows are loaded at first use.

Run checks arguments and takes turns between threads; the work is in the other modules of this folder.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from mlx_nb.config.dialects.imported import Imported, read_settings
from mlx_nb.config.methods import method_named
from mlx_nb.config.run_config import LENGTHS, LIVE_SETTINGS, SETTINGS, RunConfig, unknown_settings
from mlx_nb.data.check.check import SAMPLED_ROWS, DataCheck, check_data
from mlx_nb.data.examples.effects import refuse_ineffective
from mlx_nb.data.examples.examples import RowView
from mlx_nb.data.examples.settings import LeftOut
from mlx_nb.data.sources.splits import Splits
from mlx_nb.errors import (
    CheckpointError,
    CommandError,
    ConfigError,
    FolderError,
    MlxNbError,
    shown,
)
from mlx_nb.events import (
    STOPPED,
    ChangeSetting,
    CheckpointSaved,
    EvaluationCompleted,
    Event,
    Pause,
    Progress,
    Question,
    Request,
    Rewound,
    RunFailed,
    RunFinished,
    RunPaused,
    RunRequest,
    RunState,
    Skip,
    StateChanged,
    StepCompleted,
    TrainerRequest,
)
from mlx_nb.events.history import History
from mlx_nb.files.places import check_name, folder_of, refuse_among_files, same_folder, working_folder
from mlx_nb.files.run_folder import RunFolder
from mlx_nb.files.written_files import CHECKPOINTS, EXPORT, RUN
from mlx_nb.process import exits
from mlx_nb.process.turns import Turns, one_at_a_time
from mlx_nb.run import foreground
from mlx_nb.run.adapter_exports import MLX_LM, can_write, check_format, export_adapter, write_adapter
from mlx_nb.run.background import Background
from mlx_nb.run.checkpoints import Checkpoints
from mlx_nb.run.evaluating import evaluated
from mlx_nb.run.generation import check_generation, generate_answers
from mlx_nb.run.inputs import RunInputs
from mlx_nb.run.live_model import token_losses
from mlx_nb.run.preparation import check_template_file, folder_taken, loading, make_trainer, with_start_adapter
from mlx_nb.run.resume import folder_to_resume, restore_requests
from mlx_nb.run.resume_checks import (
    Unfit,
    allowed_changes,
    changes_since,
    defaults_taken,
    length_given,
    read_history_of,
    refuse_missing_variables,
    requests_of,
    settings_to_resume,
)
from mlx_nb.run.rewinding import Rewinding
from mlx_nb.run.rows import Rows
from mlx_nb.run.training_loop import TrainingLoop
from mlx_nb.run.user_calls import USER_FUNCTION, UserCalls
from mlx_nb.train.inbox import Inbox
from mlx_nb.train.interrupts import interrupts_wait

if TYPE_CHECKING:
    from mlx_nb.export.fuse_report import FuseReport
    from mlx_nb.export.gguf import GgufExport
    from mlx_nb.export.trackers import TrainingCallback
    from mlx_nb.model.loading import LoadedModel
    from mlx_nb.rollouts.generation import Prompt
    from mlx_nb.run.adapters import Adapters
    from mlx_nb.run.saved_model import SavedModel
    from mlx_nb.train.checkpoint import Checkpoint, CheckpointInfo
    from mlx_nb.train.interrupts import Interrupts
    from mlx_nb.train.memory_plan import MemoryPlan
    from mlx_nb.train.trainer import Trainer
    from mlx_nb.view.curves.rate_range import RateRange
    from mlx_nb.view.curves.shown_figure import ShownFigure
    from mlx_nb.view.panel.panel import Panel
    from mlx_nb.view.reports.completions import CompletionsDisplay
    from mlx_nb.view.rows.browser import RowBrowser


_REQUESTS = "A run takes: " + ", ".join(kind.__name__ for kind in get_args(TrainerRequest) + get_args(RunRequest)) + "."


class Run:
    """A fine-tuning run that can be trained, paused, inspected and changed step by step.

    `name` determines the default adapter folder. `data: name` is looked up as a variable in `namespace`. Relative paths
    refer to the working folder at the time the run is created.
    `allow_changed=["model"]` allows a start adapter that was trained on another base model.
    Raises ConfigError, DataError, FolderError or ModelError, each in one line, at the first use of an invalid input.
    """

    def __init__(
        self,
        config: RunConfig | None = None,
        *,
        name: str = "run",
        namespace: Mapping[str, Any] | None = None,
        allow_changed: Collection[str] = (),
        _from_checkpoint: bool = False,
    ) -> None:
        check_name(name)
        if not isinstance(config, RunConfig | None):
            hint = " `RunConfig.from_dict` makes one of a dict." if isinstance(config, Mapping) else ""
            raise ConfigError(f"config is a RunConfig, such as RunConfig(iters=100), not {shown(config)}.{hint}")
        if not isinstance(namespace, Mapping | None):
            raise ConfigError(f"namespace is a dict such as globals(), not {shown(namespace)}.")
        config = config or RunConfig()
        config = config if config.working_folder else config.at(working_folder())
        self._from_checkpoint = _from_checkpoint
        self._allow_changed = allowed_changes(allow_changed)
        if not _from_checkpoint:
            check_template_file(config)
        self.config = config if _from_checkpoint else with_start_adapter(config)
        self.name = name
        self.imported: Imported | None = None  # the settings that another program's file gave
        self.history = History()
        self.inputs = RunInputs(self.config, namespace)
        self._resumed = False
        self._home: RunFolder | None = None
        self.forks = 0  # forks with automatic names
        self.background = Background(self)
        self._inbox = Inbox()
        self._calls = UserCalls(name)
        self._checkpoints = Checkpoints(self, self._inbox)
        self._rewinding = Rewinding(self, self._checkpoints, self._record)
        self._loop = TrainingLoop(self, self._inbox, self._checkpoints, self._rewinding, self._calls, self._record)
        self.turns = Turns()
        self._trainer: Trainer | None = None
        self._adapters: dict[str, SavedModel] = {}
        self._panel: weakref.ref[Panel] | None = None
        self._browsers: list[RowBrowser] = []  # they live as long as the run, displayed or not
        exits.register(self)
        if self.config.report_to is not None:
            self._report()

    def _report(self) -> None:
        """Report the numbers of the run to the trackers in `report_to`."""
        from mlx_nb.config.checks import tracker_names
        from mlx_nb.export.trackers import PROJECT, Reports, Tracked

        def tracked() -> Tracked:
            config = self.config
            project, folder = config.project_name or PROJECT, config.working_folder or working_folder()
            return Tracked(project, self.name, self.home.run_id, config.changed(), folder)

        self._calls.listen(Reports(tracker_names(self.config.report_to), tracked, lambda: self.history))

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. Raises AttributeError for the name of a setting, which `run.iters = 9` would not change."""
        if name in SETTINGS and not hasattr(type(self), name):
            raise AttributeError(f"`{name}` is a setting, not an attribute: write `run.set({name}={shown(value)})`.")
        super().__setattr__(name, value)

    @classmethod
    def from_yaml(
        cls,
        source: str | Path,
        *,
        name: str = "run",
        namespace: Mapping[str, Any] | None = None,
        allow_changed: Collection[str] = (),
        **overrides: Any,
    ) -> Run:
        """A run from YAML text or a YAML file. `overrides` are settings that take precedence.

        A file of mlx-lm, mlx-lm-lora, LoRA-Studio, mlx-bun, TRL, axolotl or LLaMA-Factory is read as what it means
        here, which `run.imported` reports; so is a text that names one of them, as `dialect: mlx-lm`. Raises
        ConfigError if it has settings that would change what is trained, and that mlx_nb does not have.
        """
        config, imported = read_settings(source, **overrides)
        run = cls(config, name=name, namespace=namespace, allow_changed=allow_changed)
        run.imported = imported
        run.inputs.check_reward_names()
        return run

    # Inputs

    @property
    def loaded(self) -> LoadedModel:
        """The model, its tokenizer and their source; loaded at first use."""
        return self.inputs.loaded

    @property
    def model(self) -> Any:
        """The live mlx model, with the adapter once training has been prepared."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer with its chat template. Loaded without the model if that is not loaded yet."""
        return self.inputs.tokenizer

    @property
    def splits(self) -> Splits:
        """The rows of each split; opened at first use."""
        return self.inputs.splits

    @property
    def folder(self) -> Path:
        """Where adapters are saved, as an absolute path."""
        return folder_of(self.config.adapter_path or f"adapters/{self.name}", self.config.working_folder)

    @property
    def home(self) -> RunFolder:
        """The run's folder, with its lock and the list of written files."""
        if self._home is None or self._home.path != self.folder:
            self._home = RunFolder(
                self.folder,
                self.name,
                None if self._home is None else self._home.run_id,
                at_rest=self._at_rest,
                let_go=self.release,
            )
        return self._home

    def _at_rest(self) -> bool:
        return not self.background.active and not self.unsaved_updates

    @property
    def trainer(self) -> Trainer:
        """The trainer. At first use the rows are tokenized and the adapter is attached."""
        if self._trainer is None:
            with self.turns.turn():
                if self._trainer is None:  # no other thread has created it meanwhile
                    self._trainer = self._prepare()
        return self._trainer

    def load(self) -> Iterator[Progress]:
        """Load model and rows and attach the adapter, yielding Progress.

        If a pause is requested it ends early; the next call continues where it stopped.
        """
        if self._trainer is not None:
            return
        with self._folder_taken():
            inputs, pieces = self.inputs, loading(self.inputs)
            while (progress := next(pieces, None)) is not None:
                self._calls.notify(progress)
                yield progress
                if Pause in self._inbox:
                    self.home.release()
                    return
                if self.inputs is not inputs:  # a setting was changed meanwhile
                    inputs, pieces = self.inputs, loading(self.inputs)
            _ = self.trainer

    def _folder_taken(self) -> AbstractContextManager[None]:
        return folder_taken(self.config, self.home, resumed=self._resumed)

    def _prepare(self) -> Trainer:
        with self._folder_taken():
            return make_trainer(
                self.inputs,
                self.home,
                self._inbox,
                from_checkpoint=self._from_checkpoint,
                resumed=self._resumed,
                allow_changed=self._allow_changed,
            )

    # Inspecting

    def rows(self, split: str = "train") -> Rows:
        """The rows of a split; `run.rows("train")[12]` is row 12 as the model will see it."""
        return Rows(self.inputs.split(split), split)

    def row_losses(self, split: str = "train") -> dict[int, float]:
        """The latest loss of each row of `split` that was trained on or evaluated, highest first."""
        latest = {row: visits[-1][1] for row, visits in self.history.row_losses(split).items()}
        return dict(sorted(latest.items(), key=lambda item: -item[1]))

    def token_losses(self, row: RowView, *, base: bool = False, rejected: bool = False) -> Any:
        """(T,) current loss in nats of each token of a row; NaN for the first. `base` measures without the adapter.

        Of a pair it measures the prompt with the chosen answer, or with the `rejected` one.
        """
        self._refuse_base(base)
        with self._turn("measure losses"):
            return token_losses(self.inputs, row, base=base, rejected=rejected)

    def _refuse_base(self, base: bool) -> None:
        if base and self.config.fine_tune_type == "full" and self.step_count:
            raise CommandError("full fine-tuning changes the base model itself, so it is no longer available.")

    def plan(self, memory: str | None = None, *, time: bool = False) -> MemoryPlan:
        """The memory of an update by part, what fits into it, and which settings need less. Loads no weights.

        `memory`, such as `16GB`, replaces `memory_limit`; `auto` is what is available. The largest batch is that
        of the rows if they are tokenized already, otherwise the largest that the settings allow. After updates it has
        their mean time. `time` loads the model, measures the next 3 updates and estimates the time of the rest of the
        run; they are undone bit for bit, also after an interrupt (KeyboardInterrupt) or an error. Raises CommandError
        then for a running run, and for a method that samples completions.
        """
        from mlx_nb.run.planning import pace_of, plan_of

        if time:
            self._calls.refuse_inside("measure the time of updates")
            self._refuse_running("measure the time of updates")
            pace = pace_of(self.trainer, self._calls.notify)
            return dataclasses.replace(plan_of(self.inputs, memory, pace.seconds), updates_left=pace.updates_left)
        done = [event.seconds for event in self.history.events if isinstance(event, StepCompleted)]
        return plan_of(self.inputs, memory, seconds=sum(done) / len(done) if done else None)

    def check(self, *, rows: int | str | None = SAMPLED_ROWS) -> DataCheck:
        """Check the rows for errors and oddities, reported by row number. Loads only the tokenizer.

        All rows are read; `rows` rows of each split (None or `all` = all) are tokenized.
        """
        from mlx_nb.view.reports.check import ShownCheck

        kind = method_named(self.config.method).row_kind
        limits = self.inputs.limits
        return ShownCheck.of(check_data(self.splits, self.tokenizer, self.config, rows=rows, kind=kind, limits=limits))

    @property
    def left_out(self) -> dict[str, list[LeftOut]]:
        """The rows that are not trained, with reasons, by split. Filled when training is prepared."""
        return self.inputs.left_out

    @property
    def step_count(self) -> int:
        """Optimizer updates done."""
        return self._trainer.state.step if self._trainer else 0

    @property
    def state(self) -> RunState:
        """The state: built, running (in the background), paused, stopped, finished or failed."""
        if self.background.trains:
            return RunState.RUNNING
        if self._loop.failed:
            return RunState.FAILED
        if self._trainer is None or not self.history.events:
            return RunState.PAUSED if self._loop.paused_early else RunState.BUILT
        if self._trainer.finished is None:
            return RunState.PAUSED
        return RunState.STOPPED if self._trainer.finished.reason == STOPPED else RunState.FINISHED

    @contextmanager
    def _turn(self, what: str) -> Iterator[None]:
        """A context in which no other thread computes with the model. Raises CommandError inside user code."""
        self._calls.refuse_inside(what)
        with self.turns.turn():
            yield

    @property
    def failure(self) -> str:
        """Why the run failed and what to do about it; empty if it has not failed."""
        if self.state != RunState.FAILED:
            return ""
        if self._loop.error is not None:
            return str(self._loop.error) if isinstance(self._loop.error, MlxNbError) else repr(self._loop.error)
        failed = (event for event in reversed(self.history.events) if isinstance(event, RunFailed))
        return next((event.error for event in failed), "")

    def _refuse_running(self, what: str) -> None:
        if self.background.trains:
            raise CommandError(f"{self.name} is running, so it cannot {what} now. `%finetune pause`, then try again.")
        if self.background.active:
            raise CommandError(
                f"{self.name} is busy with a request, so it cannot {what} now. Try again when it is done."
            )

    @property
    def keeps_a_cell(self) -> bool:
        """Whether a waiting cell drives the run, so that the kernel receives no clicks."""
        return self.background.in_cell

    @property
    def active(self) -> bool:
        """Whether it is active in the background: training, or handling a request such as a question."""
        return self.background.active

    @property
    def cancellable(self) -> bool:
        """Whether sample answers or a requested validation are due now, which `Cancel` would drop."""
        return self.active and self._trainer is not None and self._trainer.cancellable

    @property
    def trains(self) -> bool:
        """Whether it does updates in the background. False while it only handles requests."""
        return self.background.trains and not self.over

    @property
    def prepared(self) -> bool:
        """Whether model and rows are loaded and the adapter is attached."""
        return self._trainer is not None

    @property
    def finished(self) -> bool:
        """Whether the run has ended: all updates are done, or it was stopped, or stopped early."""
        return self._trainer is not None and self._trainer.finished is not None

    @property
    def over(self) -> bool:
        """Whether the run has ended and no update is left. A run that was stopped, or stopped early, can continue."""
        return self._trainer is not None and self._trainer.is_complete

    def plot(self) -> ShownFigure:
        """The curves as a matplotlib Figure that displays itself; `run.plot().savefig("curves.png")` saves it."""
        from mlx_nb.run import displays

        return displays.plot(self)

    def report(self, path: str | Path | None = None) -> Path:
        """Write an HTML page about the run (default: report.html in its folder). Returns its path.

        Raises CommandError if it cannot be written, or if the file exists and is not an earlier report of this run.
        """
        from mlx_nb.run import displays

        return displays.report(self, path)

    def completions(self, step: int | None = None, *, ratios: bool = False) -> CompletionsDisplay:
        """The completions of the last rollout up to update `step` (None = now) as a table that displays itself.

        With `ratios` the tokens are colored by log(current policy / sampling policy), which only the latest rollout
        has. Raises CommandError if there are none.
        """
        from mlx_nb.run import displays

        return displays.completions(self, step, ratios)

    def browse(self, split: str = "train") -> Any:
        """A RowBrowser: widgets to page through the rows, with jump, filters and colors.

        It does not keep the run alive; once the run is gone it still shows the rows, without losses.
        """
        from mlx_nb.run import displays

        browser = displays.browser(self, split)
        self._browsers.append(browser)
        return browser

    @one_at_a_time
    def log_ratios(self) -> list[tuple[int, Any, Any]]:
        """(row, tokens, log(current policy / sampling policy)) of each completion of the last rollout.

        Raises CommandError if none are in memory: before the first rollout, and after a resume or rewind.
        """
        rollouts = self.trainer.rollouts
        if rollouts is None or not (ratios := rollouts.log_ratios()):
            raise CommandError(
                f"{self.name} has no completions in memory to compare the policy on. Do an update first."
            )
        return ratios

    def panel(self) -> Panel:
        """The live panel of this run: controls, curves, rows, samples, settings, checkpoints and log.

        Every call returns the same panel; `run.panel().selection` is what was clicked in it. The panel does not keep
        the run alive: it closes when nothing else refers to the run.
        """
        from mlx_nb.run import displays

        panel = self._panel() if self._panel else None
        if panel is None or panel.closed:
            panel = displays.panel(self)
            self._panel = weakref.ref(panel)
        return panel

    def visits_text(self, split: str, row: int) -> str:
        """When a row was trained on or evaluated, with its loss each time, as text."""
        from mlx_nb.view.event_text import visits_text

        return visits_text(self.history.row_losses(split).get(row, []))

    def status(self) -> str:
        """The run in a few lines of text."""
        from mlx_nb.run import displays

        return displays.status(self, self._loop.error)

    # Training

    def events(self, updates: int | None = None) -> Iterator[Event]:
        """Train for `updates` optimizer updates (None = to the end), yielding every event.

        While it computes, a first SIGINT requests a pause at the next step boundary, and a second one drops the current
        update as if it had never begun. Raises CommandError while the run is active in the background.
        """
        self._calls.refuse_inside("train")
        self._refuse_running("train here")
        yield from self.drive(updates)

    def drive(self, updates: int | None = None) -> Iterator[Event]:
        """Like `events`, without the check that the run is not already active. The background uses it."""
        from mlx_nb.model.memory import device_limits

        events = self._loop.events(updates)
        with exits.driving(self), device_limits():
            while True:
                with self.interrupts(), self.turns.turn(), exits.computing(self), self._calls.calling(USER_FUNCTION):
                    event = next(events, None)
                if event is None:
                    break
                yield event
                self.turns.give_way()

    def interrupts(self, say: Callable[[str], None] | None = None) -> Interrupts:
        """A context in which SIGINT requests a pause of this run. `say` (default: print to stderr) gets a message."""
        return foreground.pausing_on_interrupt(self, say)

    def ask(self, question: Question) -> None:
        """Request an answer to a question at the next step boundary. It is streamed token by token."""
        self.request(question)

    @one_at_a_time
    @interrupts_wait()
    def rewind(self, updates: int | None = None, *, to: int | None = None) -> Rewound:
        """Go back by `updates` updates, or to update `to`. Training then continues as it would have from there.

        Recent steps are in memory; older ones can be reached if a checkpoint was saved. Current settings are kept, and
        the history keeps the abandoned branch. Raises CommandError if there is no such step.
        """
        self._calls.refuse_inside("rewind")
        self._refuse_running("rewind")
        if to is None:
            to = self._rewinding.target(1 if updates is None else updates)
        return self._rewinding.rewind_to(to)

    def place_of(self, target: int) -> Checkpoint:
        """The saved state of update `target`, to rewind to. Raises CommandError if there is none."""
        return self._rewinding.saved_state(target)

    @one_at_a_time
    def fork(self, /, *, name: str | None = None, **changes: Any) -> Run:
        """A second run that continues from here with other settings: `run.fork(learning_rate=1e-5)`.

        It shares the base model's memory and the rows; otherwise the runs are independent. Settings of model, rows and
        adapter cannot change. Raises ConfigError for those, CommandError for the name of this run.
        """
        from mlx_nb.run.fork import forked

        return forked(self, name, changes, lambda config, name: Run(config, name=name, _from_checkpoint=True))

    @one_at_a_time
    def next_stage(self, name: str, /, **settings: Any) -> Run:
        """A new run that starts from this one's adapter: `run.next_stage("dpo", method="dpo", data=pairs)`.

        Model and rendering are those of this run, and the base model is not loaded again. The adapter as it is now is
        copied to a folder beside this run's; it is also the reference, unless `reference_adapter` says otherwise.
        Raises CommandError for the name of this run, or if this run has no update yet.
        """
        from mlx_nb.run.stages import settings_from

        self._calls.refuse_inside("start a stage")
        config = RunConfig.from_dict({**settings_from(self, name, settings), **settings})
        return Run(config, name=name, namespace=self.inputs.namespace)

    @property
    def adapters(self) -> Adapters[SavedModel]:
        """This run's adapter and others on the same base, by name: load, compare and merge them.

        `run.adapters.load("adapters/bees")` loads one without loading the base again, then
        `run.adapters["bees"].generate("Hello")` asks it. The adapter of the run is there once training is prepared.
        """
        from mlx_nb.run.saved_model import adapters_on

        return adapters_on(self.name, self, self.inputs, self._adapters, ready=self.prepared)

    @property
    def stuck(self) -> bool:
        """Whether a user function is still running although it was interrupted: it catches every interrupt."""
        codes = self._trainer.user_code if self._trainer is not None else []
        return any(code.stuck for code in (self.inputs.reading, *codes))

    @one_at_a_time
    def save_unsaved(self) -> bool:
        """Write a checkpoint if there are unsaved updates. Returns whether it did. Raises CheckpointError."""
        if self.let_go or self.unsaved_updates <= 0:
            return False
        self.checkpoint("exit")
        return True

    def save_last_boundary(self) -> bool:
        """Save the last boundary from memory. Another thread may call it while an update is being computed.

        Returns whether something was written. Raises CheckpointError.
        """
        if self.let_go or self.unsaved_updates <= 0:
            return False
        return self._checkpoints.save_last_boundary("exit") is not None

    @one_at_a_time
    @interrupts_wait()
    def release(self, reason: str = "") -> None:
        """Save the run at its current boundary, then give up its folder, so that another run can use it.

        `reason` begins the message of the error that later attempts to write raise. Raises CheckpointError if the run
        cannot be saved; then it keeps the folder.
        """
        if self.let_go:
            return
        self.background.stop()
        try:
            self.save_unsaved()
        except FolderError as error:  # the folder belongs to another run now
            print(f"{self.name}: {error}", file=sys.stderr)
        except CheckpointError as error:
            raise CheckpointError(f"{self.name} is not released, because {error}") from None
        self.home.give_up(f"{reason or f'{self.name} released {self.folder}'} after update {self.step_count}")
        self._checkpoints.snapshots.forget()
        exits.restore_signals()

    @property
    def let_go(self) -> str:
        """Why the run can no longer train and save, and how to get it back; empty while it can."""
        return self._home.lost if self._home is not None else ""

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # During interpreter shutdown no file can be opened; everything was saved by `atexit` before.
        if is_finalizing() or getattr(self, "_trainer", None) is None:
            return
        try:
            self.save_unsaved()
        except Exception as error:
            print(f"{self.name}: {error}", file=sys.stderr)

    @one_at_a_time
    def checkpoint(self, kind: str = "step") -> Path:
        """Write an exact checkpoint. Returns its folder. Raises CheckpointError."""
        folder = self._checkpoints.save(kind)
        self._calls.notify(CheckpointSaved(self.step_count, str(folder), kind))
        return folder

    def checkpoints(self) -> list[CheckpointInfo]:
        """The exact checkpoints in the run's folder, oldest save first."""
        return self._checkpoints.store.list()

    @one_at_a_time
    def delete_checkpoint(self, info: CheckpointInfo) -> None:
        """Remove a checkpoint. Raises CheckpointError, also if another live run holds the folder."""
        self._checkpoints.delete(info)

    @one_at_a_time
    def compare_checkpoint(self, info: CheckpointInfo) -> list[tuple[str, str]]:
        """(label, value) lines that compare a checkpoint with the current state. Raises CheckpointError."""
        return self._checkpoints.compare(info)

    @property
    def has_checkpoint(self) -> bool:
        """Whether the run's folder has a checkpoint for `Run.resume`."""
        return bool(self.checkpoints())

    @property
    def needs_saving(self) -> bool:
        """Whether something would be lost if the process ended now or one update later.

        Reads no file, because it is also used during garbage collection, where an interrupt would be lost.
        """
        given_up = self._home is not None and self._home.given_up
        return not given_up and (self.unsaved_updates > 0 or not self.over)

    @property
    def unsaved_updates(self) -> int:
        """Updates done since the last checkpoint."""
        return self.step_count - self._checkpoints.saved_step

    @classmethod
    def resume(
        cls,
        path: str | Path,
        *,
        step: int | None = None,
        config: RunConfig | None = None,
        data: Any = None,
        namespace: Mapping[str, Any] | None = None,
        allow_changed: Collection[str] = (),
    ) -> Run:
        """Resume the run in the adapter folder `path` from its newest good checkpoint, or from that of `step`.

        Training continues exactly as it would have without the interruption. Pass `data` again if it was an object in
        memory. `config` has the expected settings; None takes those of the checkpoint. Raises CheckpointError if there
        is no good checkpoint, or if settings, rows, template, tokenizer, model or a version have changed since and are
        not named in `allow_changed`.
        """
        from mlx_nb.train.checkpoint_store import CheckpointStore

        if not isinstance(path, str | Path) or not str(path).strip():
            raise CheckpointError(f"a run is resumed from its folder, such as 'adapters/run', not {shown(path)}.")
        allow_changed = allowed_changes(allow_changed)
        folder = folder_of(str(path), working_folder())
        home = folder_to_resume(folder)
        store, unfit = CheckpointStore(folder / CHECKPOINTS), Unfit()
        try:
            while True:
                checkpoint, messages = store.load(step, unfit.refuse)
                settings = settings_to_resume(checkpoint, folder, config, data)
                refuse_missing_variables(settings, checkpoint.state["name"], namespace)
                run = cls(settings, name=checkpoint.state["name"], namespace=namespace, _from_checkpoint=True)
                home.name, home.at_rest, home.let_go = run.name, run._at_rest, run.release
                run._resumed, run._home = True, home
                changed = changes_since(checkpoint, config, run.inputs.fingerprints, allow_changed)
                with unfit.restoring(checkpoint):
                    run.trainer.restore(checkpoint)
                    run.history, damage = read_history_of(checkpoint)
                    break
                run._trainer = None  # discarded, because it may be half restored
            run.history.folder = str(folder)
            run._checkpoints.continue_from(checkpoint, whole=not damage)
            if length := length_given(checkpoint, config):
                run.set(**length)
        except BaseException:
            home.release()
            raise
        run.trainer.notes += (
            *messages,
            *damage,
            *defaults_taken(checkpoint),
            *(f"changed since the checkpoint: {what}" for what in changed),
        )
        run._rewinding.find_best()
        run.trainer.notes += tuple(restore_requests(run, requests_of(checkpoint)))
        return run

    def step(self, n: int = 1) -> StepCompleted:
        """Exactly `n` optimizer updates (fewer at the end of the run). Returns the event of the last one.

        An interrupt pauses the run; outside a notebook it is raised as KeyboardInterrupt once the pause is saved.
        Raises TrainingError if an update was not applied, CommandError if the run is already over.
        """
        self._calls.refuse_inside("do a step")
        self._refuse_running("step")
        return foreground.step(self, n)

    def run(self, until: int | None = None) -> RunFinished | RunPaused:
        """Train to the end, or to update `until`. Returns how it ended. Raises TrainingError as `step` does.

        A run that was stopped, or stopped early, continues; a run whose updates are all done returns how it ended. If
        `until` is beyond the last update the run becomes longer, as with `set(iters=until)`.

        An interrupt pauses the run; outside a notebook it is raised as KeyboardInterrupt once the pause is saved, so
        that a loop over runs ends there too.
        """
        self._calls.refuse_inside("run")
        self._refuse_running("run")
        return foreground.train_until(self, until)

    def more(self, updates: int) -> int:
        """Make sure that `updates` updates are left, lengthening the run if necessary. Returns `updates`.

        Raises CommandError for a number below 1.
        """
        if isinstance(updates, bool) or not isinstance(updates, int) or updates < 1:
            raise CommandError(f"cannot do {updates!r} updates. Give a whole number of 1 or more.")
        self._refuse_running("do more updates")
        foreground.lengthen(self, self.step_count + updates)
        return updates

    def start(self, updates: int | None = None) -> None:
        """Train in the background of the kernel for `updates` updates (None = to the end). Returns immediately.

        `await run` waits for it; `request(Pause())`, the panel or an interrupt pauses it. An error is sent to the
        listeners as RunFailed. Raises CommandError if no event loop is running.
        """
        self._calls.refuse_inside("start")
        self.background.start(updates, ended=self._background_ended)
        self._calls.notify(StateChanged(self.step_count, self.state))

    def _background_ended(self, error: BaseException | None) -> None:
        if error is not None:
            self._loop.fail(error)
        else:
            self._loop.error = None
        self._calls.notify(StateChanged(self.step_count, self.state))

    def __await__(self) -> Generator[Any, None, Run]:
        """Wait until the run is no longer active, without cancelling it. Raises TrainingError if it failed."""
        yield from self.background.wait().__await__()
        if self._loop.error is not None:
            raise self._loop.error
        if self.state == RunState.FAILED:
            foreground.raise_failure(
                next(event for event in reversed(self.history.events) if isinstance(event, RunFailed))
            )
        return self

    def request(self, request: Request) -> None:
        """Queue a request for the next step boundary. Safe to call from a signal handler or widget callback.

        While the run is loading, the boundary is between two pieces of work. A `Pause(at_once=True)` stops the reading
        of rows with KeyboardInterrupt, because user code or a network may never return. Raises CommandError for an
        object that is not a request to a run.
        """
        if not isinstance(request, TrainerRequest | RunRequest):
            raise CommandError(f"{shown(request)} is not a request to a run. {_REQUESTS}")
        if isinstance(request, Question):
            self._refuse_base(request.base)
        if isinstance(request, Pause) and request.at_once and self.inputs.reading.inside:
            self._inbox.drop(Request)
            self.inputs.reading.strike(KeyboardInterrupt())
        if self._trainer is not None:
            self._trainer.request(request)
        else:
            self._inbox.put(request)

    def skip(self) -> None:
        """Skip the next batch, for example after a tripwire stopped the run at bad rows."""
        self.request(Skip())

    @one_at_a_time
    @interrupts_wait()
    def set(self, /, **changes: Any) -> None:
        """Change live settings, such as learning_rate, from the next update on. Raises ConfigError for others."""
        problems = [str(error) for error in unknown_settings(changes)]
        for name in changes:
            if name in SETTINGS and name not in LIVE_SETTINGS and self._trainer is not None:
                problems.append(
                    f"`{name}` cannot change during a run. These can: {', '.join(LIVE_SETTINGS)}. "
                    "Or start a new run with %%finetune."
                )
        if problems:
            raise ConfigError("\n".join(problems))
        checked = self.config.with_live(**changes)
        if self._trainer is not None:
            refuse_ineffective(checked, self.splits)
            if not changes.keys().isdisjoint(LENGTHS):
                self._trainer.refuse_shorter_than_done(checked)
        started = self._trainer is not None or self._from_checkpoint
        self.config = checked if started else with_start_adapter(checked)
        if self._trainer is None:
            self.inputs = self.inputs.for_settings(self.config)
            return
        for name in changes:
            if self.background.active:
                self._trainer.request(ChangeSetting(name, getattr(checked, name)))
            else:  # the run is at a boundary
                self._record(self._trainer.change(name, getattr(checked, name)))

    @one_at_a_time
    def evaluate(
        self,
        split: str = "valid",
        *,
        all_rows: bool = False,
        metrics: Any = None,
        max_tokens: int | None = None,
    ) -> EvaluationCompleted:
        """Measure loss and metrics on a fixed set of rows of `split`, or on all of them, with 95% intervals.

        `metrics` judge the model's greedy answers, of at most `max_tokens` tokens, to the same rows (None = as in the
        settings): a list of built-in ones by name, such as `"exact_match"` or `{"regex": "^Yes"}`, and of functions
        that take by name what they need of `completion`, `reference`, `prompt`, `row` and the row's columns, and return
        a number or a bool. The answers are kept by a fingerprint of the model, so an evaluation that was interrupted
        continues where it was, and one with other metrics generates nothing again. An interrupt is raised as
        KeyboardInterrupt. Neither the run nor a random stream is changed. Raises ConfigError for a metric that cannot
        be called, DataError for rows without a question.
        """
        self._calls.refuse_inside("evaluate")
        trainer = self.trainer
        if split == "test" and not self.config.test and not trainer.examples.test:
            trainer.examples = dataclasses.replace(trainer.examples, test=self.inputs.tokenize("test"))
        with self._calls.calling(USER_FUNCTION):
            result = evaluated(
                trainer,
                self.inputs,
                self.adapter_bytes,
                self._calls.notify,
                split=split,
                all_rows=all_rows,
                metrics=metrics,
                max_tokens=max_tokens,
            )
        self._record(result)
        return result

    @one_at_a_time
    def lr_find(self, *, lowest: float = 1e-6, highest: float = 1.0, updates: int = 60) -> RateRange:
        """Find a learning rate: `updates` updates from here with rates rising from `lowest` to `highest`, then undone.

        The result displays itself as a plot of how the loss of the same rows changed; its `suggestion` is a rate for
        `set(learning_rate=...)` or the next run. It ends early where the loss diverges. Afterwards the model, the
        optimizer and the run are as before, bit for bit, also after an interrupt (KeyboardInterrupt) or an error. It
        takes the time of `updates` updates and as many evaluations of their rows. Raises CommandError for rates that do
        not rise, for a running run, and for a method that samples completions.
        """
        from mlx_nb.run.rate_search import check_rates, find_rate

        check_rates(lowest, highest, updates)
        self._calls.refuse_inside("find a learning rate")
        self._refuse_running("find a learning rate")
        notify = self._calls.notify
        return find_rate(self.trainer, notify, lowest=lowest, highest=highest, updates=updates)

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        base: bool = False,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        tools: Sequence[Any] | None = None,
        on_text: Callable[[Any], None] | None = None,
    ) -> Any:
        """The model's answer. `prompt` is a text or a list of messages; a list of prompts gives a list of answers.

        A text is rendered like the training rows: as a user message, or as raw text to be continued (see
        `prompt_format`). Messages and `tools` are read and rendered like those of rows. If the last message is the
        assistant's, it is continued, and the answer is only the continuation; raises DataError if the chat template
        does not allow an exact continuation.
        `base` answers without the adapter. Temperature 0 is greedy. `on_text` is called after each token with the text
        so far, or with the list of texts for a list of prompts. Neither the run nor the user's random stream is
        changed. Other threads may call it too; while the run trains they wait for the end of an update.
        """
        self._refuse_base(base)
        check_generation(prompt, max_tokens, temperature)
        with self._turn("answer"):
            return generate_answers(
                self.inputs,
                self.inputs.base_model if base else self.model,
                prompt,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
                tools=tools,
                on_text=on_text,
            )

    @one_at_a_time
    @interrupts_wait()
    def save(self, path: str | Path | None = None, *, format: str = MLX_LM) -> Path:
        """Write the adapter to `path` (default: the run's folder). Returns the folder.

        `format` is `mlx-lm`, `peft`, or `peft-rslora`, which differs in how PEFT's lora_alpha is written. An adapter
        in PEFT's format needs a folder of its own.

        If the run's own folder cannot be written or was taken over by another run, this run moves to `path`: later
        saves and checkpoints go there. An adapter of an earlier run at `path` is moved to `path.previous-1`. Raises
        FolderError if the folder belongs to another run or has files that mlx_nb did not write, CheckpointError if it
        cannot be written.
        """
        check_format(format)
        folder = self.folder if path is None else folder_of(str(path), working_folder())
        if not same_folder(folder, self.folder):
            refuse_among_files(folder, self.folder)
        elif format != MLX_LM:
            raise CommandError(f"{folder} has the adapter in mlx-lm's format. Give another folder for `{format}`.")
        trainer = self.trainer
        if format != MLX_LM:
            export_adapter(self, folder, EXPORT, self._at_rest, format).release()
            return folder
        if same_folder(folder, self.folder):
            with self.home.writing():
                write_adapter(self, self.home)
        elif self._loop.blocked or self.home.refused or not can_write(self.home):
            self.home.release()
            self._home = export_adapter(self, folder, RUN, self._at_rest)
            self.config = self.config.replace(adapter_path=str(folder))
            trainer.change_folder(folder, self._home.write)
            self.history.folder = str(folder)
            self.checkpoint("pause")
        else:
            export_adapter(self, folder, EXPORT, self._at_rest).release()
        self._loop.blocked = False
        return folder

    @one_at_a_time
    def fuse(self, path: str | Path | None = None, *, precision: str | None = None) -> FuseReport:
        """Write the model with its adapter merged to the folder `path`, for `mlx_lm.load`. Returns a report.

        The report has, for each precision, the share of the fine-tune that would be lost by layer, the predicted
        validation loss, and a recommendation; then the measured loss of what was written. `precision` is `base` (that
        of the base model), `mixed` (8 bits where `base` would lose more than half of the fine-tune), `16-bit`, or None
        (the recommended one). Without `path` nothing is written. An earlier export at `path` is replaced. Raises
        CommandError for an unknown precision, FolderError if the folder has other files or cannot be written.
        """
        from mlx_nb.run.model_exports import fuse, inputs_of_run

        self._calls.refuse_inside("fuse")
        return fuse(inputs_of_run(self), self.folder, path, precision)

    @one_at_a_time
    def gguf(
        self,
        path: str | Path | None = None,
        *,
        type: str = "f16",
        adapter: bool = False,
        base: str | Path | None = None,
        lm_studio_name: str | None = None,
    ) -> GgufExport:
        """Write the model with its adapter merged as a GGUF file to the folder `path`, with a Modelfile for Ollama.

        `type` is `f16`, `bf16`, `f32`, `q8_0`, or one of those that llama.cpp makes, such as `q4_k_m`. `adapter` writes
        the LoRA adapter alone, for the base model as a GGUF file (`base`, to check it on that one). `lm_studio_name`
        writes to LM Studio's own folder instead. Every tensor is read back, and if llama.cpp is installed it must give
        the same tokens and logits. Raises ModelError if it does not, or if llama.cpp does not have the model;
        CommandError, FolderError. An earlier export at `path` is replaced.
        """
        from mlx_nb.run.model_exports import gguf, inputs_of_run

        self._calls.refuse_inside("write a GGUF file")
        options: dict[str, Any] = {"type": type, "adapter": adapter, "base": base, "lm_studio_name": lm_studio_name}
        return gguf(inputs_of_run(self), self.folder, path, **options)

    @one_at_a_time
    def adapter_bytes(self) -> dict[str, bytes]:
        """The trainable parameters as they would be saved: name -> raw little-endian bytes."""
        import numpy as np

        from mlx_nb.model.adapters import adapter_weights

        return {name: np.array(array).tobytes() for name, array in adapter_weights(self.trainer.model).items()}

    def listen(self, listener: Callable[[Event], None] | TrainingCallback) -> None:
        """Call `listener` with every event. Its first error is printed to stderr and does not affect training.

        An object with the methods of mlx-lm's TrainingCallback, `on_train_loss_report` and `on_val_loss_report`, is
        called with the numbers of each update and validation under mlx-lm's names.

        A listener may read (history, status, plot, rows), `set` live settings, `save`, and `request` an action for the
        next boundary. Calls that train or run the model immediately raise CommandError, because an update may be in
        progress.
        """
        self._calls.listen(self._as_listener(listener))

    def unlisten(self, listener: Callable[[Event], None] | TrainingCallback) -> None:
        """Remove a listener."""
        self._calls.unlisten(self._as_listener(listener))

    def _as_listener(self, listener: Callable[[Event], None] | TrainingCallback) -> Callable[[Event], None]:
        if callable(listener):
            return listener
        from mlx_nb.export.trackers import Callback

        return Callback(listener, lambda: self.history)

    def _record(self, event: Event) -> None:
        """Append an event to the history and send it to the listeners."""
        self.history.append(event)
        self._calls.notify(event)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """A card with the state of the run."""
        from mlx_nb.run import displays

        return displays.card(self)

    def __repr__(self) -> str:
        if self.let_go:
            return f"Run({self.name!r}, released at update {self.step_count}: {self.let_go})"
        done = f"{self.step_count} of {self._trainer.iters} updates" if self._trainer else "not started"
        return f"Run({self.name!r}, model={self.config.model!r}, {self.config.fine_tune_type}, {done})"
