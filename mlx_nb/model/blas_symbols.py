"""Redirects the BLAS calls of an already loaded mlx to another BLAS. Linux on x86-64 and ARM. Does not import mlx.

A loaded library calls functions of other libraries through a table of addresses that the loader fills in. Replacing the
entry of `cblas_sgemm` with OpenBLAS's address has the same effect as loading OpenBLAS first.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

_PREFIX = b"cblas_"
# Relocation types of entries that hold a function address: JUMP_SLOT and GLOB_DAT.
_ADDRESS_KINDS = {"x86_64": (7, 6), "aarch64": (1026, 1025)}
_STRINGS, _SYMBOLS, _JUMPS, _JUMPS_BYTES, _ENTRIES, _ENTRIES_BYTES = 5, 6, 23, 2, 7, 8
_ENTRY, _SYMBOL_BYTES = struct.Struct("<QQq"), 24
_READ, _WRITE = 1, 2


class _LinkMap(ctypes.Structure):
    """The beginning of the loader's `struct link_map`: load address, name, dynamic section."""

    _fields_ = (("base", ctypes.c_size_t), ("name", ctypes.c_char_p), ("dynamic", ctypes.c_size_t))


def redirect_blas_calls(mlx: object, blas: ctypes.CDLL) -> int:
    """Redirect the matrix products of the loaded module `mlx.core` to `blas`. Returns the number of functions.

    Raises OSError with a readable message if that is not possible. Functions that were redirected before the
    error stay redirected.
    """
    kinds = _ADDRESS_KINDS.get(platform.machine())
    if kinds is None or sys.maxsize < 2**32 or sys.byteorder != "little":
        raise OSError(f"not possible on {platform.machine()}")
    slots = {}
    for path in _libraries(Path(str(getattr(mlx, "__file__", "")))):
        try:
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        except OSError:
            continue  # exists, but is not loaded
        for name, address in _slots(_LinkMap.from_address(library._handle), kinds):
            if hasattr(blas, name):
                slots[address] = ctypes.cast(getattr(blas, name), ctypes.c_void_p).value or 0
    if not slots:
        raise OSError("this mlx resolves no matrix product by name")
    writable = {address: _is_writable(address) for address in slots}
    for address, function in slots.items():
        _write(address, function, protected=not writable[address])
    return len(slots)


def _libraries(module: Path) -> list[Path]:
    """The libraries that may contain mlx's matrix products: libmlx.so, or the module itself in a single-file build."""
    return [path for path in (module.parent / "lib" / "libmlx.so", module) if path.is_file()]


def _slots(library: _LinkMap, kinds: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    """(function name, address of its table entry) of each BLAS function that the library calls."""
    found = _dynamic_section(library)
    if not {_STRINGS, _SYMBOLS} <= found.keys():
        return
    for table, size in ((_JUMPS, _JUMPS_BYTES), (_ENTRIES, _ENTRIES_BYTES)):
        if table not in found:
            continue
        for offset, info, _ in _ENTRY.iter_unpack(ctypes.string_at(found[table], found.get(size, 0))):
            symbol = info >> 32
            if info & 0xFFFFFFFF not in kinds or not symbol:
                continue
            at = ctypes.c_uint32.from_address(found[_SYMBOLS] + symbol * _SYMBOL_BYTES).value
            name = ctypes.string_at(found[_STRINGS] + at)
            if name.startswith(_PREFIX):
                yield name.decode(), library.base + offset


def _dynamic_section(library: _LinkMap) -> dict[int, int]:
    """The dynamic section as tag -> value. Addresses are made absolute, which not every loader does."""
    pairs = ctypes.POINTER(ctypes.c_uint64).from_buffer(ctypes.c_size_t(library.dynamic))
    found = {}
    for index in range(0, 4096, 2):
        tag, value = pairs[index], pairs[index + 1]
        if tag == 0:
            break
        is_address = tag in (_STRINGS, _SYMBOLS, _JUMPS, _ENTRIES)
        found[tag] = value + library.base if is_address and value < library.base else value
    return found


def _is_writable(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions = line.split()[:2]
        first, end = (int(part, 16) for part in span.split("-"))
        if first <= address < end:
            return "w" in permissions
    raise OSError("its function table was not found")


def _write(address: int, function: int, *, protected: bool) -> None:
    """Write a table entry atomically: other threads see the old address or the new one."""
    size = os.sysconf("SC_PAGE_SIZE")
    page = ctypes.c_void_p(address - address % size)
    process = ctypes.CDLL(None, use_errno=True)
    if protected and process.mprotect(page, ctypes.c_size_t(size), _READ | _WRITE):
        raise OSError(f"its function table is locked ({os.strerror(ctypes.get_errno())})")
    ctypes.c_size_t.from_address(address).value = function
    if protected:
        process.mprotect(page, ctypes.c_size_t(size), _READ)
