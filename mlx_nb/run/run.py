"""Run: one fine-tune under a person's hands. Nothing heavy happens until it is needed."""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never, get_args

from mlx_nb.config.methods import method_named
from mlx_nb.config.run_config import LENGTHS, LIVE_SETTINGS, SETTINGS, RunConfig, unknown_settings
from mlx_nb.data.check.check import SAMPLED_ROWS, DataCheck, check_data
from mlx_nb.data.examples.effects import refuse_ineffective
from mlx_nb.data.examples.imitation import LeftOut
from mlx_nb.data.examples.split import RowView
from mlx_nb.data.sources.splits import Splits
from mlx_nb.errors import (
    TRAINING_ERRORS,
    CheckpointError,
    CommandError,
    ConfigError,
    DataError,
    FolderError,
    FolderTaken,
    MlxNbError,
    ModelChanged,
    TrainingError,
    shown,
)
from mlx_nb.events import (
    STOPPED,
    AdapterSaved,
    BatchSkipped,
    ChangeSetting,
    CheckpointSaved,
    DataChanged,
    EvaluationCompleted,
    Event,
    Pause,
    Progress,
    Question,
    Request,
    RequestRefused,
    Rewind,
    Rewound,
    RolloutCompleted,
    RunFailed,
    RunFinished,
    RunPaused,
    RunRequest,
    RunState,
    SampleGenerated,
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
from mlx_nb.process.ipython import in_ipython
from mlx_nb.process.turns import Turns, one_at_a_time
from mlx_nb.run.background import Background
from mlx_nb.run.checkpoints import Checkpoints
from mlx_nb.run.generation import check_generation, generate_answers
from mlx_nb.run.inputs import RunInputs
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
from mlx_nb.run.rows import Rows
from mlx_nb.run.user_calls import USER_FUNCTION, UserCalls
from mlx_nb.train.inbox import Inbox
from mlx_nb.train.interrupts import interrupts_wait

if TYPE_CHECKING:
    from mlx_nb.model.loading import LoadedModel
    from mlx_nb.rollouts.generation import Prompt
    from mlx_nb.train.checkpoint import Checkpoint, CheckpointInfo
    from mlx_nb.train.interrupts import Interrupts
    from mlx_nb.train.trainer import Trainer
    from mlx_nb.view.curves.shown_figure import ShownFigure
    from mlx_nb.view.panel.panel import Panel
    from mlx_nb.view.reports.completions import CompletionsDisplay
    from mlx_nb.view.rows.browser import RowBrowser


WAY_ON = "`%finetune run 20` or `run.set(iters=...)` goes on."
_REQUESTS = "These can: " + ", ".join(kind.__name__ for kind in get_args(TrainerRequest) + get_args(RunRequest)) + "."


class Run:
    """A fine-tuning run: configured, then moved one step at a time.

    `name` decides the default adapter folder. `namespace` is where `data: name` looks for a variable. Relative paths
    begin in the folder that is the working folder when the run is made.
    `allow_changed=["model"]` starts from an adapter that was made on another base.
    Raises ConfigError, DataError, FolderError or ModelError, each in one line, at the first use of what is wrong.
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
            way = " `RunConfig.from_dict` makes one of a dict." if isinstance(config, Mapping) else ""
            raise ConfigError(f"config is a RunConfig, such as RunConfig(iters=100), not {shown(config)}.{way}")
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
        self.history = History()
        self.inputs = RunInputs(self.config, namespace)
        self._resumed = False
        self._home: RunFolder | None = None
        self.forks = 0  # how many were named after it
        self._blocked = False
        self._failed = False
        self._paused_early = False  # while it loaded
        self._error: BaseException | None = None
        self.background = Background(self)
        self._inbox = Inbox()
        self._checkpoints = Checkpoints(self, self._inbox)
        self.turns = Turns()
        self._trainer: Trainer | None = None
        self._panel: weakref.ref[Panel] | None = None
        self._browsers: list[RowBrowser] = []  # which live as long as the run, shown or not
        self._calls = UserCalls(name)
        exits.register(self)

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
        """From YAML text or a YAML file; `overrides` are settings that win over it."""
        config = RunConfig.from_yaml(source, **overrides)
        run = cls(config, name=name, namespace=namespace, allow_changed=allow_changed)
        run.inputs.check_reward_names()
        return run

    # What the run stands on

    @property
    def loaded(self) -> LoadedModel:
        """The model, tokenizer and where they came from; loaded at first use."""
        return self.inputs.loaded

    @property
    def model(self) -> Any:
        """The live mlx model, adapter included once training was prepared."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, with its chat template. Loaded alone when the model is not needed yet."""
        return self.inputs.tokenizer

    @property
    def splits(self) -> Splits:
        """The rows; opened at first use."""
        return self.inputs.splits

    @property
    def folder(self) -> Path:
        """Where adapters are saved, as an absolute path."""
        return folder_of(self.config.adapter_path or f"adapters/{self.name}", self.config.working_folder)

    @property
    def home(self) -> RunFolder:
        """The same folder in the hands of this run: who may write there, and what was written."""
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
        """The trainer: rows tokenized, adapter attached. Made at first use."""
        if self._trainer is None:
            with self.turns.turn():
                if self._trainer is None:  # no other thread has made it meanwhile
                    self._trainer = self._prepare()
        return self._trainer

    def load(self) -> Iterator[Progress]:
        """Load model and rows and attach the adapter, saying on the way how far it is.

        It ends before all is loaded when a pause is asked for; another one then goes on where it was.
        """
        if self._trainer is not None:
            return
        with self._folder_taken():
            for progress in loading(self.inputs):
                self._calls.notify(progress)
                yield progress
                if Pause in self._inbox:
                    self.home.release()
                    return
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

    # Looking

    def rows(self, split: str = "train") -> Rows:
        """The rows of a split; `run.rows("train")[12]` is row 12 as the model will see it."""
        return Rows(self.inputs.split(split), split)

    def row_losses(self, split: str = "train") -> dict[int, float]:
        """The loss of each row of `split` when it was last trained on or evaluated, the highest first."""
        latest = {row: visits[-1][1] for row, visits in self.history.row_losses(split).items()}
        return dict(sorted(latest.items(), key=lambda item: -item[1]))

    def token_losses(self, row: RowView, *, base: bool = False, rejected: bool = False) -> Any:
        """(T,) loss in nats of each token of a row, now; NaN for the first. `base` with the adapter switched off.

        Of a pair, those of the chosen answer with its prompt, or of the `rejected` one.
        """
        self._refuse_base(base)
        with self._turn("measure losses"):
            return self.inputs.token_losses(row, base=base, rejected=rejected)

    def _refuse_base(self, base: bool) -> None:
        if base and self.config.fine_tune_type == "full" and self.step_count:
            raise CommandError("full fine-tuning changes the base itself, so there is no base left to ask.")

    def check(self, *, rows: int | str | None = SAMPLED_ROWS) -> DataCheck:
        """What is wrong or odd with the rows, by number, before anything is trained. Loads the tokenizer alone.

        All rows are read; `rows` of each split (None or `all` = all) are tokenized.
        """
        from mlx_nb.view.reports.check import ShownCheck

        kind = method_named(self.config.method).rows
        limits = self.inputs.limits
        return ShownCheck.of(check_data(self.splits, self.tokenizer, self.config, rows=rows, kind=kind, limits=limits))

    @property
    def left_out(self) -> dict[str, list[LeftOut]]:
        """The rows that are not trained, by split, each with the reason. Filled when training is prepared."""
        return self.inputs.left_out

    @property
    def step_count(self) -> int:
        """Optimizer updates done."""
        return self._trainer.state.step if self._trainer else 0

    @property
    def state(self) -> RunState:
        """built, running (it trains in the background), paused, stopped, finished or failed."""
        if self.background.trains:
            return RunState.RUNNING
        if self._failed:
            return RunState.FAILED
        if self._trainer is None or not self.history.events:
            return RunState.PAUSED if self._paused_early else RunState.BUILT
        if self._trainer.finished is None:
            return RunState.PAUSED
        return RunState.STOPPED if self._trainer.finished.reason == STOPPED else RunState.FINISHED

    @contextmanager
    def _turn(self, what: str) -> Iterator[None]:
        """No other thread computes with the model while inside. Raises CommandError from inside of the run itself."""
        self._calls.refuse_inside(what)
        with self.turns.turn():
            yield

    @property
    def failure(self) -> str:
        """Why it failed and what can be done; empty while it has not."""
        if self.state != RunState.FAILED:
            return ""
        if self._error is not None:
            return str(self._error) if isinstance(self._error, MlxNbError) else repr(self._error)
        failed = (event for event in reversed(self.history.events) if isinstance(event, RunFailed))
        return next((event.error for event in failed), "")

    def _refuse_running(self, what: str) -> None:
        if self.background.trains:
            raise CommandError(f"{self.name} is running, so it cannot {what} now. `%finetune pause`, then try again.")
        if self.background.active:
            raise CommandError(
                f"{self.name} is doing what was asked of it, so it cannot {what} now. Try again after that."
            )

    @property
    def keeps_a_cell(self) -> bool:
        """Whether a cell waits for it and moves it meanwhile, so that no click arrives."""
        return self.background.in_cell

    @property
    def active(self) -> bool:
        """Whether it moves in the background: it trains, or does what was asked of it, such as an answer."""
        return self.background.active

    @property
    def cancellable(self) -> bool:
        """Whether answers to kept prompts, or a validation that was asked for, are due now."""
        return self.active and self._trainer is not None and self._trainer.cancellable

    @property
    def trains(self) -> bool:
        """Whether it moves in the background and does updates: one that only answers what was asked does none."""
        return self.background.trains and not self.over

    @property
    def prepared(self) -> bool:
        """Whether model and rows are loaded and the adapter is attached."""
        return self._trainer is not None

    @property
    def finished(self) -> bool:
        """Whether it has ended: all updates are done, or it was stopped, or stopped early."""
        return self._trainer is not None and self._trainer.finished is not None

    @property
    def over(self) -> bool:
        """Whether it has ended and no update is left: one that was stopped, or stopped early, can go on."""
        return self._trainer is not None and self._trainer.over

    def plot(self) -> ShownFigure:
        """The run so far as a matplotlib Figure that displays itself; `run.plot().savefig("curves.png")` keeps it."""
        from mlx_nb.view.curves.figure import plot_history

        metrics = method_named(self.config.method).metrics
        return plot_history(self.history, f"{self.name}: {self.config.model}", metrics)

    def report(self, path: str | Path | None = None) -> Path:
        """Write one HTML page with everything about the run (default: report.html in its folder). Returns its path.

        Raises CommandError, also for a file that is no earlier report of this run: it is not written over.
        """
        from mlx_nb.run import displays

        return displays.report(self, path)

    def completions(self, step: int | None = None, *, ratios: bool = False) -> CompletionsDisplay:
        """The completions of the last rollout, or of the last until update `step`, as a table that displays itself.

        With `ratios` their tokens are colored by log(policy now / policy that sampled), which only those of the last
        rollout have. Raises CommandError when there are none.
        """
        from mlx_nb.run import displays

        return displays.completions(self, step, ratios)

    def browse(self, split: str = "train") -> Any:
        """Leaf through the rows with widgets: previous, next, jump, filters, colors. Returns a RowBrowser.

        That does not keep the run; once the run is gone the rows are still there, without losses.
        """
        from mlx_nb.run import displays

        browser = displays.browser(self, split)
        self._browsers.append(browser)
        return browser

    @one_at_a_time
    def log_ratios(self) -> list[tuple[int, Any, Any]]:
        """(row, tokens, log(policy now / policy that sampled)) of each completion of the last rollout, now.

        Raises CommandError when there are none at hand: before the first rollout, after a resume or a rewind.
        """
        rollouts = self.trainer.rollouts
        if rollouts is None or not (ratios := rollouts.log_ratios()):
            raise CommandError(f"{self.name} has no completions at hand to compare the policy on. Do an update first.")
        return ratios

    def panel(self) -> Panel:
        """The controls, curves, rows, samples, settings, checkpoints and log of this run, live, in this cell.

        A run has one panel, however often it is shown: `run.panel().selection` is what was clicked in it. It does not
        keep the run: it closes when nobody else refers to that any more.
        """
        from mlx_nb.model.backend import device_name, prepare_backend
        from mlx_nb.view.panel.panel import Panel

        panel = self._panel() if self._panel else None
        if panel is None or panel.closed:
            panel = Panel(self, device=device_name(), warning=prepare_backend().warning)
            self._panel = weakref.ref(panel)
        return panel

    def visits_text(self, split: str, row: int) -> str:
        """When a row was trained on or measured, and its loss each time, in words."""
        from mlx_nb.view.event_text import visits_text

        return visits_text(self.history.row_losses(split).get(row, []))

    def status(self) -> str:
        """The run in a few lines of text."""
        from mlx_nb.view.event_text import summary_text

        if self._trainer is None and self._error is not None and self.state == RunState.FAILED:
            return f"{self.name}: failed before its first update. {type(self._error).__name__}: {self._error}"
        if self._trainer is None and self.state == RunState.PAUSED:
            return f"{self.name}: paused while it loads, no update done yet. `%finetune run` goes on."
        if self._trainer is None:
            return f"{self.name}: built, no update done yet. `%finetune step` or `%finetune run` starts it."
        return summary_text(self.history, f"{self.name}: {self.state}")

    # Moving

    def events(self, updates: int | None = None) -> Iterator[Event]:
        """Train for `updates` optimizer updates (None = to the end), yielding what happens.

        While it computes, a first SIGINT asks for a pause at the next step boundary, and a second one drops the
        update in hand as if it had never begun. Raises CommandError while the run moves in the background.
        """
        self._calls.refuse_inside("train")
        self._refuse_running("train here")
        yield from self.drive(updates)

    def drive(self, updates: int | None = None) -> Iterator[Event]:
        """The same for whoever moves the run already, as the background does."""
        from mlx_nb.model.memory import device_limits

        events = self._events(updates)
        with exits.driving(self), device_limits():
            while True:
                with self.interrupts(), self.turns.turn(), exits.computing(self), self._calls.calling(USER_FUNCTION):
                    event = next(events, None)
                if event is None:
                    break
                yield event
                self.turns.give_way()

    def interrupts(self, say: Callable[[str], None] | None = None) -> Interrupts:
        """A context in which SIGINT asks this run to pause. `say` (default: stderr) is told in words."""
        from mlx_nb.train.interrupts import Interrupts

        say = say or partial(print, file=sys.stderr)
        return Interrupts(self.request, lambda: say(self._pause_words()))

    def _pause_words(self) -> str:
        if self.prepared:
            return "Pausing after this update. Interrupt again to drop the update in hand."
        return "Pausing while it loads; rows that are tokenized stay so. Interrupt again to break off reading rows."

    def _events(self, updates: int | None) -> Iterator[Event]:
        try:
            yield from self.load()
        except KeyboardInterrupt:
            self._paused_early = True
            raise
        if self._trainer is None:
            self._paused_early = True
            (asked, *_) = self._inbox.drop(Pause)
            paused = RunPaused(0, asked.reason)
            self._calls.notify(paused)
            yield paused
            return
        trainer = self.trainer
        try:
            yield from self._moving(trainer, updates)
        finally:
            trainer.clear_pauses()  # what asked for a pause while this one was made has it

    def _moving(self, trainer: Trainer, updates: int | None) -> Iterator[Event]:
        from mlx_nb.model.memory import clear_cache

        try:
            self.home.check()
        except FolderTaken:
            raise
        except FolderError:
            pass  # a disk that takes nothing pauses the run at its next save
        if not self._checkpoints.snapshots:
            self._checkpoints.remember()
        self._failed, self._error = False, None
        yield from self._answer_requests()
        for event in trainer.events(updates):
            if isinstance(event, Progress | RequestRefused):
                self._calls.notify(event)
                yield event
                continue
            self._failed = isinstance(event, RunFailed)
            self._record(event)
            if isinstance(event, EvaluationCompleted | SampleGenerated | RolloutCompleted | RunFailed):
                clear_cache()
            if isinstance(event, StepCompleted | BatchSkipped):
                self._checkpoints.remember()
            if isinstance(event, AdapterSaved) and event.kind == "step":
                with suppress(OSError, FolderError):  # the next save says so
                    self.home.keep_numbered(self.config.keep)
            yield event
            if self.home.lost:
                yield (paused := RunPaused(self.step_count, self.home.lost))
                self._record(paused)
                return
            went_back = yield from self._answer_requests()
            if went_back and updates is not None:  # those were counted from where it was
                return
            if isinstance(event, RunFinished):
                self._checkpoints.snapshots.release(self.folder)
            if kind := self._checkpoints.kind_due(event):
                try:
                    self.checkpoint(kind)
                except ModelChanged:
                    pass  # which the failure said; what was done until then is saved
                except CheckpointError as error:
                    self._blocked = True
                    paused = RunPaused(self.step_count, str(error))
                    self._record(paused)
                    yield paused
                    return
                self._blocked = False
                for path in self.inputs.changed_files():
                    self._record(changed := DataChanged(self.step_count, path))
                    yield changed
                if isinstance(event, RunFinished):
                    self.home.release()
        yield from self._answer_requests()  # what was asked while the last thing was done

    def _answer_requests(self) -> Generator[Event, None, bool]:
        """Answer questions and go back, at this boundary. What cannot be done is said and changes nothing.

        Returns whether the run went back.
        """
        request: RunRequest
        went_back = False
        for request in self._inbox.take(RunRequest):
            match request:
                case Question():
                    yield from self._answer(request)
                case Rewind(to):
                    try:
                        yield self._rewind(to)
                        went_back = True
                    except MlxNbError as error:
                        self._calls.notify(RequestRefused(self.step_count, str(error)))
                case _:
                    assert_never(request)
        return went_back

    def _answer(self, question: Question) -> Iterator[Event]:
        text = ""
        try:
            for tokens, text in enumerate(self.inputs.stream(question)):
                if self._calls.send_text(question, text, False):
                    break
                yield Progress(self.step_count, "answer", tokens, question.max_tokens)
        except DataError as error:
            text = f"not asked: {error}"
            self._calls.notify(RequestRefused(self.step_count, text))
        self._calls.send_text(question, text, True)

    def ask(self, question: Question) -> None:
        """Have a question answered at the next step boundary, token by token, by the model as it is there."""
        self.request(question)

    @one_at_a_time
    @interrupts_wait()
    def rewind(self, updates: int | None = None, *, to: int | None = None) -> Rewound:
        """Go back by `updates` updates, or to update `to`: what follows is what would have followed then.

        The last steps are in memory, older ones on disk if they were saved. Settings stay as they are now; the
        history keeps the branch that is left. Raises CommandError when there is no such step.
        """
        self._calls.refuse_inside("rewind")
        self._refuse_running("rewind")
        if to is None:
            to = self.step_count - self._updates_back(1 if updates is None else updates)
        return self._rewind(to)

    def _updates_back(self, updates: int) -> int:
        """How many updates to go back by. Raises CommandError for more than were done."""
        done = self.step_count
        if isinstance(updates, bool) or not isinstance(updates, int) or updates < 1:
            raise CommandError(f"cannot go back by {updates!r} updates. Give a whole number of 1 or more.")
        if not done:
            raise CommandError(f"{self.name} is at update 0: there is no update to take back.")
        if updates > done:
            raise CommandError(
                f"{self.name} is at update {done} and cannot go back by {updates}. `%finetune rewind {done}`, or "
                "run.rewind(to=0), goes back to the start."
            )
        return updates

    def place_of(self, target: int) -> Checkpoint:
        """The state to go back to. Raises CommandError where there is none."""
        if not 0 <= target < self.step_count:
            raise CommandError(f"{self.name} is at update {self.step_count} and cannot go back to {target}.")
        return self._checkpoints.find(target)

    def _rewind(self, target: int) -> Rewound:
        checkpoint = self.place_of(target)
        rewound = Rewound(target, self.step_count, checkpoint.state["standing"])
        self.trainer.restore(checkpoint)
        self._checkpoints.forget_after(target)
        self._record(rewound)
        self._find_best()
        with suppress(OSError, FolderError):  # it is tried again, and said, when the run goes on
            self.trainer.restore_best()
        try:
            self.checkpoint("rewind")
        except CheckpointError as error:
            raise type(error)(f"{self.name} is at update {target} again, but {error}") from None
        return rewound

    def _find_best(self) -> None:
        """Give the trainer the parameters of its best update, where it was restored without them."""
        saves = self.trainer.saves
        if saves.best is None:
            saves.best = self._checkpoints.find_best()

    @one_at_a_time
    def fork(self, /, *, name: str | None = None, **changes: Any) -> Run:
        """A second run that goes on from here with other settings: `run.fork(learning_rate=1e-5)`.

        It shares the base's memory and the rows with this one, and neither touches the other. Model, rows and
        adapter cannot change. Raises ConfigError for those, CommandError when the name is this run's own.
        """
        from mlx_nb.run.fork import forked

        return forked(self, name, changes, lambda config, name: Run(config, name=name, _from_checkpoint=True))

    @property
    def stuck(self) -> bool:
        """Whether a function of a person's own goes on although an interrupt struck it: it catches all of them."""
        rollouts = self._trainer.rollouts if self._trainer is not None else None
        return self.inputs.reading.stuck or (rollouts is not None and rollouts.own_code.stuck)

    @one_at_a_time
    def save_unsaved(self) -> bool:
        """Write a checkpoint if updates were done since the last one. Returns whether. Raises CheckpointError."""
        if self.let_go or self.unsaved_updates <= 0:
            return False
        self.checkpoint("exit")
        return True

    def save_last_boundary(self) -> bool:
        """The same for the last boundary, from memory: for another thread, while an update is being computed.

        Returns whether something was written. Raises CheckpointError.
        """
        if self.let_go or self.unsaved_updates <= 0:
            return False
        return self._checkpoints.save_last_boundary("exit") is not None

    @one_at_a_time
    @interrupts_wait()
    def release(self, reason: str = "") -> None:
        """End the run at the boundary where it is: what is not saved is written, then it writes there no more.

        Another run can have the folder then. `reason` begins the message that a later attempt to write is answered
        with. Raises CheckpointError when it cannot be saved; then it is not let go.
        """
        if self.let_go:
            return
        self.background.stop()
        try:
            self.save_unsaved()
        except FolderError as error:  # it is not its own any more
            print(f"{self.name}: {error}", file=sys.stderr)
        except CheckpointError as error:
            raise CheckpointError(f"{self.name} is not let go, because {error}") from None
        self.home.give_up(f"{reason or f'{self.name} let go of {self.folder}'} after update {self.step_count}")
        self._checkpoints.snapshots.forget()
        exits.restore_signals()

    @property
    def let_go(self) -> str:
        """Why it trains and saves no more, and how to get it back; empty while it may."""
        return self._home.lost if self._home is not None else ""

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # Once the interpreter is being taken down no file can be opened: what there is to save was saved `atexit`.
        if is_finalizing() or getattr(self, "_trainer", None) is None:
            return
        try:
            self.save_unsaved()
        except Exception as error:
            print(f"{self.name}: {error}", file=sys.stderr)

    @one_at_a_time
    def checkpoint(self, kind: str = "step") -> Path:
        """Write everything that the run's next update depends on. Returns the folder. Raises CheckpointError."""
        folder = self._checkpoints.save(kind)
        self._calls.notify(CheckpointSaved(self.step_count, str(folder), kind))
        return folder

    def checkpoints(self) -> list[CheckpointInfo]:
        """The exact checkpoints in the run's folder, the oldest save first."""
        return self._checkpoints.store.list()

    @one_at_a_time
    def delete_checkpoint(self, info: CheckpointInfo) -> None:
        """Remove one. Raises CheckpointError, also when another run that lives holds the folder."""
        self._checkpoints.delete(info)

    @one_at_a_time
    def compare_checkpoint(self, info: CheckpointInfo) -> list[tuple[str, str]]:
        """(label, value) lines: the run as it is now against a checkpoint. Raises CheckpointError."""
        return self._checkpoints.compare(info)

    @property
    def has_checkpoint(self) -> bool:
        """Whether `Run.resume` has something to go on from in this run's folder."""
        return bool(self.checkpoints())

    @property
    def needs_saving(self) -> bool:
        """Whether something would be lost if the process ended now, or an update later.

        Asked while a run is collected, where whatever interrupts is lost: it reads no file.
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
        """The run of the adapter folder `path`, as it was at its newest good checkpoint, or the one of `step`.

        What happens from there on is what would have happened. `data` is needed again when it was an object.
        `config` is what the settings ought to be; null takes those of the checkpoint. Raises CheckpointError when
        there is no good checkpoint, and when settings, rows, template, tokenizer, model or a version changed since:
        naming them in `allow_changed` goes on all the same.
        """
        from mlx_nb.train.checkpoint import CheckpointStore

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
                with unfit.noted(checkpoint):
                    run.trainer.restore(checkpoint)
                    run.history, damage = read_history_of(checkpoint)
                    break
                run._trainer = None  # it may hold half of what does not fit, which is not to be saved
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
        run._find_best()
        run.trainer.notes += tuple(restore_requests(run, requests_of(checkpoint)))
        return run

    def step(self, n: int = 1) -> StepCompleted:
        """Exactly `n` optimizer updates (fewer at the end of the run), then control is back. Returns the last one.

        An interrupt pauses, and outside a notebook is raised as KeyboardInterrupt once the pause is saved.
        Raises TrainingError when an update was not kept, CommandError when the run is already over.
        """
        self._calls.refuse_inside("do a step")
        self._refuse_running("step")
        if not isinstance(n, int) or n < 1:
            raise CommandError(f"cannot do {n!r} updates. Give a whole number of 1 or more.")
        if self.over:
            raise CommandError(f"{self.name} is finished: all {self.trainer.iters} updates are done. {WAY_ON}")
        last = failed = paused = None
        with self.interrupts() as interrupts:
            for event in self.events(n):
                failed = event if isinstance(event, RunFailed) else failed
                paused = event if isinstance(event, RunPaused) else paused
                last = event if isinstance(event, StepCompleted) else last
        self._raise_interrupt(interrupts)
        raise_failure(failed)
        if last is None and self.finished:
            raise CommandError(f"{self.name} is finished: no update is left after {self.step_count}.")
        if last is None:
            reason = "" if paused is None else f": {paused.reason}"
            raise CommandError(f"{self.name} paused before its next update{reason}")
        return last

    def run(self, until: int | None = None) -> RunFinished | RunPaused:
        """To the end, or to update `until`. Returns how it ended. Raises TrainingError as `step` does.

        A run that was stopped, or stopped early, goes on; one whose updates are all done returns how it ended. Where
        `until` is beyond the last update the run gets so much longer, as by `set(iters=until)`.

        An interrupt pauses, and outside a notebook is raised as KeyboardInterrupt once the pause is saved, so that
        a loop over runs ends there too.
        """
        self._calls.refuse_inside("run")
        self._refuse_running("run")
        if until is not None:
            self._lengthen(until)
        if self._trainer is not None and self._trainer.finished is not None and self._trainer.over:
            return self._trainer.finished
        updates = None if until is None else max(0, until - self.step_count)
        ended: RunFinished | RunPaused | None = None
        failed: RunFailed | None = None
        with self.interrupts() as interrupts:
            for event in self.events(updates):
                failed = event if isinstance(event, RunFailed) else failed
                if isinstance(event, (RunFinished, RunPaused)):
                    ended = event
        self._raise_interrupt(interrupts)
        raise_failure(failed)  # only now: the checkpoint of a failure is written after its event
        return ended or self.trainer.finished or RunPaused(self.step_count, f"reached update {until}")

    def _lengthen(self, until: int) -> None:
        """Make the run as long as that takes. One that goes by epochs has a length once its rows are loaded."""
        if isinstance(until, bool) or not isinstance(until, int) or until < 0:
            raise CommandError(f"cannot train to update {until!r}. Give a whole number of 0 or more.")
        length = self._trainer.iters if self._trainer is not None else self.config.iters
        if length is not None and until > length:
            self.set(iters=until)

    def more(self, updates: int) -> int:
        """Make sure that so many updates are left, with a longer run where it takes one. Returns `updates`.

        Raises CommandError for less than one.
        """
        if isinstance(updates, bool) or not isinstance(updates, int) or updates < 1:
            raise CommandError(f"cannot do {updates!r} updates. Give a whole number of 1 or more.")
        self._refuse_running("do more updates")
        self._lengthen(self.step_count + updates)
        return updates

    def _raise_interrupt(self, interrupts: Interrupts) -> None:
        """In a script whoever interrupts means the script; in a notebook, the run."""
        if interrupts.count and not in_ipython():
            raise KeyboardInterrupt(f"{self.name} is {self.state} after update {self.step_count}, and saved.")

    def start(self, updates: int | None = None) -> None:
        """Train in the background of the kernel, by `updates` updates or to the end; returns at once.

        `await run` waits for it; `request(Pause())`, the panel or an interrupt pauses it. What stops it with an error
        is told to the listeners. Raises CommandError where no event loop is running.
        """
        self._calls.refuse_inside("start")
        self.background.start(updates, ended=self._background_ended)
        self._calls.notify(StateChanged(self.step_count, self.state))

    def _background_ended(self, error: BaseException | None) -> None:
        self._error = error
        if error is not None:
            self._failed = True
            self._calls.notify(RunFailed(self.step_count, "error", f"{type(error).__name__}: {error}"))
        self._calls.notify(StateChanged(self.step_count, self.state))

    def __await__(self) -> Generator[Any, None, Run]:
        """Wait until the run stops moving, without cancelling it. Raises TrainingError when it failed."""
        yield from self.background.wait().__await__()
        if self._error is not None:
            raise self._error
        if self.state == RunState.FAILED:
            raise_failure(next(event for event in reversed(self.history.events) if isinstance(event, RunFailed)))
        return self

    def request(self, request: Request) -> None:
        """Ask for something at the next step boundary. Safe from a signal handler or a widget callback.

        While the run is loading that is between two pieces of it. Where rows are being read, a pause at once breaks
        that off with KeyboardInterrupt: it may be code of the person's own, or a network, that never ends. Raises
        CommandError for what no run answers.
        """
        if not isinstance(request, TrainerRequest | RunRequest):
            raise CommandError(f"{shown(request)} cannot be asked of a run. {_REQUESTS}")
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
        """Leave out the next batch: what to do when a tripwire stopped the run at rows that are to blame."""
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
            else:  # it stands at a boundary
                self._record(self._trainer.change(name, getattr(checked, name)))

    @one_at_a_time
    def evaluate(self, split: str = "valid", *, all_rows: bool = False) -> EvaluationCompleted:
        """Loss and the method's metrics on a fixed set of rows of `split`, or on all of them, now."""
        self._calls.refuse_inside("evaluate")
        trainer = self.trainer
        if split == "test" and not self.config.test and not trainer.examples.test:
            trainer.examples = dataclasses.replace(trainer.examples, test=self.inputs.tokenize("test"))
        result = trainer.evaluate(split, all_rows=all_rows)
        self._record(result)
        return result

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
        """The model's answer, now. `prompt` is a text or a list of messages; a list of prompts gives a list.

        A text is asked as the training rows are written: as a user message, or as raw text that goes on (see
        `prompt_format`). Messages and `tools` are read and rendered like those of rows. Messages that end with one of
        the assistant's have that one continued, and the answer is what follows it; DataError where the chat template
        does not let it be continued exactly.
        `base` answers with the adapter switched off. Temperature 0 is greedy. `on_text` is called with the answer so
        far after each token, of a list of prompts with the list of answers. The run and the user's random stream
        are left as they were. Other threads may ask too: while the run trains they wait for the end of an update.
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
    def save(self, path: str | Path | None = None) -> Path:
        """Write the adapter in mlx-lm's format to `path` (default: the run's folder). Returns the folder.

        A run whose own folder cannot be written, or has another run in it by now, moves to `path`: what it saves from
        now on, checkpoints too, goes there. An adapter that was saved to `path` by an earlier run is moved to
        `path.previous-1`. Raises FolderError when the folder is that of another run, when something in it was not
        written by mlx_nb, and CheckpointError when it cannot be written.
        """
        folder = self.folder if path is None else folder_of(str(path), working_folder())
        if not same_folder(folder, self.folder):
            refuse_among_files(folder, self.folder)
        trainer = self.trainer
        if same_folder(folder, self.folder):
            with self.home.writing():
                self._save_adapter(self.home)
        elif self._blocked or self.home.refused or not self._can_write():
            self.home.release()
            self._home = self._saved_to(folder, RUN)
            self.config = self.config.replace(adapter_path=str(folder))
            trainer.change_folder(folder, self._home.write)
            self.history.folder = str(folder)
            self.checkpoint("pause")
        else:
            self._saved_to(folder, EXPORT).release()
        self._blocked = False
        return folder

    def _can_write(self) -> bool:
        """Whether the run's own folder is still its own."""
        try:
            with self.home.writing():
                return True
        except FolderError:
            return False

    def _saved_to(self, path: Path, kind: str) -> RunFolder:
        """The folder at `path`, held, with the adapter in it. Nothing of another run or of a person is written over."""
        folder = RunFolder(path, self.name, self.home.run_id, kind=kind, at_rest=self._at_rest, let_go=self.release)
        try:
            folder.take_for_adapter()
            self._save_adapter(folder)
        except BaseException:
            folder.release()
            raise
        return folder

    def _save_adapter(self, folder: RunFolder) -> None:
        try:
            self.trainer.save_adapter(folder.path, write=folder.write)
        except OSError as error:
            raise CheckpointError(f"{folder.path} cannot be written: {error.strerror}. Give another folder.") from None

    @one_at_a_time
    def adapter_bytes(self) -> dict[str, bytes]:
        """The trainable parameters as they would be saved: raw little-endian bytes by name."""
        import numpy as np

        from mlx_nb.model.adapters import adapter_weights

        return {name: np.array(array).tobytes() for name, array in adapter_weights(self.trainer.model).items()}

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Call `listener` with every event. One that raises is named once on stderr; training does not notice.

        It may look (history, status, plot, rows), `set` live settings, `save`, and `request` what is to be done at the
        next boundary. What moves or asks the model there and then is refused: the run is in the middle of something.
        """
        self._calls.listen(listener)

    def unlisten(self, listener: Callable[[Event], None]) -> None:
        """Call it no more."""
        self._calls.unlisten(listener)

    def _record(self, event: Event) -> None:
        self.history.append(event)
        self._calls.notify(event)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """A card: what the run is and where it stands."""
        from mlx_nb.view.event_text import summary_html

        if not self.prepared:
            return {"text/plain": f"{self!r}\n{self.status()}", "text/html": f"<pre>{escape(self.status())}</pre>"}
        return {"text/plain": self.status(), "text/html": summary_html(self.history, f"{self.name}: {self.state}")}

    def __repr__(self) -> str:
        if self.let_go:
            return f"Run({self.name!r}, let go at update {self.step_count}: {self.let_go})"
        done = f"{self.step_count} of {self._trainer.iters} updates" if self._trainer else "not started"
        return f"Run({self.name!r}, model={self.config.model!r}, {self.config.fine_tune_type}, {done})"


def raise_failure(event: Event | None) -> None:
    """Raise the TrainingError of a RunFailed; pass over every other event."""
    if isinstance(event, RunFailed):
        raise TRAINING_ERRORS.get(event.reason, TrainingError)(event.error, event.rows, event.largest_gradients)
