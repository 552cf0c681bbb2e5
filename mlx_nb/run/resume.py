"""Resuming a run: locks its folder and restores the requests that were pending."""

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


class ResumedRun(Protocol):
    """The interface of a run that restoring requests needs."""

    def set(self, **changes: Any) -> None:
        """Change live settings."""

    def request(self, request: Request) -> None:
        """Queue a request for the next boundary."""

    def place_of(self, target: int) -> Checkpoint:
        """The saved state of update `target`. Raises CommandError if there is none."""


def folder_to_resume(folder: Path) -> RunFolder:
    """Lock the folder of a run that is about to be resumed.

    If another run of this process holds it, that run is saved and released first.
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
    """Folder name -> newest saved update, for each run in `parent` that has a checkpoint."""
    from mlx_nb.train.checkpoint_store import CheckpointStore

    found = {}
    for folder in sorted(parent.glob(f"*/{CHECKPOINTS}")):
        if checkpoints := CheckpointStore(folder, 1).list():
            found[folder.parent.name] = max(one.step for one in checkpoints)
    return found


def restore_requests(run: ResumedRun, requests: Sequence[Request]) -> Iterator[str]:
    """Queue the pending requests of the checkpoint again. Yields one line for each that is no longer possible."""
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
            yield f"a pending request was dropped, {_in_words(request)}: {error}"


def _in_words(request: Request) -> str:
    match request:
        case ChangeSetting(name, value):
            return f"{name}={value}"
        case Rewind(to):
            return f"rewind to update {to}"
        case _:
            return type(request).__name__.lower()
