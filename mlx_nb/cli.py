"""`mlx-nb quickstart | train | doctor | settings`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mlx_nb.errors import MlxNbError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status; an expected error is one line on stderr and status 1."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.act is None:
        parser.print_help()
        return 2
    try:
        return chosen.act(chosen)
    except MlxNbError as error:
        print(f"mlx-nb: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mlx-nb: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx-nb", description="Fine-tune a language model with MLX.")
    parser.set_defaults(act=None)
    commands = parser.add_subparsers(title="commands", metavar="")
    quickstart = commands.add_parser("quickstart", help="fine-tune a small real model in a notebook, and measure it")
    quickstart.add_argument("--folder", default="mlx_nb_quickstart", help="where notebook, rows and adapter go")
    quickstart.set_defaults(act=_quickstart)
    train = commands.add_parser("train", help="run a YAML file to its end")
    train.add_argument("config", help="YAML file with the settings of a %%%%finetune cell")
    train.add_argument("--name", default="run", help="name of the run")
    train.set_defaults(act=_train)
    doctor = commands.add_parser("doctor", help="device, BLAS and speed of this machine, and what to do about them")
    doctor.set_defaults(act=_doctor)
    settings = commands.add_parser("settings", help="all settings with defaults and help")
    settings.add_argument("--markdown", action="store_true", help="as the reference page of the docs")
    settings.set_defaults(act=_settings)
    return parser


def _quickstart(chosen: argparse.Namespace) -> int:
    from mlx_nb.quickstart import run_quickstart

    return run_quickstart(chosen.folder)


def _train(chosen: argparse.Namespace) -> int:
    from pathlib import Path

    from mlx_nb.model.backend import prepare_backend

    prepare_backend()
    from mlx_nb.notebook.driver import train
    from mlx_nb.run import Run

    train(Run.from_yaml(Path(chosen.config), name=chosen.name))
    return 0


def _doctor(_chosen: argparse.Namespace) -> int:
    from mlx_nb.model.backend import format_doctor_report

    print(format_doctor_report())
    return 0


def _settings(chosen: argparse.Namespace) -> int:
    from mlx_nb.config_help import settings_markdown, settings_text

    print(settings_markdown() if chosen.markdown else settings_text())
    return 0
