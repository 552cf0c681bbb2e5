"""The saved states of a run: snapshots of recent steps in memory, and exact checkpoints on disk."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlx_nb.config.run_config import SETTINGS, RunConfig
from mlx_nb.errors import CheckpointError, CommandError, FolderError, ModelChanged
from mlx_nb.events import AdapterSaved, Event, RunFailed, RunFinished, RunPaused, SettingChanged, StepCompleted
from mlx_nb.events.history import History
from mlx_nb.files.folder_lock import is_locked
from mlx_nb.files.history_file import HistoryFile, history_files, is_history
from mlx_nb.files.run_folder import RunFolder
from mlx_nb.files.written_files import CHECKPOINTS
from mlx_nb.run.inputs import RunInputs
from mlx_nb.run.resume_checks import history_of, live_change_lines, refuse_unusable
from mlx_nb.run.snapshots import Snapshots
from mlx_nb.view.metric_text import headline

if TYPE_CHECKING:
    from mlx_nb.train.checkpoint import Checkpoint, CheckpointInfo
    from mlx_nb.train.checkpoint_store import CheckpointStore
    from mlx_nb.train.inbox import Inbox
    from mlx_nb.train.trainer import Trainer

SHARE_OF_SAVING = 0.01  # the largest share of time that autosaves may take
SAVED_BYTES_PER_SECOND, SHORTEST_SAVE = 200e6, 0.05  # used to estimate the first save, in bytes and seconds


class CheckpointedRun(Protocol):
    """The interface of a run that checkpoints need."""

    name: str
    config: RunConfig
    history: History
    inputs: RunInputs

    @property
    def folder(self) -> Path:
        """Where it saves."""

    @property
    def home(self) -> RunFolder:
        """That folder, with its lock and list of written files."""

    @property
    def trainer(self) -> Trainer:
        """Its trainer."""

    @property
    def step_count(self) -> int:
        """Updates done."""


class Checkpoints:
    """The snapshots and checkpoints of one run. A checkpoint includes the pending requests in `inbox`."""

    def __init__(self, run: CheckpointedRun, inbox: Inbox) -> None:
        self._run = run
        self._inbox = inbox
        self.snapshots = Snapshots()
        self._settings = RunConfig()  # the settings at the newest snapshot
        self._history = HistoryFile()
        self._seen = 0  # events of the history already searched for live changes
        self._live_changes: list[str] = []
        self._saved_at = time.monotonic()
        self._save_seconds: float | None = None  # estimated duration of a save; None before the first
        self._saving = threading.RLock()  # reentrant, because a signal handler may save too
        self.saved_step = 0

    @property
    def store(self) -> CheckpointStore:
        """The checkpoints in the run's folder."""
        from mlx_nb.train.checkpoint_store import CheckpointStore

        return CheckpointStore(self._run.folder / CHECKPOINTS, self._run.config.keep)

    @property
    def _own_store(self) -> CheckpointStore:
        """`store`, after checking that this run still holds the folder. Raises CheckpointError."""
        try:
            self._run.home.check()
        except FolderError as error:
            raise type(error)(f"step {self._run.step_count} could not be saved: {error}") from None
        return self.store

    def remember(self) -> None:
        """Take a snapshot of this step, and drop the oldest snapshots beyond `snapshot_memory`."""
        trainer = self._run.trainer
        snapshot = trainer.snapshot()
        snapshot = replace(snapshot, state={**snapshot.state, **_place_in(self._run.history)})
        self.snapshots.add(snapshot, trainer.config.snapshot_memory * 1024**2)
        self._settings = trainer.config
        trainer.kept_memory = self.snapshots.held_bytes

    def forget_after(self, step: int) -> None:
        """Drop the snapshots of steps after `step`. Checkpoints on disk stay."""
        self.snapshots.forget_after(step)
        self.saved_step = min(self.saved_step, step - 1)  # the checkpoints after it belong to the abandoned branch

    def find(self, step: int) -> Checkpoint:
        """The state of an earlier update of the current branch, from memory or disk. Raises CommandError."""
        if (snapshot := self.snapshots.find(step)) is not None:
            return snapshot
        store, history = self.store, self._run.history
        there = sorted({info.step for info in store.list()} | self.snapshots.steps)
        try:
            checkpoint, _ = store.load(step, refuse_unusable)
        except CheckpointError:
            reachable = ", ".join(str(one) for one in there if one < self._run.step_count) or "none"
            lost = "" if store.folder.exists() else f" {store.folder} no longer exists."
            raise CommandError(f"update {step} was not kept.{lost} Available updates: {reachable}.") from None
        before = history_of(checkpoint).in_effect
        if [event.to_json() for event in before] != [event.to_json() for event in history.in_effect[: len(before)]]:
            raise CommandError(f"the checkpoint of update {step} belongs to a branch that a rewind abandoned.")
        return checkpoint

    def find_best(self) -> dict[str, Any] | None:
        """The parameters of the best update; None if they were not kept."""
        step = self._run.trainer.state.best_step
        if step is not None:
            with suppress(CommandError, CheckpointError):
                return self.find(step).arrays["parameters"]
        return None

    def save(self, kind: str) -> Path:
        """Write a checkpoint of the current step and return its folder. Raises CheckpointError.

        If user code has changed the model, the last boundary is saved from memory instead; raises ModelChanged if that
        is saved already.
        """
        trainer = self._run.trainer
        store = self._own_store
        with self._saving:
            try:
                snapshot = trainer.snapshot()
            except ModelChanged:
                if (folder := self.save_last_boundary(kind)) is None:
                    raise
                return folder
            state = {**snapshot.state, **_place_in(self._run.history)}
            return self._write(replace(snapshot, state=state), trainer.config, store, kind)

    def save_last_boundary(self, kind: str) -> Path | None:
        """Write a checkpoint of the last boundary from memory. Any thread may call it, even during an update.

        Returns None without writing if that boundary is saved already or a rewind abandoned it. Raises CheckpointError.
        """
        store = self._own_store
        with self._saving:
            newest = self.snapshots.newest
            if newest is None or newest.step <= self.saved_step or newest.state["events"] < self._seen:
                return None
            return self._write(newest, self._settings, store, kind)

    def _write(self, snapshot: Checkpoint, config: RunConfig, store: CheckpointStore, kind: str) -> Path:
        """Write a snapshot with its settings, the history up to it and the requests that are pending now."""
        from mlx_nb.train.checkpoint_store import save_error
        from mlx_nb.train.record import sealed

        run, begun = self._run, time.monotonic()
        events = run.history.events[: snapshot.state["events"]]
        new = events[self._seen :]
        self._live_changes += [event.to_json() for event in new if isinstance(event, SettingChanged)]
        self._seen += len(new)
        try:
            store.make_folder()
            parts = self._history.save(events, store.folder)
        except OSError as error:
            raise save_error(store.folder, snapshot.step, None, error) from error
        state = {
            **snapshot.state,
            "name": run.name,
            "config": config.described(),
            "made_from": run.inputs.fingerprints,
            "asked": list(dict.fromkeys([*snapshot.state["asked"], *self._inbox.kept()])),
            "history": [],  # for older versions of mlx_nb
            "history_parts": parts,
            "live_changes": list(self._live_changes),
            "working_folder": _working_folder(config, run.folder),
        }
        folder = store.save(replace(snapshot, state=sealed(state)), kind=kind)
        self._saved_at, self.saved_step = time.monotonic(), snapshot.step
        self._measured(self._saved_at - begun)
        _remove_left_histories(store)
        return folder

    def _measured(self, seconds: float) -> None:
        """Update the estimated duration of a save. An outlier at most doubles the estimate."""
        self._save_seconds = min(seconds, 2 * self.save_seconds)

    @property
    def save_seconds(self) -> float:
        """The estimated duration of a save."""
        if self._save_seconds is not None:
            return self._save_seconds
        return max(SHORTEST_SAVE, self.snapshots.newest_bytes / SAVED_BYTES_PER_SECOND)

    def delete(self, info: CheckpointInfo) -> None:
        """Remove a checkpoint. Raises CheckpointError, also if another live run holds the folder."""
        if not self._run.home.held and is_locked(self._run.folder):
            self._run.home.take()
        self.store.delete(info)

    def compare(self, info: CheckpointInfo) -> list[tuple[str, str]]:
        """(label, value) lines that compare a checkpoint with the current state. Raises CheckpointError."""
        checkpoint, _ = self.store.load(info.path.name, refuse_unusable)
        return _differences(checkpoint, self._run.trainer, self._run.history)

    def continue_from(self, checkpoint: Checkpoint, *, whole: bool) -> None:
        """Continue after a resume from `checkpoint`. `whole` says whether its history could be read completely."""
        history = self._run.history
        assert checkpoint.path is not None
        parts = checkpoint.state.get("history_parts")
        if parts and whole:
            self._history = HistoryFile(checkpoint.path.parent, parts, len(history.events))
        self._live_changes, self._seen = live_change_lines(checkpoint), len(history.events)
        self.saved_step = checkpoint.step

    def kind_due(self, event: Event) -> str | None:
        """The kind of checkpoint to write after `event`; None if none is due."""
        autosave_minutes = self._run.config.autosave_minutes
        match event:
            case AdapterSaved(kind="step" | "best" as kind):
                return kind
            case StepCompleted() if autosave_minutes is not None:
                longest = min(60 * autosave_minutes, self.save_seconds / SHARE_OF_SAVING)
                return "auto" if time.monotonic() - self._saved_at >= longest else None
            case RunPaused():
                return "pause"
            case RunFailed():
                return "error"
            case RunFinished():
                return "final"
            case _:
                return None


