"""mlx-lm without what importing it changes in the whole process: how many files may be open, and Python's `random`."""

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

_FILES_OF_A_MODEL = 2048  # what mlx-lm asks for: a large model has hundreds of files

# In the order in which mlx-lm comes to them; each takes under half a second.
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
    """One thread at a time imports, and is not told that there is no PyTorch, which nothing here needs."""
    with _importing:
        advice = os.environ.get(_NO_ADVICE)
        os.environ.setdefault(_NO_ADVICE, "1")
        try:
            yield
        finally:
            if advice is None:
                os.environ.pop(_NO_ADVICE, None)


def import_mlx_lm() -> None:
    """Import mlx-lm, quietly; the limit of open files, the environment and the state of `random` stay as they are.

    mlx-lm lowers the hard limit, which only root could raise again afterwards: so it must not come to that. Its tuner
    imports rich, which draws a number.
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
    """Import most of what mlx-lm takes, a piece at a time; gives the number of pieces that are done before each.

    Not for a thread: transformers puts another module in its own place in the middle of its import, so that whoever
    imports it meanwhile, such as another cell, would be left with the first one, which lacks every name.
    """
    for done, name in enumerate(LIBRARIES):
        yield done
        with _importing_quietly(), suppress(ImportError):  # in another version; it is imported where it is used
            importlib.import_module(name)


@contextmanager
def files_for_a_model() -> Iterator[None]:
    """While inside, the files of a large model can be open at once; some systems allow 256."""
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
