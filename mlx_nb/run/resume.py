"""A run that is taken up again: its folder, and what had been asked of it and was not done yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlx_nb.errors import MlxNbError
from mlx_nb.events import ChangeSetting, Request, Rewind
from mlx_nb.files.run_folder import RunFolder, holder_in_process
from mlx_nb.files.written_files import CHECKPOINTS

if TYPE_CHECKING:
    from mlx_nb.train.checkpoint import Checkpoint


class Askable(Protocol):
    """A run as it is asked."""

    def set(self, **changes: Any) -> None:
        """Change live settings."""

    def request(self, request: Request) -> None:
        """Ask for something at the next boundary."""

    def place_of(self, target: int) -> Checkpoint:
        """The state of an update to go back to. Raises CommandError where there is none."""


def home_to_resume(folder: Path) -> RunFolder:
    """The folder of a run that is to be resumed, before anything in it is read.

    A run of this process that holds it and is not saved is saved, and writes there no more.
    """
    before = holder_in_process(folder)
    if before is not None and not before.at_rest():
        before.let_go(f"{folder} was taken over by the same run, resumed in this process")
    home = RunFolder(folder, folder.name)
    if (folder / CHECKPOINTS).is_dir():
        home.share()
        home.adopt()
    return home


def resumable(parent: Path) -> dict[str, int]:
    """The runs in the folders of `parent` that have a checkpoint, by folder name, with their newest update."""
    from mlx_nb.train.checkpoint import CheckpointStore

    found = {}
    for folder in sorted(parent.glob(f"*/{CHECKPOINTS}")):
        if checkpoints := CheckpointStore(folder, 1).list():
            found[folder.parent.name] = max(one.step for one in checkpoints)
    return found


def ask_again(run: Askable, requests: Sequence[Request]) -> Iterator[str]:
    """Take up what had been asked before a resume. What is not possible any more is said, a line for each."""
    for request in requests:
        try:
            if isinstance(request, ChangeSetting):
                run.set(**{request.name: request.value})
            elif isinstance(request, Rewind):
                run.place_of(request.to)
                run.request(request)
            else:
                run.request(request)
        except MlxNbError as error:
            yield f"what had been asked and was not done yet is lost, {_in_words(request)}: {error}"


def _in_words(request: Request) -> str:
    match request:
        case ChangeSetting(name, value):
            return f"{name}={value}"
        case Rewind(to):
            return f"to go back to update {to}"
        case _:
            return type(request).__name__.lower()
