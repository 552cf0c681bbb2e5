"""The events of a run as lines of an append-only file beside its checkpoints.

    checkpoints/
      history-0001.jsonl    one event a line, written by one process; its end may be cut off if that process dies

A checkpoint names the parts that make up its history, in order: {"file", "bytes", "lines", "sha256"}, each the first
`bytes` of a file and their digest. What follows in the file belongs to later updates, or to none. So the cost of a save
is proportional to the new events, and a run that is resumed anywhere, even twice, never changes what is there.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_nb.events import Event, event_from_json
from mlx_nb.files.typed_json import read_as
from mlx_nb.files.whole_files import sync, sync_folder

HISTORY_FILE = re.compile(r"history-(\d{4,})\.jsonl")
MOST_PARTS = 16  # a run that was resumed more often writes its history into one new file


class HistoryFile:
    """The history file that one run appends to.

    `parts` are earlier parts of a resumed run, with `events` events in all.
    The parts are in `folder`; a save to another folder writes everything there.
    """

    def __init__(self, folder: Path | None = None, parts: Sequence[dict[str, Any]] = (), events: int = 0) -> None:
        self._start_over(folder)
        if len(parts) < MOST_PARTS:
            self._earlier += parts
            self._events = events

    def _start_over(self, folder: Path | None) -> None:
        """Count nothing as written: all events go into a new file."""
        self._folder = folder
        self._earlier: list[dict[str, Any]] = []
        self._events = self._bytes = self._lines = 0  # all events that are written; size of the run's own file
        self._own: Path | None = None
        self._digest = hashlib.sha256()

    def save(self, events: Sequence[Event], folder: Path) -> list[dict[str, Any]]:
        """Append the new ones of all `events` of the run to `folder`, which exists, and flush. Returns the parts.

        Raises OSError; then nothing has changed.
        """
        if folder != self._folder or not self._is_there():
            self._start_over(folder)
        lines = "".join(event.to_json() + "\n" for event in events[self._events :])
        if lines:
            self._append(lines.encode(), len(events) - self._events, folder)
        return self.parts

    @property
    def parts(self) -> list[dict[str, Any]]:
        """The parts of the history, as a checkpoint stores them."""
        if self._own is None:
            return list(self._earlier)
        own = {
            "file": self._own.name,
            "bytes": self._bytes,
            "lines": self._lines,
            "sha256": self._digest.hexdigest(),
        }
        return [*self._earlier, own]

    def _is_there(self) -> bool:
        """Whether the files still have the sizes they were left with: none was moved away or cut."""
        assert self._folder is not None
        try:
            sizes = [(self._folder / part["file"]).stat().st_size for part in self.parts]
        except OSError:
            return False
        enough = all(size >= part["bytes"] for size, part in zip(sizes, self.parts))
        return enough and (self._own is None or sizes[-1] == self._bytes)

    def _append(self, content: bytes, events: int, folder: Path) -> None:
        path = self._own or _next_file(folder)
        try:
            with path.open("ab") as file:
                file.write(content)
                file.flush()
                sync(file.fileno())
            if self._own is None:
                sync_folder(folder)
        except BaseException:
            with suppress(OSError):
                os.truncate(path, self._bytes)
                if self._own is None:
                    path.unlink()
            raise
        self._own = path
        self._digest.update(content)
        self._lines += events
        self._events += events
        self._bytes += len(content)  # last: an interrupt before it is detected by the size


def history_files(folder: Path) -> set[str]:
    """The names of the history files in a folder."""
    return {path.name for path in folder.glob("history-*.jsonl") if HISTORY_FILE.fullmatch(path.name)}


def is_history(path: Path) -> bool:
    """Whether a file with such a name is a history and not a user's file: empty, or with an event in its first line."""
    try:
        with path.open("rb") as file:
            first = file.readline()
    except OSError:
        return False
    return not first or bool(list(_readable(first)))


def read_history(folder: Path, parts: Any) -> tuple[list[str], list[str]]:
    """The lines of the history that a checkpoint in `folder` names, and what is wrong with it, in words.

    If it is damaged, the lines before the damage are returned. Training does not depend on them.
    """
    lines: list[str] = []
    for part in parts:
        content, problem = _read_part(folder, part)
        lines += content
        if problem:
            return lines, [f"{problem}. What was trained is whole; of its history the first {len(lines)} events are."]
    return lines, []


def _read_part(folder: Path, part: dict[str, Any]) -> tuple[list[str], str]:
    """The readable lines of a part, and what is wrong with it."""
    name, size = part["file"], part["bytes"]
    try:
        with (folder / name).open("rb") as file:
            content = file.read(size)
    except OSError as error:
        return [], f"{name}: {error.strerror}"
    if len(content) == size and hashlib.sha256(content).hexdigest() == part["sha256"]:
        return content.decode().splitlines(), ""
    whole = content[: content.rfind(b"\n") + 1]
    problem = (
        f"{name} has {len(content)} bytes of {size}"
        if len(content) < size
        else f"{name} was changed after it was written"
    )
    return list(_readable(whole)), problem


def _readable(content: bytes) -> Iterator[str]:
    """The lines before the first one that is not an event."""
    for line in content.splitlines():
        try:
            text = line.decode()
            event = event_from_json(text)
            read_as(type(event), vars(event))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return
        yield text


def _next_file(folder: Path) -> Path:
    """Create the next, empty history file."""
    numbers = [int(name.removeprefix("history-").removesuffix(".jsonl")) for name in history_files(folder)]
    path = folder / f"history-{max(numbers, default=0) + 1:04d}.jsonl"
    path.open("xb").close()
    return path
