"""Available memory, out-of-memory errors of mlx, and the memory limits that are set while a run computes."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from mlx_nb.errors import OutOfMemory
from mlx_nb.model.backend import is_cpu, memory_limit

# Error messages of Metal, CUDA and mlx's allocators.
_WORDS = re.compile(
    r"insufficient ?memory|out ?of ?memory|unable to allocate|attempting to allocate|failed to allocate"
    r"|cannot allocate memory|memory ?allocation|bad_alloc",
    re.IGNORECASE,
)
_CACHED_SHARE = 4  # mlx's cache of freed arrays is limited to 1 / this of a GPU's memory

# mallopt parameters for how much freed memory glibc keeps, and the values it adapts to with large arrays.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_THRESHOLD: 2**30}
_USUAL = {_TRIM_THRESHOLD: 64 * 1024**2, _MMAP_THRESHOLD: 32 * 1024**2}
_USER_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")

_holding = threading.Lock()
_holders = 0
_limits_before: dict[str, int] = {}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error of mlx means that an allocation failed."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_WORDS.search(str(error))))


@contextmanager
def memory_errors(doing: str, advice: str) -> Iterator[None]:
    """A context that turns a failed allocation into OutOfMemory, with what was being done and advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"memory ran out while {doing} ({' '.join(str(error).split())}). {advice}") from error


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be allocated now: on a GPU within its limit, on a CPU within those of machine, cgroup and ulimit.

    `root` is the folder that contains /proc and /sys.
    """
    if not is_cpu():
        return max(0, memory_limit() - mx.get_active_memory())
    found = [_free_in_machine(root), *_free_in_groups(root), _free_in_address_space(root)]
    return min([size for size in found if size is not None], default=memory_limit())


def shortage(needed: int, available: int | None = None) -> str | None:
    """A message if more bytes are needed than available; otherwise None."""
    free = available_memory() if available is None else available
    if needed <= free:
        return None
    return f"needs at least {gigabytes(needed)}, and {gigabytes(free)} are available"


def gigabytes(size: int) -> str:
    """A number of bytes as text, in GB."""
    return f"{size / 1e9:,.{1 if size >= 1e9 else 3}f} GB"


def _free_in_machine(root: Path) -> int | None:
    """Memory that Linux has available, plus free swap."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        return sizes["MemAvailable"] + sizes.get("SwapFree", 0)
    except (OSError, ValueError, IndexError, KeyError):
        return None


def _free_in_groups(root: Path) -> Iterator[int]:
    """The free memory within the limit of each control group of this process, and of their parents."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        if kinds and "memory" not in kinds.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if kinds else "")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
        # In a container the path is that of the host, and only the top folder exists.
        inner = top / path.strip("/")
        for folder in (inner, *inner.parents):
            if (free := _free_in_group(folder, *names)) is not None:
                yield free
            if folder == top:
                break


def _free_in_group(folder: Path, limit: str, usage: str) -> int | None:
    try:
        most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None  # no such file, or "max"
    given_back = sum(int(counts.get(name, 0)) for name in ("inactive_file", "active_file"))
    return max(0, most - max(0, used - given_back))


def _free_in_address_space(root: Path) -> int | None:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        pages = int((root / "proc/self/statm").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return max(0, limit - pages * os.sysconf("SC_PAGE_SIZE"))


@contextmanager
def device_limits() -> Iterator[None]:
    """A context that sets memory limits. On a GPU it wires the memory that Metal recommends and limits mlx's cache.

    The previous limits are restored when the last of several runs leaves; a lower cache limit of the user stays. On a
    CPU with glibc, freed memory is kept for the next arrays until the end: new memory causes a page fault per page,
    which costs more than most operations on it.
    """
    global _holders
    with _holding:
        _holders += 1
        if _holders == 1:
            _set_limits()
    try:
        yield
    finally:
        with _holding:
            _holders -= 1
            if _holders == 0:
                _restore_limits()


def _set_limits() -> None:
    if is_cpu():
        _set_malloc(_KEPT)
        return
    resident = mx.device_info().get("max_recommended_working_set_size")
    if resident is not None:
        _limits_before["wired"] = mx.set_wired_limit(int(resident))
    ours = memory_limit() // _CACHED_SHARE
    before = mx.set_cache_limit(ours)
    if before < ours:
        mx.set_cache_limit(before)
    else:
        _limits_before["cache"] = before


def _restore_limits() -> None:
    if is_cpu():
        _set_malloc(_USUAL)
        release_freed_memory()
        return
    mx.synchronize()
    mx.clear_cache()
    if "wired" in _limits_before:
        mx.set_wired_limit(_limits_before.pop("wired"))
    if "cache" in _limits_before:
        mx.set_cache_limit(_limits_before.pop("cache"))


def clear_cache() -> None:
    """Release the cache of freed arrays. Call it after work with other array sizes than updates."""
    if not is_cpu():
        mx.clear_cache()
    elif _holders:
        release_freed_memory()


def release_freed_memory() -> None:
    """Return the freed memory that this process keeps on a CPU to the system."""
    if (trim := getattr(_libc(), "malloc_trim", None)) is not None:
        trim(0)


def _set_malloc(limits: Mapping[int, int]) -> None:
    """Set mallopt parameters. Does nothing without glibc, or if the user has set them in the environment."""
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is None or any(name in os.environ for name in _USER_VARIABLES):
        return
    for name, value in limits.items():
        mallopt(name, value)


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
