"""What the panel needs of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import TokenBatch
from mlx_nb.data.examples.split import Examples
from mlx_nb.events import Event, Question, Request, RunState
from mlx_nb.events.history import History


class SavedCheckpoint(Protocol):
    """A checkpoint in the list of a run."""

    @property
    def save(self) -> int:
        """Its number among the saves of the run."""

    @property
    def step(self) -> int:
        """The update that it was written after."""

    @property
    def kind(self) -> str:
        """Why it was written."""

    @property
    def time(self) -> float:
        """When, in seconds since 1970."""

    @property
    def bytes(self) -> int:
        """What it takes on disk."""

    @property
    def path(self) -> Path:
        """Its folder."""


class Progressing(Protocol):
    """How far a run is."""

    tokens: int
    seconds: float


class TrainerHandle(Protocol):
    """What trains a run, as the panel sees it."""

    @property
    def iters(self) -> int:
        """Updates in the whole run."""

    @property
    def state(self) -> Progressing:
        """How far it is."""

    @property
    def validates(self) -> bool:
        """Whether the run measures validation rows by itself."""

    def next_rows(self) -> tuple[int, ...]:
        """The rows of the next update."""

    def next_batches(self) -> list[TokenBatch]:
        """Its arrays."""


class Inputs(Protocol):
    """What a run is made from."""

    def split(self, split: str) -> Examples:
        """The rows of a split as the model will see them. Raises CommandError or DataError where there are none."""


class RunHandle(Protocol):
    """A run as the panel sees it; `Run` says what each of these is."""

    name: str
    config: RunConfig
    history: History

    @property
    def inputs(self) -> Inputs:
        """What it is made from."""

    @property
    def state(self) -> RunState:
        """What it is doing."""

    @property
    def keeps_a_cell(self) -> bool:
        """Whether a cell waits for it, so that no click arrives."""

    @property
    def active(self) -> bool:
        """Whether it moves in the background: it trains, or does what was asked of it."""

    @property
    def cancellable(self) -> bool:
        """Whether answers to kept prompts, or a validation that was asked for, are due now."""

    @property
    def trains(self) -> bool:
        """Whether updates are to come while it moves."""

    @property
    def prepared(self) -> bool:
        """Whether model and rows are loaded."""

    @property
    def over(self) -> bool:
        """Whether it has ended and no update is left."""

    @property
    def step_count(self) -> int:
        """Updates done."""

    @property
    def folder(self) -> Path:
        """Where it saves."""

    @property
    def let_go(self) -> str:
        """Why it trains and saves no more; empty while it may."""

    @property
    def failure(self) -> str:
        """Why it failed and what can be done; empty while it has not."""

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""

    @property
    def trainer(self) -> TrainerHandle:
        """What it is trained by."""

    def status(self) -> str:
        """It in a few lines of text."""

    def start(self, updates: int | None = None) -> None:
        """Train in the background."""

    def request(self, request: Request) -> None:
        """Ask for something at the next boundary."""

    def ask(self, question: Question) -> None:
        """Have a question answered at the next boundary."""

    def set(self, **changes: Any) -> None:
        """Change live settings."""

    def row_losses(self, split: str = "train") -> dict[int, float]:
        """The latest loss of each row."""

    def token_losses(self, row: Any, *, base: bool = False, rejected: bool = False) -> Any:
        """The loss of each token of a row."""

    def log_ratios(self) -> list[tuple[int, Any, Any]]:
        """How much likelier the tokens of the last rollout have become."""

    def checkpoints(self) -> Sequence[SavedCheckpoint]:
        """Those in its folder."""

    def delete_checkpoint(self, info: Any) -> None:
        """Remove one."""

    def compare_checkpoint(self, info: Any) -> list[tuple[str, str]]:
        """The run as it is now against one."""

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Be told every event."""

    def unlisten(self, listener: Callable[[Event], None]) -> None:
        """Be told no more."""
