"""Fixtures for all tests, and the switch for the slow ones."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import pytest

import forked
from matrix import part

if sys.dont_write_bytecode:
    # Tests and hypothesis would be rewritten and compiled anew in every process, and the package in every child: kept
    # out of the tree.
    kept = Path(tempfile.gettempdir()) / f"mlx_nb-bytecode-{os.getuid()}"
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(kept)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(kept)
if "PYTEST_XDIST_WORKER" in os.environ:
    # There is a process for each core already. Two that share the cores wait for each other's threads, by spinning.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# jsonschema looks at addresses of a kind that no notebook has with it, and importing it takes seconds of each process.
sys.modules.setdefault("rfc3987_syntax", None)
import_module("mlx_nb.model")  # which loads OpenBLAS, before any test imports mlx
# Where the tests run as a job in the background of a shell, it has these ignored, and every child inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

hypothesis = import_module("hypothesis")
# How long an example takes is a matter of how busy the machine is, and says nothing about the law.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")

# A flush to disk costs nothing in memory, and saves flush a dozen files each; no test cuts the power.
MEMORY_DISK, FREE_BYTES = "/dev/shm", 4 * 1024**3
if os.access(MEMORY_DISK, os.W_OK) and shutil.disk_usage(MEMORY_DISK).free > FREE_BYTES:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY_DISK)

# In the order in which they are run, before the quick tests: what takes long alone comes first, so that many short ones
# keep all processes busy to the end.
SLOW_MARKERS = ("real_model", "faults", "kernel", "browser", "long", "families", "whole")


def _slowness(item: pytest.Item) -> int | None:
    """The place of its slow marker, None for a test that is quick."""
    return next((place for place, name in enumerate(SLOW_MARKERS) if item.get_closest_marker(name)), None)


def _shares_with_its_file(item: pytest.Item) -> bool:
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    return any(definition.scope == "module" for definitions in fixtures for definition in definitions)


def _values(case: pytest.Item) -> dict[str, str]:
    return {name: repr(value) for name, value in case.callspec.params.items()}


def _mark_what_is_left_of_matrices(items: list[pytest.Item]) -> None:
    matrices: dict[object, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("matrix"):
            matrices.setdefault(item.function, []).append(item)
    for cases in matrices.values():
        every = cases[0].get_closest_marker("matrix").kwargs.get("every")
        quick = part([_values(case) for case in cases], every)
        for number, case in enumerate(cases):
            if number not in quick:
                case.add_marker("whole")


def _is_left_out(item: pytest.Item, config: pytest.Config) -> bool:
    asked, expression = os.environ.get("MLX_NB_SLOW"), config.getoption("-m")
    if item.get_closest_marker("beyond_pairs"):
        return asked != "all" and "families" not in expression
    return asked not in ("1", "all") and not expression and _slowness(item) is not None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the slow tests out unless MLX_NB_SLOW=1 or a marker expression asks for them; they come first then.

    Tests that share a fixture of their file are run by one process, all others by whichever is free.
    """
    _mark_what_is_left_of_matrices(items)
    left_out = [item for item in items if _is_left_out(item, config)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not _is_left_out(item, config)]
    items.sort(key=lambda item: len(SLOW_MARKERS) if (place := _slowness(item)) is None else place)
    for item in items:
        if _shares_with_its_file(item):
            item.add_marker(pytest.mark.xdist_group(item.path.name))


def pytest_configure(config: pytest.Config) -> None:
    """Make all interrupts and kills where they are asked for."""
    if "faults" in config.getoption("-m") or os.environ.get("MLX_NB_SLOW") == "all":
        os.environ.setdefault("MLX_NB_FAULTS", "all")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """All tests are run side by side, one process a core; files or tests asked for by name in this one."""
    return (os.cpu_count() or 1) if config.args == config.getini("testpaths") else 0


def pytest_collection_finish() -> None:
    """Keep modules and tests out of every collection of garbage from here on, and have fewer: those take the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


_FILE = pytest.StashKey[Path]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Keep what the tests of other files left for good, such as modules, out of collections too.

    A test that collects garbage at each line of some code examines its own objects again and again, and no others.
    """
    if item.config.stash.get(_FILE, None) != item.path:
        item.config.stash[_FILE] = item.path
        gc.collect()
        gc.freeze()


def pytest_sessionfinish() -> None:
    """End what tests shared."""
    forked.close()


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path, monkeypatch):
    """A run whose adapter_path is left as it is writes below the current folder, which two tests may not share."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session", autouse=True)
def _checks_of_tests(tmp_path_factory):
    """Results of checks go to a folder of the session: tests replace parts of this package, which no result may see."""
    from mlx_nb.model import stored_checks

    folder = tmp_path_factory.mktemp("checks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_checks, "checks_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny model folder that `mlx_lm.load` opens."""
    from tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded_smollm2():
    """SmolLM2-135M-Instruct, loaded once for the tests of a file; fetched once, kept in the user's cache."""
    from mlx_nb.model.loading import load_model

    return load_model("smollm2-135m")


@pytest.fixture
def smollm2(loaded_smollm2):
    """A function that gives a fresh SmolLM2-135M-Instruct: modules of its own, with the arrays of the loaded one."""
    from mlx_nb.model.shared_base import shared_copy

    return lambda: shared_copy(loaded_smollm2)


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """A shell with the extension loaded, in an empty folder."""
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.chdir(tmp_path)
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "mlx_nb")
    yield shell
    shell.run_line_magic("unload_ext", "mlx_nb")
    InteractiveShell.clear_instance()
