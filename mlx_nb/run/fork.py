"""Creates a fork: a second run that continues from the current state of another one, with other settings."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from mlx_nb.config.run_config import LENGTHS, SETTINGS, RunConfig, unknown_settings
from mlx_nb.errors import CommandError, ConfigError
from mlx_nb.events import RunFinished, RunStarted
from mlx_nb.events.history import History
from mlx_nb.files.folder_lock import is_locked
from mlx_nb.files.places import folder_of
from mlx_nb.run.checkpoints import for_other_settings
from mlx_nb.run.inputs import RunInputs

if TYPE_CHECKING:
    from mlx_nb.train.trainer import Trainer

_KEPT_GROUPS = ("model", "rows", "adapter")
# The seed determines the row order: with another one the rest of the epoch would repeat some rows and skip others.
_KEPT = ("method", "reference_model", "reference_adapter", "reference_free", "seed")


class Forkable(Protocol):
    """The interface of a run that forking needs. `forks` counts the forks with automatic names."""

    name: str
    config: RunConfig
    history: History
    inputs: RunInputs
    forks: int

    @property
    def folder(self) -> Path:
        """Where it saves."""

    @property
    def trainer(self) -> Trainer:
        """Its trainer."""


Fork = TypeVar("Fork", bound=Forkable)


def forked(
    source: Forkable, name: str | None, changes: Mapping[str, Any], make: Callable[[RunConfig, str], Fork]
) -> Fork:
    """Fork a run at a step boundary. The fork shares the rows and the base model's arrays.

    `make` creates a run from settings and a name. Raises ConfigError for a setting that cannot differ in a fork,
    CommandError for the name or folder of the source.
    """
    kept = [
        name
        for name in changes
        if name in _KEPT or (name in SETTINGS and SETTINGS[name].metadata["group"] in _KEPT_GROUPS)
    ]
    problems = [f"a fork keeps its `{name}`. Start a new run with %%finetune to change it." for name in kept]
    problems += [str(error) for error in unknown_settings(changes)]
    if problems:
        raise ConfigError("\n".join(problems))
    if name == source.name:
        raise CommandError(f"a fork of {name} needs another name.")
    given = [length for length in LENGTHS if changes.get(length) is not None]
    standard = {"adapter_path": None, **(dict.fromkeys(LENGTHS) if given else {})}
    config = source.config.replace(**{**standard, **changes})
    name = name or _free_name(source, config)
    other = make(config, name)
    if os.path.realpath(other.folder) == os.path.realpath(source.folder):
        raise CommandError(f"a fork of {source.name} needs another folder than {source.folder}.")
    other.inputs = source.inputs.for_fork(other.config)
    other.trainer.restore(for_other_settings(source.trainer.snapshot(), source.config, other.config))
    if not changes.keys().isdisjoint(LENGTHS):
        other.trainer.refuse_shorter_than_done(other.config)
    other.trainer.undo_early_end()
    other.trainer.repeat_finish()
    # The fork has its own name, length and folder.
    own = (event for event in source.history.events if not isinstance(event, RunFinished))
    iters = other.trainer.iters
    other.history = History(
        dataclasses.replace(one, name=name, iters=iters) if isinstance(one, RunStarted) else one for one in own
    )
    return other


def _free_name(source: Forkable, config: RunConfig) -> str:
    """The first unused fork name whose folder is not locked by a live run."""
    while True:
        source.forks += 1
        name = f"{source.name}-fork" if source.forks == 1 else f"{source.name}-fork-{source.forks}"
        if config.adapter_path or not is_locked(folder_of(f"adapters/{name}", config.working_folder)):
            return name
