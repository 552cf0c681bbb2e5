"""Tab completion for `%finetune` and the first line of `%%finetune`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_nb.config.run_config import LIVE_SETTINGS
from mlx_nb.notebook.commands import CELL_OPTIONS, COMMANDS

if TYPE_CHECKING:
    from mlx_nb.notebook.session import Session


def complete(session: Session, line: str) -> list[str]:
    """What may come next on `line`: a subcommand, an option of it, a run, or a live setting."""
    words = line.lstrip().split(" ")
    if words[0].startswith("%%"):
        return list(CELL_OPTIONS)
    before = [word for word in words[1:-1] if word]
    if before and before[-1] in ("--name", "-n"):
        return list(session.runs)
    if not before:
        return list(COMMANDS)
    command = COMMANDS.get(before[0])
    if command is None:
        return []
    options = [*command.options, "--name"]
    if before[0] == "set":
        options += [f"{name}=" for name in LIVE_SETTINGS]
    if before[0] in ("use", "panel"):
        options += list(session.runs)
    return options
