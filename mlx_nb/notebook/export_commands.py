"""The `%finetune` commands that write a trained model for other programs.

A new command of this group is a function here and its entry in the table at the end.
"""

from __future__ import annotations

import argparse

from mlx_nb.errors import CommandError
from mlx_nb.notebook.command import Command, argument, command
from mlx_nb.notebook.session import Session
from mlx_nb.notebook.text_output import Text


def _fuse(session: Session, arguments: argparse.Namespace) -> Text:
    if arguments.dequantize and arguments.precision not in (None, "16-bit"):
        raise CommandError(f"%finetune fuse: --dequantize is --precision 16-bit, not {arguments.precision}. Give one.")
    precision = "16-bit" if arguments.dequantize else arguments.precision
    report = session.get(arguments.name).fuse(arguments.path, precision=precision)
    if report.path is None:
        return Text(f"{report}\nNothing was written. `%finetune fuse FOLDER` writes it.")
    return Text(f"{report}\n\n{report.how_to_use}")


EXPORT_COMMANDS: dict[str, Command] = {
    "fuse": command(
        "fuse",
        "merge the adapter into its base, for mlx-lm",
        _fuse,
        argument("path", nargs="?", help="new folder; without it, only tell what each precision would lose"),
        argument("--precision", help="base, mixed or 16-bit (default: the recommended one)"),
        argument("--dequantize", action="store_true", help="the same as --precision 16-bit"),
        of_now=True,
    ),
}
