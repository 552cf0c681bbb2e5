"""The report of a run as a file: written atomically, and only over an earlier report of the same run."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from typing import Any

from mlx_nb.errors import CommandError, FolderError, shown
from mlx_nb.files.places import free_name, path_problem, refuse_among_files, same_folder, working_folder
from mlx_nb.files.whole_files import write_whole
from mlx_nb.files.written_files import REPORT_FILE

_LONGEST_PARTIAL = 16  # bytes that a file name grows by while it is written


class ReportPath(type(Path())):  # type: ignore[misc]
    """The path of a report, displayed as a link in a notebook."""

    def _repr_html_(self) -> str:
        target = self.relative_to(Path.cwd()) if self.is_relative_to(Path.cwd()) else self
        return f'<a href="{escape(str(target), quote=True)}" target="_blank">{escape(str(self))}</a>'

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(str(self))


def report_mark(name: str) -> str:
    """The tag that marks a page as a report of the run `name`."""
    return f'<meta name="generator" content="mlx_nb: {escape(name, quote=True)}">'


def report_path(path: str | Path, name: str, folder: Path) -> Path:
    """The absolute path for a report of the run `name` in `folder` that the user wants at `path`.

    Raises CommandError for an impossible path, and for a file that is not a report of this run, naming a free one.
    """
    try:
        absolute = working_folder() / Path(path).expanduser()
        if problem := path_problem(absolute, below=_LONGEST_PARTIAL):
            raise CommandError(f"{shown(str(path))} cannot be a file: {problem}. Name another file.")
        if not _is_default(absolute, folder):
            refuse_among_files(absolute, folder)
            _refuse_taken(absolute, name)
        return absolute
    except FolderError as error:
        raise CommandError(str(error)) from None
    except (OSError, RuntimeError, TypeError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise CommandError(f"{shown(str(path))} cannot be written: {reason}. Name another file.") from None


def _is_default(path: Path, folder: Path) -> bool:
    """Whether it is the run's default report, by whatever path."""
    return path.name == REPORT_FILE and same_folder(path.parent, folder)


def _refuse_taken(path: Path, name: str) -> None:
    if os.path.islink(path):
        there = "a link, so it is not overwritten"
    elif path.is_dir():
        there = "a folder"
    elif path.exists() and not _is_report(path, name):
        there = f"not a report of {name}, so it is not overwritten"
    else:
        return
    raise CommandError(f"{path} is {there}. Give another name, such as {_free(path)}.")


def write_report(path: Path, page: str, name: str) -> Path:
    """Write the page atomically, over an earlier report of the same run only. Returns the path.

    Raises CommandError if the file there is not a report of this run, naming a free one.
    """
    try:
        _refuse_taken(path, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: file.write(page.encode()))
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror or error}. Name another file.") from None
    return path


def _is_report(path: Path, name: str) -> bool:
    mark = report_mark(name).encode()
    with path.open("rb") as file:
        return mark in file.read(1000 + len(mark))


def _free(path: Path) -> Path:
    """A name like this one that is free."""
    return free_name(path.with_suffix(".html") if path.is_dir() else path)
