"""Shares one base model in memory between runs. Only for LoRA and DoRA, which never change its arrays."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Generator
from typing import Any
from weakref import WeakSet

from mlx_nb.config.run_config import RunConfig
from mlx_nb.events import Progress
from mlx_nb.model.adapters import detach_adapter
from mlx_nb.model.loading import LoadedModel, fetched_folder, load_in_pieces, template_text
from mlx_nb.model.model_source import model_named
from mlx_nb.model.once_per_model import register_files, register_same_files
from mlx_nb.model.trees import held_arrays
from mlx_nb.process.pieces import finished

_live: dict[tuple[Any, ...], WeakSet[LoadedModel]] = {}


def load_base(config: RunConfig) -> LoadedModel:
    """Load the model of a run. If another run of this process has the same files, their arrays are shared.

    Raises ModelError as `load_model` does.
    """
    return finished(load_base_in_pieces(config))


def load_base_in_pieces(config: RunConfig) -> Generator[Progress, None, LoadedModel]:
    """`load_base` in pieces, yielding Progress."""
    model, template = model_named(config), config.located("chat_template")
    folder = yield from fetched_folder(model)
    files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir())
    written = None if template is None else template_text(template)  # its file may have changed since another run
    key = (str(folder.resolve()), tuple(files), config.load_in_bits, written)
    holders = _live.setdefault(key, WeakSet())
    holder = next(iter(holders), None)
    loaded = None if holder is None else _shared_copy_if_possible(holder)
    if loaded is None:
        loaded = yield from load_in_pieces(model, load_in_bits=config.load_in_bits, chat_template=template)
    register_files(loaded.model, key)
    if config.fine_tune_type != "full":
        holders.add(loaded)
    return loaded


def _shared_copy_if_possible(loaded: LoadedModel) -> LoadedModel | None:
    """A shared copy; None for a family whose modules mlx cannot freeze or unfreeze, which is loaded again."""
    try:
        return shared_copy(loaded)
    except AttributeError:
        return None


def shared_copy(loaded: LoadedModel) -> LoadedModel:
    """A copy of the base model without an adapter. It has new modules but shares all arrays, so it needs no memory."""
    shared = {id(array): array for array in held_arrays(loaded.model)}
    copied = copy.deepcopy(loaded.model, dict(shared))
    detach_adapter(copied)
    copied.unfreeze()
    register_same_files(copied, loaded.model)
    return dataclasses.replace(loaded, model=copied)
