"""The training loop of a run: records the trainer's events, writes the checkpoints that are due, handles requests."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, assert_never

from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import CheckpointError, DataError, FolderError, FolderTaken, MlxNbError, ModelChanged
from mlx_nb.events import (
    AdapterSaved,
    BatchSkipped,
    DataChanged,
    EvaluationCompleted,
    Event,
    Pause,
    Progress,
    Question,
    RequestRefused,
    Rewind,
    RolloutCompleted,
    RunFailed,
    RunFinished,
    RunPaused,
    RunRequest,
    SampleGenerated,
    StepCompleted,
)
from mlx_nb.files.run_folder import RunFolder
from mlx_nb.run.checkpoints import Checkpoints
from mlx_nb.run.inputs import RunInputs
from mlx_nb.run.live_model import stream_answer
from mlx_nb.run.rewinding import Rewinding
from mlx_nb.run.user_calls import UserCalls
from mlx_nb.train.inbox import Inbox

if TYPE_CHECKING:
    from mlx_nb.train.trainer import Trainer


class LoopedRun(Protocol):
    """The interface of a run that its training loop needs."""

    config: RunConfig
    inputs: RunInputs

    @property
    def folder(self) -> Path:
        """Where it saves."""

    @property
    def home(self) -> RunFolder:
        """Its folder, with the lock and the list of written files."""

    @property
    def prepared(self) -> bool:
        """Whether model and rows are loaded and the adapter is attached."""

    @property
    def trainer(self) -> Trainer:
        """Its trainer."""

    @property
    def step_count(self) -> int:
        """Updates done."""

    def load(self) -> Iterator[Progress]:
        """Load model and rows; ends early if a pause is requested."""

    def checkpoint(self, kind: str = "step") -> Path:
        """Write an exact checkpoint. Raises CheckpointError."""


class TrainingLoop:
    """The loop of one run, with the outcome of its last pass.

    failed        whether training ended with an error
    error         the exception that ended it, if it was not the trainer's own RunFailed
    paused_early  whether a pause or interrupt came while the run was loading
    blocked       whether the last checkpoint could not be written
    """

    def __init__(
        self,
        run: LoopedRun,
        inbox: Inbox,
        checkpoints: Checkpoints,
        rewinding: Rewinding,
        calls: UserCalls,
        record: Callable[[Event], None],
    ) -> None:
        self._run = run
        self._record = record
        self._inbox = inbox
        self._checkpoints = checkpoints
        self._rewinding = rewinding
        self._calls = calls
        self.failed = False
        self.error: BaseException | None = None
        self.paused_early = False
        self.blocked = False

    def fail(self, error: BaseException) -> None:
        """Note the exception that ended training in the background, and send a RunFailed to the listeners."""
        self.failed, self.error = True, error
        self._calls.notify(RunFailed(self._run.step_count, "error", f"{type(error).__name__}: {error}"))

    def events(self, updates: int | None) -> Iterator[Event]:
        """Load the run if necessary, then train for `updates` updates (None = to the end), yielding every event."""
        run = self._run
        try:
            yield from run.load()
        except KeyboardInterrupt:
            self.paused_early = True
            raise
        if not run.prepared:
            self.paused_early = True
            (pause, *_) = self._inbox.drop(Pause)
            paused = RunPaused(0, pause.reason)
            self._calls.notify(paused)
            yield paused
            return
        trainer = run.trainer
        try:
            yield from self._train(trainer, updates)
        finally:
            trainer.clear_pauses()  # a pause requested while this one took effect is satisfied too

    def _train(self, trainer: Trainer, updates: int | None) -> Iterator[Event]:
        run = self._run
        try:
            run.home.check()
        except FolderTaken:
            raise
        except FolderError:
            pass  # a disk that cannot be written pauses the run at its next save
        if not self._checkpoints.snapshots:
            self._checkpoints.remember()
        self.failed, self.error = False, None
        yield from self._handle_requests()
        for event in trainer.events(updates):
            if isinstance(event, Progress | RequestRefused):
                self._calls.notify(event)
                yield event
                continue
            self.failed = isinstance(event, RunFailed)
            self._record_and_keep(event)
            yield event
            if run.home.lost:
                yield (paused := RunPaused(run.step_count, run.home.lost))
                self._record(paused)
                return
            rewound = yield from self._handle_requests()
            if rewound and updates is not None:  # `updates` was counted from before the rewind
                return
            if not (yield from self._save_if_due(event)):
                return
        yield from self._handle_requests()  # requests that came during the last event

    def _record_and_keep(self, event: Event) -> None:
        """Record an event, keep a snapshot after an update, and free memory after work of other sizes."""
        from mlx_nb.model.memory import clear_cache

        self._record(event)
        if isinstance(event, EvaluationCompleted | SampleGenerated | RolloutCompleted | RunFailed):
            clear_cache()
        if isinstance(event, StepCompleted | BatchSkipped):
            self._checkpoints.remember()
        if isinstance(event, AdapterSaved) and event.kind == "step":
            with suppress(OSError, FolderError):  # the next save reports it
                self._run.home.keep_numbered(self._run.config.keep)

    def _save_if_due(self, event: Event) -> Generator[Event, None, bool]:
        """Write the checkpoint that is due after `event`. Returns False if that failed and the run is paused."""
        run = self._run
        if isinstance(event, RunFinished):
            self._checkpoints.snapshots.release(run.folder)
        if (kind := self._checkpoints.kind_due(event)) is None:
            return True
        try:
            run.checkpoint(kind)
        except ModelChanged:
            pass  # the RunFailed event has reported it; everything up to the last boundary is saved
        except CheckpointError as error:
            self.blocked = True
            paused = RunPaused(run.step_count, str(error))
            self._record(paused)
            yield paused
            return False
        self.blocked = False
        for path in run.inputs.changed_files():
            self._record(changed := DataChanged(run.step_count, path))
            yield changed
        if isinstance(event, RunFinished):
            run.home.release()
        return True

    def _handle_requests(self) -> Generator[Event, None, bool]:
        """Answer questions and rewind at this boundary. A request that fails is refused and changes nothing.

        Returns whether the run was rewound.
        """
        request: RunRequest
        rewound = False
        for request in self._inbox.take(RunRequest):
            match request:
                case Question():
                    yield from self._answer(request)
                case Rewind(to):
                    try:
                        yield self._rewinding.rewind_to(to)
                        rewound = True
                    except MlxNbError as error:
                        self._calls.notify(RequestRefused(self._run.step_count, str(error)))
                case _:
                    assert_never(request)
        return rewound

    def _answer(self, question: Question) -> Iterator[Event]:
        step, text = self._run.step_count, ""
        try:
            for tokens, text in enumerate(stream_answer(self._run.inputs, question)):
                if self._calls.send_text(question, text, False):
                    break
                yield Progress(step, "answer", tokens, question.max_tokens)
        except DataError as error:
            text = f"not answered: {error}"
            self._calls.notify(RequestRefused(step, text))
        self._calls.send_text(question, text, True)
