"""The schema of `state.json` in a checkpoint: every key with its type, and a digest of each value."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_nb.data.examples.batches import Place
from mlx_nb.events import RunFinished
from mlx_nb.files.typed_json import WrongJson, read_as
from mlx_nb.train.state import TrainerState

SEAL = "seal"
Fingerprint = str | int | list[str] | list[list[str]] | dict[str, str]
Due = tuple[Literal["start", "validate", "sample", "save", "test", "memory", "spike", "idle", "finish"], str]


@dataclass(frozen=True)
class HistoryPart:
    """The first `bytes` of a history file (see history_file)."""

    file: str
    bytes: int
    lines: int
    sha256: str


@dataclass(frozen=True)
class WorkingFolder:
    """The folder that relative paths in the settings refer to: absolute, and relative to the run's folder."""

    path: str
    from_run: str


@dataclass(frozen=True)
class RolloutBatch:
    """The rows and lengths of a batch of completions. Its arrays are in the group `feed`."""

    rows: list[int]
    lengths: list[int]
    packed: bool = False


@dataclass(frozen=True)
class RolloutState:
    """The completions for the next `updates_left` updates."""

    batches: list[RolloutBatch]
    updates_left: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class RunRecord:
    """`state.json` of a checkpoint. Fields with defaults are missing in checkpoints of older versions of mlx_nb, which
    have no digests either."""

    name: str
    config: dict[str, Any]
    made_from: dict[str, Fingerprint]
    trainer: TrainerState
    due: list[Due]
    started: bool
    finished: RunFinished | None
    standing: int
    history: list[str]
    events: int = 0
    place: Place | None = None
    feed: RolloutState | None = None
    asked: list[str] = field(default_factory=list)
    history_parts: list[HistoryPart] = field(default_factory=list)
    live_changes: list[str] | None = None
    working_folder: WorkingFolder | None = None


def read_record(state: Any) -> RunRecord:
    """The record in the state of a checkpoint. Raises WrongJson with the key, its value and the expected type."""
    if isinstance(state, Mapping) and isinstance(trainer := state.get("trainer"), Mapping):
        losses = trainer.get("recent_losses")
        if isinstance(losses, list):  # older checkpoints have losses without a length class
            losses = [one for one in losses if isinstance(one, bool) or not isinstance(one, int | float)]
            state = {**state, "trainer": {**trainer, "recent_losses": losses}}
    record: RunRecord = read_as(RunRecord, state, others=True)
    return record


def sealed(state: dict[str, Any]) -> dict[str, Any]:
    """The state with the SHA-256 of each value added, by key."""
    return {**state, SEAL: {key: _digest(value) for key, value in state.items()}}


def check_seal(state: Mapping[str, Any]) -> None:
    """Raise WrongJson for a key whose value was changed. States of older versions have no digests and pass."""
    if SEAL not in state:
        return
    seals = read_as(dict[str, str], state[SEAL], SEAL)
    for key in sorted({*seals, *state} - {SEAL}):
        if key not in state:
            raise WrongJson(f"no {key!r}")
        if key not in seals:
            raise WrongJson(f"{key!r} was added later")
        if seals[key] != _digest(state[key]):
            raise WrongJson(f"`{key}` was changed after it was written")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
