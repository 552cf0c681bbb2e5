"""Matrix products of an mlx that is loaded already, answered by another BLAS. Linux on x86-64 and ARM. Imports no mlx.

A loaded library calls a function of another one through a table of addresses, which the loader filled in. An entry
for `cblas_sgemm` that is given the address of OpenBLAS's own is what loading OpenBLAS first would have made of it.
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
# Kinds of an entry that holds the address of a function: a jump slot, and one that is filled in when loading.
_ADDRESS_KINDS = {"x86_64": (7, 6), "aarch64": (1026, 1025)}
_STRINGS, _SYMBOLS, _JUMPS, _JUMPS_BYTES, _ENTRIES, _ENTRIES_BYTES = 5, 6, 23, 2, 7, 8
_ENTRY, _SYMBOL_BYTES = struct.Struct("<QQq"), 24
_READ, _WRITE = 1, 2


class _LinkMap(ctypes.Structure):
    """The head of what the loader knows of a library: where it lies, its name, its dynamic section."""

    _fields_ = (("base", ctypes.c_size_t), ("name", ctypes.c_char_p), ("dynamic", ctypes.c_size_t))


def redirect_products(mlx: object, blas: ctypes.CDLL) -> int:
    """Have the matrix products of the loaded module `mlx.core` answered by `blas`. Returns the functions redirected.

    Raises OSError, in words for a person, where that is not possible; nothing has changed then.
    """
    kinds = _ADDRESS_KINDS.get(platform.machine())
    if kinds is None or sys.maxsize < 2**32 or sys.byteorder != "little":
        raise OSError(f"not possible on {platform.machine()}")
    slots = {}
    for path in _libraries(Path(str(getattr(mlx, "__file__", "")))):
        try:
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        except OSError:
            continue  # there, but not what mlx runs on
        for name, address in _slots(_LinkMap.from_address(library._handle), kinds):
            if hasattr(blas, name):
                slots[address] = ctypes.cast(getattr(blas, name), ctypes.c_void_p).value or 0
    if not slots:
        raise OSError("this mlx looks up no matrix product by name")
    writable = {address: _is_writable(address) for address in slots}
    for address, function in slots.items():
        _write(address, function, protected=not writable[address])
    return len(slots)


def _libraries(module: Path) -> list[Path]:
    """What of mlx may hold its matrix products: libmlx.so, or the module itself where it is all in one."""
    return [path for path in (module.parent / "lib" / "libmlx.so", module) if path.is_file()]


def _slots(library: _LinkMap, kinds: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    """(function, address of its entry) of each BLAS function that the library calls."""
    found = _dynamic_section(library)
    if not {_STRINGS, _SYMBOLS} <= found.keys():
        return
    for table, size in ((_JUMPS, _JUMPS_BYTES), (_ENTRIES, _ENTRIES_BYTES)):
        if table not in found:
            continue
        for offset, information, _ in _ENTRY.iter_unpack(ctypes.string_at(found[table], found.get(size, 0))):
            symbol = information >> 32
            if information & 0xFFFFFFFF not in kinds or not symbol:
                continue
            at = ctypes.c_uint32.from_address(found[_SYMBOLS] + symbol * _SYMBOL_BYTES).value
            name = ctypes.string_at(found[_STRINGS] + at)
            if name.startswith(_PREFIX):
                yield name.decode(), library.base + offset


def _dynamic_section(library: _LinkMap) -> dict[int, int]:
    """Tag to value; addresses as they are in memory, which not every loader has written down so."""
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
        span, rights = line.split()[:2]
        first, end = (int(part, 16) for part in span.split("-"))
        if first <= address < end:
            return "w" in rights
    raise OSError("its table of functions was not found")


def _write(address: int, function: int, *, protected: bool) -> None:
    """Other threads that call the function meanwhile find the old address or the new one."""
    size = os.sysconf("SC_PAGE_SIZE")
    page = ctypes.c_void_p(address - address % size)
    process = ctypes.CDLL(None, use_errno=True)
    if protected and process.mprotect(page, ctypes.c_size_t(size), _READ | _WRITE):
        raise OSError(f"its table of functions is locked ({os.strerror(ctypes.get_errno())})")
    ctypes.c_size_t.from_address(address).value = function
    if protected:
        process.mprotect(page, ctypes.c_size_t(size), _READ)
