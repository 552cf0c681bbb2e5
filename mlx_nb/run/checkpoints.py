"""What a run keeps to go back to: its last steps in memory, and exact checkpoints on disk."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_nb.config.run_config import SETTINGS, RunConfig
from mlx_nb.errors import CheckpointError, CommandError, ConfigError
from mlx_nb.events import AdapterSaved, Event, RunFailed, RunFinished, RunPaused, SettingChanged, StepCompleted
from mlx_nb.files.history_file import HistoryFile, history_files, is_history
from mlx_nb.history import History
from mlx_nb.run.resume_checks import history_of, live_change_lines, refuse_unusable
from mlx_nb.view.metric_text import headline

if TYPE_CHECKING:
    from mlx_nb.train.checkpoint import Checkpoint, CheckpointStore
    from mlx_nb.train.parking import Parking
    from mlx_nb.train.trainer import Trainer

SHARE_OF_SAVING = 0.01  # of the time, at most, goes into checkpoints that nothing asked for
SAVED_BYTES_PER_SECOND, SHORTEST_SAVE = 200e6, 0.05  # the guess, in bytes and seconds, before the first is measured


class Checkpoints:
    """The snapshots and checkpoints of one run. `about` is what a checkpoint says of it: name and fingerprints."""

    def __init__(self) -> None:
        self._recent: deque[Checkpoint] = deque()
        self._parked: list[Parking] = []
        self._settings = RunConfig()  # those of the newest snapshot
        self._holders: Counter[int] = Counter()  # how many of these each array is in, by its id
        self._bytes = 0  # of all of them, each once
        self._history = HistoryFile()
        self._seen = 0  # events of the history that were looked at for live changes
        self._live_changes: list[str] = []
        self._saved_at = time.monotonic()
        self._save_seconds: float | None = None  # what a save takes; None before the first
        self._saving = threading.RLock()  # one thread at a time; a signal handler may come in between
        self.saved_step = 0

    def remember(self, trainer: Trainer, history: History) -> None:
        """Keep this step in memory, and of those before it as many as `snapshot_memory` holds.

        Arrays are shared, not copied: this step's are those of the run itself.
        """
        snapshot = trainer.snapshot()
        snapshot = replace(snapshot, state={**snapshot.state, **_place_in(history)})
        if _best_step(snapshot) in {one.step for one in self._recent}:
            snapshot = _with_best(snapshot, None)
        self._recent.append(snapshot)
        self._settings = trainer.config
        self._count(snapshot, 1)
        while len(self._recent) > 1 and self.held_bytes > trainer.config.snapshot_memory * 1024**2:
            self._forget_oldest()
        trainer.kept_memory = self.held_bytes

    @property
    def held_bytes(self) -> int:
        """What the snapshots take besides the newest, which is the run as it stands; a shared array counts once."""
        newest = {id(array): array.nbytes for array in _arrays(self._recent[-1])} if self._recent else {}
        result: int = self._bytes - sum(newest.values())
        return result

    def _forget_oldest(self) -> None:
        """The one after it takes over the best adapter that both know of, so that the oldest always has its own."""
        oldest = self._recent.popleft()
        after = self._recent[0]
        best = oldest.arrays["parameters"] if _best_step(after) == oldest.step else oldest.arrays.get("best")
        if best is not None and "best" not in after.arrays and _best_step(after) in (oldest.step, _best_step(oldest)):
            self._count(after, -1)
            self._recent[0] = _with_best(after, best)
            self._count(self._recent[0], 1)
        self._count(oldest, -1)

    def _with_own_best(self, snapshot: Checkpoint) -> Checkpoint:
        """A snapshot with the best adapter it knows of, which another one may hold for it."""
        return snapshot if "best" in snapshot.arrays else _with_best(snapshot, self._best_of(snapshot))

    def _best_of(self, snapshot: Checkpoint) -> dict[str, Any] | None:
        """The best adapter of a snapshot in memory; None where that is not in memory."""
        step = _best_step(snapshot)
        for one in list(self._recent):
            if one.step == step:
                return one.arrays["parameters"]
            if _best_step(one) == step and "best" in one.arrays:
                return one.arrays["best"]
        return None

    def _count(self, snapshot: Checkpoint, by: int) -> None:
        """Take note of a snapshot that came (1) or went (-1)."""
        for array in _arrays(snapshot):
            before = self._holders[id(array)]
            self._holders[id(array)] = after = before + by
            if not (before and after):
                self._bytes += by * array.nbytes
            if not after:
                del self._holders[id(array)]

    def release(self, folder: Path) -> None:
        """Give back the memory of all steps but the last, which is the run as it stands; they go to disk.

        Where the disk has no room for them they are forgotten, and checkpoints alone are left to rewind to.
        """
        from mlx_nb.train.parking import Parking

        if len(self._recent) < 2:
            return
        try:
            self._parked.append(Parking(folder, list(self._recent)[:-1]))
        except OSError:
            pass
        while len(self._recent) > 1:
            self._count(self._recent.popleft(), -1)

    def forget(self) -> None:
        """Drop what is kept in memory and on disk to rewind to, but for checkpoints."""
        self._recent.clear()
        self._parked.clear()
        self._holders.clear()
        self._bytes = 0

    def forget_after(self, step: int) -> None:
        """Drop what is kept of the steps after `step`, but for checkpoints."""
        while self._recent and self._recent[-1].step > step:
            self._count(self._recent.pop(), -1)
        self.saved_step = min(self.saved_step, step - 1)  # what is saved is of the branch that was left
        for parking in self._parked:
            parking.forget_after(step)

    @property
    def remembers(self) -> bool:
        """Whether there is a boundary to go back to in memory."""
        return bool(self._recent)

    def find(self, step: int, store: CheckpointStore, history: History, now: int) -> Checkpoint:
        """The state of update `step` on the way to update `now`, from memory or disk. Raises CommandError."""
        recent = next((one for one in reversed(self._recent) if one.step == step), None) or self._find_parked(step)
        if recent is not None:
            return self._with_own_best(recent)
        parked = {one for parking in self._parked for one in parking.steps}
        there = sorted({info.step for info in store.list()} | {one.step for one in self._recent} | parked)
        try:
            checkpoint, _ = store.load(step, refuse_unusable)
        except CheckpointError:
            reachable = ", ".join(str(one) for one in there if one < now) or "none"
            lost = "" if store.folder.exists() else f" {store.folder} is not there any more."
            raise CommandError(f"update {step} was not kept.{lost} These can be reached: {reachable}.") from None
        before = history_of(checkpoint).standing
        if [event.to_json() for event in before] != [event.to_json() for event in history.standing[: len(before)]]:
            raise CommandError(f"the checkpoint of update {step} is of a branch that was left by a rewind.")
        return checkpoint

    def _find_parked(self, step: int) -> Checkpoint | None:
        try:
            return next(filter(None, (parking.find(step) for parking in reversed(self._parked))), None)
        except OSError:
            return None

    def save(self, trainer: Trainer, history: History, store: CheckpointStore, kind: str, **about: Any) -> Path:
        """Write everything that the next update depends on. Returns the folder. Raises CheckpointError.

        `about` is what `_write` takes of the run.
        """
        with self._saving:
            snapshot = trainer.snapshot()
            state = {**snapshot.state, **_place_in(history)}
            return self._write(replace(snapshot, state=state), trainer.config, history, store, kind, **about)

    def save_last_boundary(self, history: History, store: CheckpointStore, kind: str, **about: Any) -> Path | None:
        """The same as it was after the last update, from memory and by any thread, also in the middle of the next one.

        None, and nothing is written, where that is saved already, or is of before a rewind. Raises CheckpointError.
        """
        with self._saving:
            recent = list(self._recent)
            if not recent or recent[-1].step <= self.saved_step or recent[-1].state["events"] < self._seen:
                return None
            return self._write(self._with_own_best(recent[-1]), self._settings, history, store, kind, **about)

    def _write(
        self,
        snapshot: Checkpoint,
        config: RunConfig,
        history: History,
        store: CheckpointStore,
        kind: str,
        *,
        name: str,
        made_from: dict[str, Any],
        run_folder: Path,
        asked: Sequence[str],
    ) -> Path:
        """Write a snapshot with the settings and the history until then, and with what is `asked` now besides."""
        from mlx_nb.train.checkpoint import save_error
        from mlx_nb.train.record import sealed

        begun = time.monotonic()
        events = history.events[: snapshot.state["events"]]
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
            "name": name,
            "config": config.described(),
            "made_from": made_from,
            "asked": list(dict.fromkeys([*snapshot.state["asked"], *asked])),
            "history": [],  # what an older mlx_nb looks for
            "history_parts": parts,
            "live_changes": list(self._live_changes),
            "working_folder": _working_folder(config, run_folder),
        }
        folder = store.save(replace(snapshot, state=sealed(state)), kind=kind)
        self._saved_at, self.saved_step = time.monotonic(), snapshot.step
        self._measured(self._saved_at - begun)
        _remove_left_histories(store)
        return folder

    def _measured(self, seconds: float) -> None:
        """Take note of what a save took. One that was slow by chance counts for at most twice the one before."""
        self._save_seconds = min(seconds, 2 * self.save_seconds)

    @property
    def save_seconds(self) -> float:
        """What a save takes, as far as is known."""
        if self._save_seconds is not None:
            return self._save_seconds
        size = sum(array.nbytes for array in _arrays(self._recent[-1])) if self._recent else 0
        return max(SHORTEST_SAVE, size / SAVED_BYTES_PER_SECOND)

    def go_on_from(self, checkpoint: Checkpoint, history: History, whole: bool) -> None:
        """The run was resumed with the history of this checkpoint, or what is left of it where it is not `whole`."""
        assert checkpoint.path is not None
        parts = checkpoint.state.get("history_parts")
        if parts and whole:
            self._history = HistoryFile(checkpoint.path.parent, parts, len(history.events))
        self._live_changes, self._seen = live_change_lines(checkpoint), len(history.events)
        self.saved_step = checkpoint.step

    def kind_due(self, event: Event, autosave_minutes: float | None) -> str | None:
        """The kind of checkpoint to write after `event`, or None."""
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
    """How far a history is: its events, and those of them that no rewind left."""
    return {"events": len(history.events), "standing": len(history.standing)}


def _best_step(snapshot: Checkpoint) -> int | None:
    result: int | None = snapshot.state["trainer"]["best_step"]
    return result


def _with_best(snapshot: Checkpoint, best: dict[str, Any] | None) -> Checkpoint:
    """The snapshot with this adapter as that of its best update, or without one."""
    arrays = {name: group for name, group in snapshot.arrays.items() if name != "best"}
    return replace(snapshot, arrays=arrays if best is None else {**arrays, "best": best})


def _arrays(snapshot: Checkpoint) -> Iterator[Any]:
    for group in snapshot.arrays.values():
        yield from group.values()


def refuse_own_folder(config: RunConfig, folder: Path) -> None:
    """Raise ConfigError for a setting that names something in the run's own folder, which is moved when it starts."""
    from mlx_nb.model.adapter_files import REFERENCE, START
    from mlx_nb.model.reference_model import BARE

    for setting in (START, REFERENCE):
        path = config.located(setting)
        if path in (None, BARE):
            continue
        named = Path(os.path.realpath(os.path.expanduser(str(path))))
        if named.is_relative_to(os.path.realpath(folder)):
            raise ConfigError(
                f"{setting}: {getattr(config, setting)} lies in {folder}, which this run would write over. Give the "
                "run another `--name`, or another adapter_path."
            )


