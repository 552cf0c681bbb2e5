"""Loading and unloading: registers magics and completion, and removes every trace of them again."""

from __future__ import annotations

from typing import Any

from IPython.core.interactiveshell import InteractiveShell

from mlx_nb.notebook.magics import FinetuneMagics
from mlx_nb.notebook.tab_completion import complete

_MAGICS = "_mlx_nb_magics"
_KEYS = ("%finetune", "%%finetune", "finetune")


def load(shell: InteractiveShell) -> None:
    """Register `%finetune` and `%%finetune` with Tab completion. Loading twice is loading once."""
    if getattr(shell, _MAGICS, None) is not None:
        unload(shell)
    magics = FinetuneMagics(shell)
    shell.register_magics(magics)

    def completer(_shell: Any, event: Any) -> list[str]:
        return complete(magics.session, event.line)

    for key in _KEYS:
        shell.set_hook("complete_command", completer, str_key=key)
    setattr(shell, _MAGICS, magics)


def unload(shell: InteractiveShell) -> None:
    """Take magics and completion out again; runs that a notebook variable holds stay usable."""
    magics = getattr(shell, _MAGICS, None)
    if magics is None:
        return
    magics.interrupts.close()
    magics.session.close()
    manager = shell.magics_manager
    for kind in ("line", "cell"):
        manager.magics[kind].pop("finetune", None)
    manager.registry.pop(type(magics).__name__, None)
    if magics in shell.configurables:
        shell.configurables.remove(magics)
    hooks = shell.strdispatchers.get("complete_command")
    if hooks is not None:
        for key in _KEYS:
            hooks.strs.pop(key, None)
    setattr(shell, _MAGICS, None)
