"""Imports mlx-lm without its side effects on the process: the limit of open files, and Python's `random` state."""

from __future__ import annotations

import importlib
import os
import random
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_FILES_OF_A_MODEL = 2048  # what mlx-lm sets; a large model has hundreds of files

# In the order in which mlx-lm imports them; each takes less than half a second.
LIBRARIES = (
    "huggingface_hub",
    "tokenizers",
    "transformers",
    "transformers.tokenization_utils_base",
    "transformers.models.auto.tokenization_auto",
)

_NO_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"

_importing = threading.Lock()


@contextmanager
def _importing_quietly() -> Iterator[None]:
    """A context for one importing thread at a time, without the warning about missing PyTorch."""
    with _importing:
        advice = os.environ.get(_NO_ADVICE)
        os.environ.setdefault(_NO_ADVICE, "1")
        try:
            yield
        finally:
            if advice is None:
                os.environ.pop(_NO_ADVICE, None)


def import_mlx_lm() -> None:
    """Import mlx-lm without changing the limit of open files, the environment or the state of `random`.

    mlx-lm lowers the hard limit, which only root could raise again, so that call is intercepted. Its tuner imports
    rich, which draws a random number.
    """
    with _importing_quietly():
        if "mlx_lm.utils" in sys.modules:
            return
        real: Any = resource.setrlimit
        drawn = random.getstate()
        try:
            resource.setrlimit = lambda kind, limits: None if kind == resource.RLIMIT_NOFILE else real(kind, limits)
            import mlx_lm.tuner.utils
            import mlx_lm.utils  # noqa: F401
        finally:
            resource.setrlimit = real
            random.setstate(drawn)


def import_tokenizers() -> Iterator[int]:
    """Import the libraries that mlx-lm needs one at a time. Yields the number already imported before each.

    Do not call it on another thread: transformers replaces its own module during import, and code that imports it at
    the same time, such as another cell, would get the incomplete first module.
    """
    for done, name in enumerate(LIBRARIES):
        yield done
        with _importing_quietly(), suppress(ImportError):  # missing in another version
            importlib.import_module(name)


@contextmanager
def files_for_a_model() -> Iterator[None]:
    """A context that allows enough open files for a large model; some systems allow only 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES_OF_A_MODEL if hard == resource.RLIM_INFINITY else min(_FILES_OF_A_MODEL, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        yield
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
