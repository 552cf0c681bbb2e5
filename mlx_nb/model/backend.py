"""Gives mlx a fast BLAS on Linux CPUs, and says what device and memory mlx has.

On Linux CPUs mlx's wheel has the reference BLAS with a few GFLOP/s. If OpenBLAS is loaded first with global symbols, it
serves mlx's calls instead, tens of times faster. `prepare_backend` does that, and redirects the calls if `mlx.core` was
imported before.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType

from mlx_nb.errors import ModelError
from mlx_nb.files.cache_folder import cache_folder
from mlx_nb.files.whole_files import write_whole
from mlx_nb.model.blas_symbols import redirect_blas_calls

_GPU_PACKAGES = ("mlx-cuda-12", "mlx-cuda-13", "mlx-cuda")
_REFERENCE_PACKAGE = "mlx-cpu"  # mlx's wheel with the reference BLAS
_DEBIAN_BLAS = "openblas-pthread/libblas.so.3"
# mlx schedules operations breadth first, up to this many at a time (20 by default). With fewer than 16 per lane
# (model/lanes.py) all work of one lane would be scheduled before the next lane. The value applies to every graph of the
# process, and scheduled operations use memory, so it is no larger than needed. mlx reads the variable once.
ORDER_VARIABLE, _AT_ONCE_IN_A_LANE, _AT_ONCE_IN_MLX = "MLX_BFS_MAX_WIDTH", 16, 20


@dataclass(frozen=True)
class Blas:
    """The BLAS library that mlx uses. `path` is None if none was loaded; `note` describes it.

    `threads` is the number of threads of a matrix product: OPENBLAS_NUM_THREADS, or one per core. `sets_order` says
    that the environment variable for mlx's scheduling order was set. `warning` is a line with cause and remedy if mlx
    runs tens of times slower than this CPU could, else None.
    """

    path: str | None
    note: str
    library: ctypes.CDLL | None = None
    threads: int = 1
    sets_order: bool = False
    warning: str | None = None


_prepared: Blas | None = None
_active_contexts: set[object] = set()  # the active `one_blas_thread` contexts
_thread_lock = threading.Lock()


def prepare_backend() -> Blas:
    """Load a fast BLAS on Linux CPUs, and set MLX_BFS_MAX_WIDTH for this process.

    May copy libgfortran into the cache folder. Does nothing when called again. Does not import mlx.
    """
    global _prepared
    if _prepared is None:
        _prepared = _load_blas()
    return _prepared


def _load_blas() -> Blas:
    if sys.platform != "linux":
        return Blas(None, "the system BLAS")
    if any(_installed(package) for package in _GPU_PACKAGES):
        return Blas(None, "not needed: mlx uses the GPU")
    failures = []
    for candidate in _candidates():
        try:
            library = _load(candidate)
        except OSError as error:
            failures.append(f"{candidate.name}: {error}")
            continue
        loaded = sys.modules.get("mlx.core")
        try:
            if loaded is not None:
                redirect_blas_calls(loaded, library)
        except OSError as error:
            return _slow(
                f"mlx was imported before mlx_nb, and {error}, so a faster BLAS could not be installed",
                "Restart the kernel and run `%load_ext mlx_nb` (or import mlx_nb.Run) before anything imports mlx",
            )
        counted = hasattr(library, "openblas_get_num_threads")
        threads = library.openblas_get_num_threads() if counted else 1
        at_once = threads * _AT_ONCE_IN_A_LANE
        sets_order = threads > 1 and at_once > _AT_ONCE_IN_MLX and ORDER_VARIABLE not in os.environ
        if sets_order:
            os.environ[ORDER_VARIABLE] = str(at_once)
        return Blas(str(candidate), "OpenBLAS", library, threads, sets_order)
    if not failures and not _installed(_REFERENCE_PACKAGE):
        return Blas(None, "the BLAS of this mlx build")
    reason = f"no OpenBLAS could be loaded ({'; '.join(failures)})" if failures else "no OpenBLAS was found"
    install = f"{sys.executable} -m pip install cmeel-openblas"
    return _slow(reason, f"Run `{install}`, or install Debian's libopenblas0-pthread, and restart the kernel")


def _slow(reason: str, remedy: str) -> Blas:
    return Blas(
        None, f"{reason}. {remedy}.", warning=f"Training is 10 to 50 times slower than necessary: {reason}. {remedy}."
    )


def _installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def _candidates() -> list[Path]:
    """The OpenBLAS libraries on this machine: first the wheel's, whose version is known, then Debian's."""
    found: list[Path] = []
    if _installed("cmeel-openblas"):
        files = distribution("cmeel-openblas").files or []
        found += [Path(str(file.locate())) for file in files if file.name == "libopenblas.so.0"]
    found += sorted(Path("/usr/lib").glob(f"*/{_DEBIAN_BLAS}"))
    return found


def _load(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        if "libgfortran.so.5" not in str(error):
            raise
        _provide_gfortran()
        return ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _provide_gfortran() -> None:
    """Load `libgfortran.so.5` for OpenBLAS from the copy in mlx's CPU wheel.

    That copy has a mangled name, so a private copy with the plain name in its header is made in the cache and loaded.
    """
    files = distribution(_REFERENCE_PACKAGE).files or [] if _installed(_REFERENCE_PACKAGE) else []
    by_name = {file.name: Path(str(file.locate())) for file in files if "mlx_cpu.libs" in str(file)}
    fortran = next((path for name, path in by_name.items() if name.startswith("libgfortran-")), None)
    if fortran is None:
        raise OSError("libgfortran.so.5 is missing. Install Debian's libgfortran5")
    try:
        renamed = cache_folder() / "lib" / fortran.name / "libgfortran.so.5"
    except ModelError as error:
        raise OSError(str(error)) from None
    if not renamed.exists():
        content = fortran.read_bytes()
        mangled, plain = fortran.name.encode(), b"libgfortran.so.5"
        plainly_named = content.replace(mangled, plain.ljust(len(mangled), b"\0"))
        renamed.parent.mkdir(parents=True, exist_ok=True)
        write_whole(renamed, lambda file: file.write(plainly_named))
    for name, path in by_name.items():
        if name.startswith("libquadmath-"):
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(renamed))


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """A context in which matrix products use one thread in the whole process, so that other work runs in parallel."""
    blas, me = prepare_backend(), object()
    if blas.library is None or blas.threads == 1:
        yield
        return
    try:
        with _thread_lock:
            _active_contexts.add(me)
            blas.library.openblas_set_num_threads(1)
        yield
    finally:
        with _thread_lock:
            _active_contexts.discard(me)
            if not _active_contexts:
                blas.library.openblas_set_num_threads(blas.threads)


def scheduling_width() -> int:
    """How many operations mlx schedules breadth first in this process."""
    blas = prepare_backend()
    if blas.sets_order:
        return blas.threads * _AT_ONCE_IN_A_LANE
    given = os.environ.get(ORDER_VARIABLE, "")
    return int(given) if given.isdigit() and int(given) else _AT_ONCE_IN_MLX


def unset_scheduling_variable() -> None:
    """Remove the scheduling variable from the environment of child processes. Call it once mlx has read it."""
    blas = prepare_backend()
    if blas.sets_order:
        os.environ.pop(ORDER_VARIABLE, None)


def is_cpu() -> bool:
    """Whether mlx computes on the CPU."""
    mx = _mlx()
    result: bool = mx.default_device().type == mx.DeviceType.cpu
    return result


def device_name() -> str:
    """The name of the device; on a CPU with its number of cores."""
    mx = _mlx()
    if is_cpu():
        return f"CPU, {os.cpu_count()} cores"
    return str(mx.device_info().get("device_name", mx.default_device()))


def memory_limit() -> int:
    """Bytes that mlx can use before the machine slows down or an allocation fails.

    On Apple silicon this is Metal's recommended maximum, on CUDA the GPU's memory, on a CPU the machine's memory.
    """
    mx = _mlx()
    info = mx.device_info()
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if key in info:
            return int(info[key])
    return physical


def _mlx() -> ModuleType:
    prepare_backend()
    import mlx.core

    return mlx.core
