"""Starts the next stage of training from a run: SFT, then DPO with the SFT adapter as reference, then GRPO."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlx_nb.config.run_config import SETTINGS, RunConfig
from mlx_nb.errors import CommandError, ConfigError
from mlx_nb.files.written_files import ADAPTER_FILE

if TYPE_CHECKING:
    from mlx_nb.run.inputs import RunInputs

START = "resume_adapter_file"
# What a stage takes over where nothing else is given: the base, and how rows and prompts are written for it.
TAKEN_OVER = ("model", "load_in_bits", "chat_template", "prompt_format", "special_tokens_in_text", "roles")


class Stage(Protocol):
    """The interface of a run that another one starts from."""

    name: str
    config: RunConfig
    inputs: RunInputs

    @property
    def folder(self) -> Path:
        """Where it saves."""

    @property
    def step_count(self) -> int:
        """Optimizer updates done."""

    def save(self, path: str | Path | None = None) -> Path:
        """Write the adapter."""

    def adapter_bytes(self) -> dict[str, bytes]:
        """The adapter as it would be saved."""


def settings_from(source: Stage, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a new run called `name` takes over from `source`, where `given` does not have them.

    The adapter as it is now is written beside the folder of `source`, so that nothing that happens to `source` later
    changes what the new run started from. Raises CommandError for the same name or a source without updates,
    ConfigError if `given` has another start.
    """
    if name == source.name:
        raise CommandError(f"the next stage after {name} needs another name: it has a folder of its own.")
    refuse_other_start(given)
    if not source.step_count:
        raise CommandError(f"{source.name} has no update yet, so there is no adapter to start from. Train it first.")
    kept = {setting: getattr(source.config, setting) for setting in TAKEN_OVER}
    kept |= {setting: source.config.located(setting) for setting in ("model", "chat_template")}
    kept["prompt_format"] = source.inputs.prompt_rendering.prompt_format
    changed = {setting: value for setting, value in kept.items() if value != SETTINGS[setting].default}
    changed = {setting: value for setting, value in changed.items() if value}
    return {setting: value for setting, value in changed.items() if setting not in given} | {START: _frozen(source)}


def refuse_other_start(given: Mapping[str, Any]) -> None:
    """Raise ConfigError if the settings of a stage name an adapter to start from themselves."""
    if given.get(START) is not None:
        raise ConfigError(f"both `{START}` and a run to start from are given. Give only one.")


def _frozen(source: Stage) -> str:
    """The folder of a copy of the current adapter; an equal one that is there already is used."""
    number = 1
    while True:
        end = f".update-{source.step_count}" + (f"-{number}" if number > 1 else "")
        folder = source.folder.with_name(source.folder.name + end)
        if not folder.exists():
            return str(source.save(folder))
        if _holds(folder, source.adapter_bytes()):
            return str(folder)
        number += 1


def _holds(folder: Path, adapter: Mapping[str, bytes]) -> bool:
    import mlx.core as mx
    import numpy as np

    try:
        there: Any = mx.load(str(folder / ADAPTER_FILE))
        return {name: np.array(array).tobytes() for name, array in there.items()} == adapter
    except (OSError, RuntimeError, ValueError):
        return False


def frozen_copy(folder: Path) -> Path:
    """The copy of the adapter in `folder` that an earlier stage started from; `folder` itself if there is none."""
    adapter = folder / ADAPTER_FILE
    for copy in sorted(folder.parent.glob(f"{folder.name}.update-*")):
        there = copy / ADAPTER_FILE
        if adapter.is_file() and there.is_file() and there.read_bytes() == adapter.read_bytes():
            return copy
    return folder
