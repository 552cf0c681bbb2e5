"""What a checkpoint says of its run: every key with the kind of its value, and a seal on each."""

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
    """Where the relative paths of the settings began: as a path, and as the way there from the run's folder."""

    path: str
    from_run: str


@dataclass(frozen=True)
class RolloutBatch:
    """The rows and the lengths of a batch of completions, whose arrays are in the group `feed`."""

    rows: list[int]
    lengths: list[int]
    packed: bool = False


@dataclass(frozen=True)
class RolloutState:
    """The completions that the next `updates_left` updates are made with."""

    batches: list[RolloutBatch]
    updates_left: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class RunRecord:
    """`state.json` of a checkpoint. What has a default came later: an older mlx_nb wrote checkpoints without it, and
    those have no seal."""

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
    """The record in the state of a checkpoint. Raises WrongJson with the key, what is there and what belongs there."""
    if isinstance(state, Mapping) and isinstance(trainer := state.get("trainer"), Mapping):
        losses = trainer.get("recent_losses")
        if isinstance(losses, list):  # checkpoints from before had plain losses, which belong to no length
            losses = [one for one in losses if isinstance(one, bool) or not isinstance(one, int | float)]
            state = {**state, "trainer": {**trainer, "recent_losses": losses}}
    record: RunRecord = read_as(RunRecord, state, others=True)
    return record


def sealed(state: dict[str, Any]) -> dict[str, Any]:
    """The state with the SHA-256 of each of its values, by key."""
    return {**state, SEAL: {key: _digest(value) for key, value in state.items()}}


def check_seal(state: Mapping[str, Any]) -> None:
    """Raise WrongJson for a key that is not as it was written. A state without a seal is of an older mlx_nb."""
    if SEAL not in state:
        return
    seals = read_as(dict[str, str], state[SEAL], SEAL)
    for key in sorted({*seals, *state} - {SEAL}):
        if key not in state:
            raise WrongJson(f"no {key!r}")
        if key not in seals:
            raise WrongJson(f"{key!r} was put there later")
        if seals[key] != _digest(state[key]):
            raise WrongJson(f"`{key}` is not as it was written")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
