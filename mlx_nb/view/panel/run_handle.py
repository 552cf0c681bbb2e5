"""The interface of a run that the panel uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import TokenBatch
from mlx_nb.data.examples.examples import Examples
from mlx_nb.events import Event, Question, Request, RunState
from mlx_nb.events.history import History


class SavedCheckpoint(Protocol):
    """A saved checkpoint of a run."""

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
        """Its size on disk."""

    @property
    def path(self) -> Path:
        """Its folder."""


class Progressing(Protocol):
    """The progress of a run."""

    tokens: int
    seconds: float


class TrainerHandle(Protocol):
    """The trainer of a run, as the panel uses it."""

    @property
    def iters(self) -> int:
        """Updates in the whole run."""

    @property
    def state(self) -> Progressing:
        """Its progress."""

    @property
    def validates(self) -> bool:
        """Whether the run validates."""

    def next_rows(self) -> tuple[int, ...]:
        """The rows of the next update."""

    def next_batches(self) -> list[TokenBatch]:
        """Its arrays."""


class Inputs(Protocol):
    """The inputs of a run."""

    def split(self, split: str) -> Examples:
        """The rows of a split as the model will see them. Raises CommandError or DataError if there are none."""


class RunHandle(Protocol):
    """A run as the panel uses it; `Run` documents each member."""

    name: str
    config: RunConfig
    history: History

    @property
    def inputs(self) -> Inputs:
        """Its model, tokenizer and rows."""

    @property
    def state(self) -> RunState:
        """Its state."""

    @property
    def keeps_a_cell(self) -> bool:
        """Whether a cell waits for it, so that clicks are not processed."""

    @property
    def active(self) -> bool:
        """Whether it is working in the background: training, or carrying out a request."""

    @property
    def cancellable(self) -> bool:
        """Whether requested sample answers or a requested validation are pending."""

    @property
    def trains(self) -> bool:
        """Whether the background work includes updates."""

    @property
    def prepared(self) -> bool:
        """Whether model and rows are loaded."""

    @property
    def over(self) -> bool:
        """Whether it has ended with no update left."""

    @property
    def step_count(self) -> int:
        """Updates done."""

    @property
    def folder(self) -> Path:
        """The folder where it saves."""

    @property
    def let_go(self) -> str:
        """Why it was released and cannot train or save; empty otherwise."""

    @property
    def failure(self) -> str:
        """Why it failed and what to do; empty if it did not fail."""

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""

    @property
    def trainer(self) -> TrainerHandle:
        """Its trainer."""

    def status(self) -> str:
        """Its status in a few lines of text."""

    def start(self, updates: int | None = None) -> None:
        """Train in the background."""

    def request(self, request: Request) -> None:
        """Request something for the next step boundary."""

    def ask(self, question: Question) -> None:
        """Answer a question at the next step boundary."""

    def set(self, **changes: Any) -> None:
        """Change live settings."""

    def row_losses(self, split: str = "train") -> dict[int, float]:
        """The latest loss of each row."""

    def token_losses(self, row: Any, *, base: bool = False, rejected: bool = False) -> Any:
        """The loss of each token of a row."""

    def log_ratios(self) -> list[tuple[int, Any, Any]]:
        """How the log-probabilities of the tokens of the last rollout have changed."""

    def checkpoints(self) -> Sequence[SavedCheckpoint]:
        """The checkpoints in its folder."""

    def delete_checkpoint(self, info: Any) -> None:
        """Delete a checkpoint."""

    def compare_checkpoint(self, info: Any) -> list[tuple[str, str]]:
        """Compare the current run with a checkpoint."""

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Call the listener with every event."""

    def unlisten(self, listener: Callable[[Event], None]) -> None:
        """Stop calling the listener."""
