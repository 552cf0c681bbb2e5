"""Decompresses whole files into temporary files that vanish with their last reader."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tempfile
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from mlx_nb.errors import DataError


def _zstandard(path: Path) -> Any:
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


# By extension: the first bytes of such a file, and its reader.
_COMPRESSIONS: dict[str, tuple[bytes, Callable[[Path], Any]]] = {
    ".gz": (b"\x1f\x8b", gzip.GzipFile),
    ".zst": (b"\x28\xb5\x2f\xfd", _zstandard),
    ".bz2": (b"BZh", bz2.BZ2File),
    ".xz": (b"\xfd7zXZ\x00", lzma.LZMAFile),
}
_SKIPPABLE_FRAME = b"\x2a\x4d\x18"


def row_endings(path: Path) -> tuple[str, str]:
    """The extension that tells the format of the rows, and that of the compression ("" without one)."""
    if path.suffix not in _COMPRESSIONS:
        return path.suffix, ""
    return Path(path.stem).suffix, path.suffix


def bare_name(path: Path) -> str:
    """The name of a file of rows without these extensions: `train` for `train.jsonl.gz`."""
    return path.name.removesuffix("".join(row_endings(path)))


def compression_of(start: bytes) -> str | None:
    """The extension that a file with these first bytes should have; None if it is not compressed."""
    if start[1:4] == _SKIPPABLE_FRAME and start[0] >> 4 == 5:
        return ".zst"
    return next((ending for ending, (magic, _) in _COMPRESSIONS.items() if start.startswith(magic)), None)


def decompressed(path: Path) -> IO[bytes]:
    """The content of a compressed file, positioned at its start.

    It is on disk, so memory does not grow with the file. Raises DataError if the file is damaged or cut off, OSError if
    it or the temporary folder cannot be used.
    """
    _, read = _COMPRESSIONS[path.suffix]
    with ExitStack() as on_failure:
        content = on_failure.enter_context(tempfile.TemporaryFile())
        with read(path) as stream:
            while block := _next_block(stream, path):
                content.write(block)
        on_failure.pop_all()
    content.seek(0)
    return content


def _next_block(stream: Any, path: Path) -> bytes:
    """The next bytes. Only decompression errors are blamed on the file, not a full disk."""
    try:
        return bytes(stream.read(1 << 20))
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise DataError(
            f"{path.name} is damaged, or its download is incomplete ({reason}). Download it again."
        ) from None
