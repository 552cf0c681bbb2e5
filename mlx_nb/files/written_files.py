"""Which files in a folder mlx_nb wrote: a list that grows with each write, and rules for files of older versions.

    .mlx_nb/written.jsonl     {"run": id, "name": ..., "kind": "run" or "export"}, then for each file that was written
                              {"file": name, "bytes": size, "sha256": digest}, the newest last

A file counts as our own if it has exactly the bytes that the list names. A user's file never does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_nb.errors import FolderError
from mlx_nb.files.folder_lock import LOCK_FILE, MARK, begins_as_ours
from mlx_nb.files.history_file import history_files, is_history
from mlx_nb.files.typed_json import WrongJson, json_object, read_as

LIST_FILE = "written.jsonl"
# Until all files of an earlier run are moved, these name the target in the source folder and the source in the target.
MOVING_FILE, ARRIVING_FILE = "moving", "arriving"
PREVIOUS = re.compile(r"(?:.+\.)?previous-\d+")  # the name of the folder that they are moved to
ADAPTER_FILE = "adapters.safetensors"
PEFT_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
BEST_FOLDER = "best"
CHECKPOINTS = "checkpoints"
REFERENCE_FILE = "reference_logprobs.safetensors"
REPORT_FILE = "report.html"
RUN, EXPORT = "run", "export"
NUMBERED = re.compile(rf"\d{{7,}}_{re.escape(ADAPTER_FILE)}")
SAVED = re.compile(r"save-\d{4,}-step-\d{7,}-[a-z][a-z_]*")
# The names under which a run writes.
TAKEN = (
    ADAPTER_FILE,
    CONFIG_FILE,
    f"{BEST_FOLDER}/{ADAPTER_FILE}",
    f"{BEST_FOLDER}/{CONFIG_FILE}",
    f"{CHECKPOINTS}/latest",
    REFERENCE_FILE,
)


@dataclass(frozen=True)
class ListHeader:
    """The first line of the list: whose files they are."""

    run: str
    name: str | None = None
    kind: str | None = None


@dataclass(frozen=True)
class WrittenEntry:
    """A line about a file that was written."""

    file: str
    bytes: int
    sha256: str


def heading(folder: Path) -> tuple[str, str, str] | None:
    """Id, name and kind of the run whose list is in `folder`; None if there is none."""
    try:
        with open(folder / MARK / LIST_FILE, "rb") as file:
            first = read_as(ListHeader, json_object(file.readline()), others=True)
    except (OSError, WrongJson):
        return None
    return None if first.name is None else (first.run, first.name, first.kind or RUN)


def run_in(folder: Path) -> tuple[str, str] | None:
    """Id and name of the run whose list is in `folder`; None if there is none."""
    found = heading(folder)
    return None if found is None else found[:2]


def not_ours_error(files: str) -> FolderError:
    """The error for a file that mlx_nb would write over but did not write itself."""
    return FolderError(
        f"{files} would be overwritten, but mlx_nb did not write it, or it was changed since. Nothing was moved. Give "
        "another `--name` or adapter_path."
    )


def foreign_marks(folder: Path) -> list[str]:
    """Files in `folder` that have the names of mlx_nb's bookkeeping files but are not ours, as names in it."""
    mark = folder / MARK
    if os.path.islink(mark) or not os.path.isdir(mark):
        return [MARK] if os.path.lexists(mark) else []
    foreign = [name for name in (LIST_FILE, LOCK_FILE) if not begins_as_ours(mark / name)]
    foreign += [name for name in (MOVING_FILE, ARRIVING_FILE) if not _is_note_of_move(mark / name, folder)]
    return [f"{MARK}/{name}" for name in foreign]


def _is_note_of_move(path: Path, folder: Path) -> bool:
    """Whether a file that names the target or source of a move of `folder` may be mlx_nb's."""
    if os.path.islink(path):
        return False
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    moved = Path(text) if path.name == MOVING_FILE else folder
    return not text or (Path(text).is_absolute() and "\n" not in text and bool(PREVIOUS.fullmatch(moved.name)))


