"""Loads and unloads the extension: registers magics and Tab completion, and removes them again."""

from __future__ import annotations

from typing import Any

from IPython.core.interactiveshell import InteractiveShell

from mlx_nb.errors import break_error_lines_with
from mlx_nb.notebook.magics import FinetuneMagics
from mlx_nb.notebook.tab_completion import matcher
from mlx_nb.notebook.text_output import broken_line

_MAGICS = "_mlx_nb_magics"


def load(shell: InteractiveShell) -> None:
    """Register `%finetune` and `%%finetune` with Tab completion. Loading again replaces them."""
    if getattr(shell, _MAGICS, None) is not None:
        unload(shell)
    magics = FinetuneMagics(shell)
    shell.register_magics(magics)
    cell: Any = magics.finetune_cell
    magics.matcher = matcher(magics.session, cell.parser)
    shell.Completer.custom_matchers.append(magics.matcher)
    break_error_lines_with(broken_line)
    setattr(shell, _MAGICS, magics)


def unload(shell: InteractiveShell) -> None:
    """Remove magics and completion; runs in notebook variables stay usable."""
    magics = getattr(shell, _MAGICS, None)
    if magics is None:
        return
    break_error_lines_with(None)
    magics.interrupts.close()
    magics.bare_run.close()
    magics.question_marks.close()
    magics.console_pictures.close()
    magics.session.close()
    magics.preferences.close()
    manager = shell.magics_manager
    for kind in ("line", "cell"):
        manager.magics[kind].pop("finetune", None)
    manager.registry.pop(type(magics).__name__, None)
    for one in (magics, magics.preferences):
        if one in shell.configurables:
            shell.configurables.remove(one)
    if magics.matcher in shell.Completer.custom_matchers:
        shell.Completer.custom_matchers.remove(magics.matcher)
    setattr(shell, _MAGICS, None)
