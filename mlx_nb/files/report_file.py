"""A report of a run as a file: written whole, over an earlier report of the same run only."""

from __future__ import annotations

from html import escape
from pathlib import Path

from mlx_nb.errors import CommandError
from mlx_nb.files.whole_files import write_whole


def report_mark(name: str) -> str:
    """What says in a page that it is a report of the run `name`."""
    return f'<meta name="generator" content="mlx_nb: {escape(name, quote=True)}">'


def write_report(path: Path, page: str, name: str) -> Path:
    """Write the page whole or not at all, over an earlier one of the same run only. Returns the path.

    Raises CommandError, naming a file that is free where this one is somebody else's.
    """
    try:
        if path.is_dir() or (path.exists() and not _is_report(path, name)):
            there = "a folder" if path.is_dir() else f"not a report of {name}, so it is not written over"
            raise CommandError(f"{path} is {there}. Give another name, such as {_free(path)}.")
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
    """A name like this one that is not taken."""
    ending = ".html" if path.is_dir() else path.suffix
    number = 2
    while (free := path.with_name(f"{path.stem}-{number}{ending}")).exists():
        number += 1
    return free