def _working_folder(config: RunConfig, run_folder: Path) -> dict[str, str] | None:
    """Where the relative paths of the settings begin: as a path, and as the way there from the run's folder."""
    if config.working_folder is None:
        return None
    way = os.path.relpath(config.working_folder, os.path.realpath(run_folder))
    return {"path": str(config.working_folder), "from_run": way}


def _remove_left_histories(store: CheckpointStore) -> None:
    """Remove the history files that no checkpoint needs any more; all stay where that cannot be told."""
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
    """A snapshot for a fork: no completions that other settings would have made."""
    arrays, state = snapshot.arrays, snapshot.state
    of_rollouts = [name for name in SETTINGS if SETTINGS[name].metadata["group"] == "rollouts"]
    if any(getattr(before, name) != getattr(after, name) for name in (*of_rollouts, "loss")):
        arrays, state = {**arrays, "feed": {}}, {**state, "feed": None}
    return replace(snapshot, arrays=arrays, state=state)


def differences(checkpoint: Checkpoint, trainer: Trainer, history: History) -> list[tuple[str, str]]:
    """(label, value) lines: a run as it is now against one of its checkpoints."""
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
    moved = sum(float(mx.square(end[name] - start[name]).sum()) for name in start)
    size = sum(float(mx.square(start[name]).sum()) for name in start)
    return [*lines, ("parameters moved", f"{100 * (moved / max(size, 1e-30)) ** 0.5:.2f}% of their norm")]
