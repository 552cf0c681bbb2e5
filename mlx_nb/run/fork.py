"""A fork: a second run that goes on from where another one stands, with other settings."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlx_nb.config.run_config import LENGTHS, SETTINGS, RunConfig, unknown_settings
from mlx_nb.errors import CommandError, ConfigError
from mlx_nb.events import RunFinished, RunStarted
from mlx_nb.files.folder_lock import is_locked
from mlx_nb.files.places import folder_of
from mlx_nb.history import History
from mlx_nb.run.checkpoints import for_other_settings

if TYPE_CHECKING:
    from mlx_nb.run.run import Run

_KEPT_GROUPS = ("model", "rows", "adapter")
# Its seed is the order of the rows: with another one the rest of the epoch would repeat some and never see others.
_KEPT = ("method", "reference_model", "reference_adapter", "reference_free", "seed")


def forked(source: Run, name: str | None, changes: Mapping[str, Any]) -> Run:
    """The fork of a run that stands at a boundary. It shares the rows and the arrays of the base with it.

    Raises ConfigError for a setting that a fork keeps, CommandError for the name or the folder of the source.
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
    other = type(source)(config, name=name, _from_checkpoint=True)
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


def _free_name(source: Run, config: RunConfig) -> str:
    """A name that no earlier fork of the source has, and whose folder no run holds that lives."""
    while True:
        source.forks += 1
        name = f"{source.name}-fork" if source.forks == 1 else f"{source.name}-fork-{source.forks}"
        if config.adapter_path or not is_locked(folder_of(f"adapters/{name}", config.working_folder)):
            return name
