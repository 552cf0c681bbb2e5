"""A fork: a second run that goes on from where another one stands, with other settings."""

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
# Its seed is the order of the rows: with another one the rest of the epoch would repeat some and never see others.
_KEPT = ("method", "reference_model", "reference_adapter", "reference_free", "seed")


class Forkable(Protocol):
    """A run as it is needed here. `forks` is how many were named after it."""

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
        """What it is trained by."""


Fork = TypeVar("Fork", bound=Forkable)


def forked(
    source: Forkable, name: str | None, changes: Mapping[str, Any], make: Callable[[RunConfig, str], Fork]
) -> Fork:
    """The fork of a run that stands at a boundary. It shares the rows and the arrays of the base with it.

    `make` makes a run of settings and a name, to be restored from a checkpoint. Raises ConfigError for a setting that a
    fork keeps, CommandError for the name or the folder of the source.
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
    other.inputs = source.inputs.twin(other.config)
    other.trainer.restore(for_other_settings(source.trainer.snapshot(), source.config, other.config))
    if not changes.keys().isdisjoint(LENGTHS):
        other.trainer.refuse_shorter_than_done(other.config)
    other.trainer.go_on()
    other.trainer.end_again()
    # Its own length and folder are other ones.
    own = (event for event in source.history.events if not isinstance(event, RunFinished))
    iters = other.trainer.iters
    other.history = History(
        dataclasses.replace(one, name=name, iters=iters) if isinstance(one, RunStarted) else one for one in own
    )
    return other


def _free_name(source: Forkable, config: RunConfig) -> str:
    """A name that no earlier fork of the source has, and whose folder no run holds that lives."""
    while True:
        source.forks += 1
        name = f"{source.name}-fork" if source.forks == 1 else f"{source.name}-fork-{source.forks}"
        if config.adapter_path or not is_locked(folder_of(f"adapters/{name}", config.working_folder)):
            return name
