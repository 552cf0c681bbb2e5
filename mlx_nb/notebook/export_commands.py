"""The `%finetune` commands that write a trained model for other programs.

A new command of this group is a function here and its entry in the table at the end.
"""

from __future__ import annotations

import argparse

from mlx_nb.errors import CommandError
from mlx_nb.notebook.command import Command, argument, command
from mlx_nb.notebook.session import Session
from mlx_nb.notebook.text_output import Text
from mlx_nb.run.run import Run
from mlx_nb.run.saved_model import SavedModel, load_named


def _source(session: Session, arguments: argparse.Namespace) -> Run | SavedModel:
    """The run to export, or the saved adapter with its base."""
    if arguments.start is None:
        return session.get(arguments.name)
    if arguments.name is not None:
        raise CommandError("--from and --name cannot be combined: one is a saved adapter, the other a run.")
    return load_named(arguments.start)


def _fuse(session: Session, arguments: argparse.Namespace) -> Text:
    if arguments.dequantize and arguments.precision not in (None, "16-bit"):
        raise CommandError(f"%finetune fuse: --dequantize is --precision 16-bit, not {arguments.precision}. Give one.")
    precision = "16-bit" if arguments.dequantize else arguments.precision
    report = _source(session, arguments).fuse(arguments.path, precision=precision)
    if report.path is None:
        return Text(f"{report}\nNothing was written. `%finetune fuse FOLDER` writes it.")
    return Text(f"{report}\n\n{report.how_to_use}")


def _gguf(session: Session, arguments: argparse.Namespace) -> Text:
    written = _source(session, arguments).gguf(
        arguments.path,
        type=arguments.type,
        adapter=arguments.adapter,
        base=arguments.base,
        lm_studio_name=arguments.lm_studio,
    )
    return Text(str(written))


_FROM = argument("--from", dest="start", metavar="FOLDER", help="a saved adapter, of mlx-lm or PEFT too, not a run")

EXPORT_COMMANDS: dict[str, Command] = {
    "fuse": command(
        "fuse",
        "merge the adapter into its base, for mlx-lm",
        _fuse,
        argument("path", nargs="?", help="new folder; without it, only tell what each precision would lose"),
        argument("--precision", help="base, mixed or 16-bit (default: the recommended one)"),
        argument("--dequantize", action="store_true", help="the same as --precision 16-bit"),
        _FROM,
        of_now=True,
    ),
    "gguf": command(
        "gguf",
        "write the model for llama.cpp, Ollama and LM Studio",
        _gguf,
        argument("path", nargs="?", help="new folder"),
        argument(
            "--type", default="f16", help="f16 (default), bf16, f32, q8_0, or one that llama.cpp makes: q4_k_m, ..."
        ),
        argument("--adapter", action="store_true", help="only the LoRA adapter"),
        argument("--base", metavar="FILE", help="with --adapter: the base as GGUF, to check the adapter on"),
        argument("--lm-studio", metavar="NAME", help="write to LM Studio's folder, under this name"),
        _FROM,
        of_now=True,
    ),
}
