"""The text of `%finetune help`, `%finetune help set` and `%%finetune?`, for a notebook 700 px wide."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Protocol

from mlx_nb.config.help import full_help, setting_help, short_help
from mlx_nb.config.methods import METHODS
from mlx_nb.config.run_config import LIVE_SETTINGS, SETTINGS
from mlx_nb.errors import CommandError, did_you_mean
from mlx_nb.notebook.queued_cells import NOW
from mlx_nb.notebook.text_output import WIDTH

_GROUPS = {
    "Train": ("new", "import", "step", "run", "pause", "stop", "rewind", "skip", "resume"),
    "Watch": ("panel", "status", "plot", "report", "config", "compare"),
    "Rows": ("rows", "row", "browse", "check", "batch", "rollouts", "plan"),
    "Model": ("generate", "eval", "lm_eval", "lr_find", "sweep"),
    "Change": ("set", "fork"),
    "Save": ("save", "load", "runs", "use", "delete"),
    "Export": ("fuse", "gguf"),
}
TEN = (
    "model",
    "data",
    "method",
    "iters",
    "learning_rate",
    "batch_size",
    "max_seq_length",
    "lora_parameters.rank",
    "loss_on",
    "sample_prompts",
)
_EXAMPLE = """%%finetune --name bees
model: smollm2-135m
data: bees            # a variable, a file, a folder or a hub id
iters: 60
learning_rate: 1e-4"""


class Command(Protocol):
    """The part of a command that help uses."""

    @property
    def help(self) -> str:
        """What it does, in a few words."""

    @property
    def parser(self) -> argparse.ArgumentParser:
        """The parser of its arguments."""


def commands_help(commands: Mapping[str, Command]) -> str:
    """All commands in groups, one line each, after an example."""
    grouped = {name for names in _GROUPS.values() for name in names}
    groups = {**_GROUPS, "More": tuple(name for name in commands if name not in grouped)}
    lines = [
        'Example: %finetune generate "Hello"',
        "",
        "A %%finetune cell with settings in YAML creates and trains a run.",
    ]
    for title, names in groups.items():
        there = [name for name in names if name in commands]
        lines += ["", title] if there else []
        lines += [_line(name, commands[name].help) for name in there]
    return "\n".join(
        [
            *lines,
            "",
            "`%finetune help set` explains one command or setting, and",
            "`%%finetune?` lists the settings. --name NAME selects a run other",
            "than the current one. Cells queued behind a cell that starts a",
            f"run (Run All) wait for it; {NOW} does not wait.",
        ]
    )


def help_of(name: str, commands: Mapping[str, Command]) -> str:
    """Help for one command or setting. Raises CommandError for an unknown name."""
    if name in commands:
        text = commands[name].parser.format_help().replace("usage: ", "usage: %finetune ").rstrip()
        if any(action.dest == "changes" for action in commands[name].parser._actions):
            helps = {line.name: line.help for line in setting_help()}
            changed = [_line(one, helps[one], 18) for one in (LIVE_SETTINGS if name == "set" else ())]
            text += "\n\n" + "\n".join(["settings:", *changed]) if changed else ""
        return text
    text = full_help(name, WIDTH)
    if not text:
        near = did_you_mean(name, [*commands, *SETTINGS])
        raise CommandError(f"%finetune help: there is no command or setting {name!r}.{near}")
    return text


def cell_help(parser: argparse.ArgumentParser) -> str:
    """The text of `%%finetune?`: an example, the most common settings, the options, and other settings by method."""
    described = {line.name: line for line in setting_help()}
    parts = [_EXAMPLE, "", "Fine-tunes a model. The body is YAML, one setting per line.", "", "Most common settings:"]
    parts += [_setting(described[name].name, described[name].default, described[name].help) for name in TEN]
    parts += ["", "Options of the first line:"]
    for action in parser._actions:
        parts.append(_line(max(action.option_strings, key=len), action.help or "", 15))
    others = [line for line in described.values() if line.name not in TEN]
    common = [line for line in others if all(_uses(method, line.name) for method in METHODS)]
    parts += ["", "Other settings for every method:"]
    parts += [_setting(line.name, line.default, line.help) for line in common]
    for method in METHODS:
        own = [line for line in others if line not in common and _uses(method, line.name)]
        parts += ["", f"With method: {method} ({METHODS[method].kind.words}):"]
        parts += [_setting(line.name, line.default, line.help) for line in own]
    return "\n".join([*parts, "", "`%finetune help NAME` explains one setting."])


def _uses(method: str, name: str) -> bool:
    outer = name.partition(".")[0]
    return METHODS[method].uses(outer, SETTINGS[outer].metadata["only_for"])


def _setting(name: str, default: str, help: str) -> str:
    return _line(f"{name}: {default}" if len(name) + len(default) < 24 else f"{name}:", help, 24)


def _line(name: str, help: str, width: int = 10, line: int = WIDTH) -> str:
    head = f"  {name.ljust(width)}  "
    return head + short_help(help, max(20, line - len(head)))
