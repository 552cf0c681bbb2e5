"""Lists and deletes the runs on disk, for `runs --disk` and `delete` in the notebook and the terminal."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from mlx_nb.errors import CommandError, FolderTaken, and_more, counted, did_you_mean
from mlx_nb.files.folder_lock import holder_of, is_locked
from mlx_nb.files.kept_runs import (
    END_IT_FIRST,
    KeptRun,
    delete_command,
    delete_own,
    kept_run,
    megabytes,
    others_in,
    own_files,
    runs_below,
)
from mlx_nb.files.places import run_folder, working_folder
from mlx_nb.files.written_files import RUN


def kept_text(further: Iterable[Path] = (), *, sizes: bool = True) -> str:
    """A table of the runs in adapters/ and in the folders `further`, with their size on disk."""
    runs = _kept(further)
    if not runs:
        return f"there are no runs in {working_folder() / 'adapters'}."
    table = [("folder", "run", "update", "on disk")]
    table += [(_short(run.folder), _words(run), _update(run), megabytes(run.bytes)) for run in runs]
    columns = range(4 if sizes else 3)
    widths = [max(len(row[column]) for row in table) for column in columns]
    lines = ["  ".join(row[column].ljust(widths[column]) for column in columns).rstrip() for row in table]
    if sizes:
        total = sum(run.bytes for run in runs)
        lines.append(f"{megabytes(total)} in total. {delete_command(Path('FOLDER'))} deletes one.")
    return "\n".join(lines)


def _kept(further: Iterable[Path] = ()) -> list[KeptRun]:
    below = list(runs_below(working_folder() / "adapters"))
    there = {os.path.realpath(run.folder) for run in below}
    others = {os.path.realpath(folder): folder for folder in further}
    found = [kept_run(folder) for real, folder in others.items() if real not in there]
    return [*below, *(run for run in found if run is not None)]


def _words(run: KeptRun) -> str:
    return run.name if run.kind == RUN else f"{run.name} (a saved copy of its adapter)"


def _update(run: KeptRun) -> str:
    return "-" if run.update is None else str(run.update)


def _short(folder: Path) -> str:
    here = working_folder()
    return str(folder.relative_to(here)) if folder.is_relative_to(here) and folder != here else str(folder)


def delete_named(name: str, *, yes: bool) -> str:
    """`delete_kept` for the name of a run, or the path of its folder. Also raises FolderError."""
    return delete_kept(run_folder(name, working_folder()), yes=yes)


def delete_kept(folder: Path, *, yes: bool) -> str:
    """Delete the files of the run in `folder`, and nothing else. Without `yes`, only describe what would be deleted.

    Raises CommandError if there is no run, and FolderTaken if a running one uses the folder.
    """
    run = kept_run(folder)
    if run is None:
        near = did_you_mean(_short(folder), [_short(one.folder) for one in _kept()])
        raise CommandError(f"there is no run in {folder}.{near} `runs --disk` lists the runs on disk.")
    if is_locked(folder):
        raise FolderTaken(f"{folder} is in use by {holder_of(folder)}, so nothing was deleted. {END_IT_FIRST}")
    own = own_files(folder)
    others = others_in(folder, own)
    what = f"{counted(len(own), 'file')} ({megabytes(sum(own.values()))}) of the run {run.name!r} in {folder}"
    stays = f" Files that mlx_nb did not write are kept: {and_more(others, 2)}." if others else ""
    if not yes:
        return f"This would delete {what}.{stays} To delete: {delete_command(folder)}"
    try:
        delete_own(folder)
    except OSError as error:
        raise CommandError(f"{folder} cannot be deleted: {error.strerror or error}. Try again.") from None
    return f"Deleted {what}.{stays}"
