"""Explains a bare `run`, which IPython reads as `%run`, if the user must have meant `%finetune run`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from IPython.core.interactiveshell import InteractiveShell

from mlx_nb.errors import CommandError

_MAGIC = "run"


class BareRun:
    """Wraps `%run` of one shell, and passes on everything that may be a file. `close` restores the original."""

    def __init__(self, shell: InteractiveShell) -> None:
        self._magics: dict[str, Any] = shell.magics_manager.magics["line"]
        real = shell.find_line_magic(_MAGIC)  # loads it if it is lazy
        self._before = self._magics.get(_MAGIC)
        if real is not None:
            self._ours = self._magics[_MAGIC] = _guarded(real)

    def close(self) -> None:
        """Restore the original, unless another wrapper was installed since."""
        if self._before is not None and self._magics.get(_MAGIC) is self._ours:
            self._magics[_MAGIC] = self._before


def _guarded(real: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)
    def run(line: str = "", *arguments: Any, **options: Any) -> Any:
        if _means_a_run(line.split()):
            raise CommandError(
                f"`{f'run {line}'.strip()}` is IPython's %run, which executes a file. To train, write "
                f"`{f'%finetune run {line}'.strip()}`."
            )
        return real(line, *arguments, **options)

    return run


def _means_a_run(words: list[str]) -> bool:
    """Whether the words cannot be a file: there are none, or only numbers and options of `%finetune run`."""
    for word in words:
        if word in ("--wait", "--background", "--now"):
            continue
        if not word.isdigit() or Path(word).exists() or Path(f"{word}.py").exists():
            return False
    return True