def _place_in(history: History) -> dict[str, int]:
    """The position in a history: the number of events, and of those in effect after rewinds."""
    return {"events": len(history.events), "standing": len(history.in_effect)}


def _working_folder(config: RunConfig, run_folder: Path) -> dict[str, str] | None:
    """The folder that relative paths in the settings refer to: absolute, and relative to the run's folder."""
    if config.working_folder is None:
        return None
    relative = os.path.relpath(config.working_folder, os.path.realpath(run_folder))
    return {"path": str(config.working_folder), "from_run": relative}


def _remove_left_histories(store: CheckpointStore) -> None:
    """Remove history files that no checkpoint uses. If a checkpoint cannot be read, all files stay."""
    from mlx_nb.train.checkpoint import STATE_FILE

    there = history_files(store.folder)
    if len(there) < 2:
        return
    try:
        for info in store.list():
            state = json.loads((info.path / STATE_FILE).read_bytes())
            there -= {part["file"] for part in state.get("history_parts", ())}
        for name in there:
            if is_history(store.folder / name):
                (store.folder / name).unlink(missing_ok=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, CheckpointError):
        return


def for_other_settings(snapshot: Checkpoint, before: RunConfig, after: RunConfig) -> Checkpoint:
    """A snapshot for a fork. Sampled completions are dropped if a setting that affects sampling differs."""
    arrays, state = snapshot.arrays, snapshot.state
    of_rollouts = [name for name in SETTINGS if SETTINGS[name].metadata["group"] == "rollouts"]
    if any(getattr(before, name) != getattr(after, name) for name in (*of_rollouts, "loss")):
        arrays, state = {**arrays, "feed": {}}, {**state, "feed": None}
    return replace(snapshot, arrays=arrays, state=state)


def _differences(checkpoint: Checkpoint, trainer: Trainer, history: History) -> list[tuple[str, str]]:
    """(label, value) lines that compare a checkpoint with the current state of its run."""
    import mlx.core as mx

    from mlx_nb.model.adapters import adapter_weights

    there = history_of(checkpoint)
    before, now = ([headline(row) for row in one.evaluations("valid")] for one in (there, history))
    lines = [("update", f"{checkpoint.step} → {trainer.state.step}")]
    if there["loss"] and history["loss"]:
        lines.append(("training loss", f"{there['loss'][-1]:.4f} → {history['loss'][-1]:.4f}"))
    if before and now:
        lines.append((f"validation {now[-1][0]}", f"{before[-1][1]:.4f} → {now[-1][1]:.4f}"))
    start, end = checkpoint.arrays["parameters"], adapter_weights(trainer.model)
    change = sum(float(mx.square(end[name] - start[name]).sum()) for name in start)
    size = sum(float(mx.square(start[name]).sum()) for name in start)
    return [*lines, ("parameters changed by", f"{100 * (change / max(size, 1e-30)) ** 0.5:.2f}% of their norm")]