class WrittenFiles:
    """The list of one folder, as it is on disk. `run` is the id of its run; None without a list."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.path = folder / MARK / LIST_FILE
        self.run: str | None = None
        self.name: str | None = None
        self.kind: str | None = None
        self._digests: dict[str, set[tuple[int, str]]] = {}
        for line in self._lines():
            if isinstance(line, ListHeader):
                self.run, self.name, self.kind = line.run, line.name, line.kind
            else:
                self._note(line.file, line.bytes, line.sha256)

    def _lines(self) -> Iterator[ListHeader | WrittenEntry]:
        """The entries of the list; lines that are no entries are skipped."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return
        for line in text.splitlines():
            with suppress(WrongJson):  # the process died while writing it
                entry = json_object(line.encode())
                yield read_as(
                    ListHeader if isinstance(entry, dict) and "run" in entry else WrittenEntry, entry, others=True
                )

    def begin(self, run: str, name: str, kind: str) -> None:
        """Start the list of the run `run`. Raises OSError, and FolderError if a file there is not ours."""
        self.run, self.name, self.kind = run, name, kind
        self._append({"run": run, "name": name, "kind": kind})

    def record(self, name: str, size: int, digest: str) -> None:
        """Record a file that is about to take its place. Raises as `begin` does."""
        self._note(name, size, digest)
        self._append({"file": name, "bytes": size, "sha256": digest})

    def _note(self, name: str, size: int, digest: str) -> None:
        """Move the name to the end: the order is that of the last writes."""
        others = {other: known for other, known in self._digests.items() if other != name}
        self._digests = {**others, name: {*self._digests.get(name, ()), (size, digest)}}

    def _append(self, entry: dict[str, Any]) -> None:
        if foreign := foreign_marks(self._folder):
            raise not_ours_error(str(self._folder / foreign[0]))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            end = file.seek(0, 2)
            if end:
                file.seek(end - 1)
                torn = file.read(1) != b"\n"
            file.write((b"\n" if end and torn else b"") + json.dumps(entry).encode() + b"\n")

    def adopt(self, run: str, name: str, kind: str) -> None:
        """Start the list of a run that is already there, written by a version that kept no list. Raises OSError."""
        found = _unlisted(self._folder)
        self.begin(run, name, kind)
        for file in found:
            self.record(file, *digest_of(self._folder / file))

    def holds(self, name: str, *, exact: bool = True) -> bool:
        """Whether the file `name` exists and was written by mlx_nb; without `exact`, compares its size only."""
        path = self._folder / name
        if self.run is None:
            return name in _unlisted(self._folder)
        known = self._digests.get(name)
        if not known or not path.is_file():
            return False
        size = path.stat().st_size
        return any(size == one for one, _ in known) and (not exact or digest_of(path) in known)

    def numbered(self) -> list[str]:
        """The existing numbered adapters that the list names, changed since or not, the newest last."""
        return [name for name in self._digests if NUMBERED.fullmatch(name) and (self._folder / name).is_file()]

    def own(self, *, exact: bool = True) -> list[str]:
        """Our own existing files and the folders of checkpoints, as names in the folder."""
        listed = [name for name in self._digests if self.holds(name, exact=exact)]
        names = _unlisted(self._folder) if self.run is None else listed
        return [*names, *_checkpoints(self._folder)]

    def in_the_way(self) -> list[str]:
        """Files that a run would write over and that are not our own."""
        found = []
        for name in (BEST_FOLDER, CHECKPOINTS):
            if (self._folder / name).exists() and not (self._folder / name).is_dir():
                found.append(name)
        own = set(self.own())
        with suppress(OSError):
            found += [
                one.name for one in self._folder.iterdir() if NUMBERED.fullmatch(one.name) and one.name not in own
            ]
        for name in TAKEN:
            path = self._folder / name
            if name not in own and (path.is_symlink() or _exists(path)):
                found.append(name)
        return found


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def digest_of(path: Path) -> tuple[int, str]:
    """The size in bytes and the SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _unlisted(folder: Path) -> list[str]:
    """Files of a version that kept no list: an adapter beside a configuration with our settings in it, and so on."""
    found = []
    for inner in ("", f"{BEST_FOLDER}/"):
        if inner and ((folder / inner / MARK).exists() or (folder / inner / CHECKPOINTS).exists()):
            continue  # a run with this name
        if not has_own_configuration(folder / inner):
            continue
        names = [CONFIG_FILE, ADAPTER_FILE]
        if not inner:
            names += sorted(path.name for path in folder.iterdir() if NUMBERED.fullmatch(path.name))
            names.append(REFERENCE_FILE)
        found += [inner + name for name in names if (folder / inner / name).is_file()]
    return found


def has_own_configuration(folder: Path) -> bool:
    """Whether the adapter in `folder` was written by mlx_nb, which stores its settings beside it."""
    try:
        return isinstance(json.loads((folder / CONFIG_FILE).read_bytes())["mlx_nb"]["settings"], dict)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _checkpoints(folder: Path) -> list[str]:
    """The complete checkpoints, the histories, and the pointer to the newest. Other files there are not ours."""
    inside = folder / CHECKPOINTS
    try:
        entries = sorted(inside.iterdir())
    except OSError:
        return []
    saved = [path for path in entries if SAVED.fullmatch(path.name) and (path / "manifest.json").is_file()]
    saved += [inside / name for name in sorted(history_files(inside)) if is_history(inside / name)]
    names = [f"{CHECKPOINTS}/{path.name}" for path in saved]
    latest = inside / "latest"
    if latest.is_file() and _is_pointer(latest):
        names.append(f"{CHECKPOINTS}/latest")
    return names


def has_whole_checkpoint(folder: Path) -> bool:
    """Whether a run wrote a checkpoint in `folder`."""
    return newest_checkpoint(folder) is not None


def newest_checkpoint(folder: Path) -> Path | None:
    """The folder of the newest checkpoint of the run in `folder`; None if there is none."""
    saved = [folder / name for name in _checkpoints(folder) if SAVED.fullmatch(name.rpartition("/")[2])]
    return max(saved, key=lambda path: int(path.name.split("-")[1]), default=None)


def _is_pointer(path: Path) -> bool:
    """Whether a file has the form `NAME SHA-256-OF-NAME`."""
    try:
        name, digest = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return False
    return hashlib.sha256(name.encode()).hexdigest() == digest
