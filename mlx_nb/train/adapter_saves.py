"""Writes the adapters of a run to its folder: the last one, those of `save_every`, and the best one."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_nb.config.run_config import RunConfig
from mlx_nb.files.written_files import ADAPTER_FILE, BEST_FOLDER
from mlx_nb.model import adapters


class AdapterSaves:
    """Writes the adapter attached to `model` at `keys` to `folder` with `write_file`.

    `base` (a `base_identity`) and `use` (how to load the adapter) are stored in adapter_config.json.
    """

    def __init__(
        self,
        model: nn.Module,
        keys: tuple[str, ...],
        folder: Path,
        write_file: adapters.Write,
        base: dict[str, Any] | None,
        loading_info: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.write_file = write_file
        # The adapter of the best update; None before the first, and for `full`, where it would be a second model.
        self.best: dict[str, mx.array] | None = None
        self.best_is_stale = False  # whether best/ may hold a different adapter
        self._model = model
        self._keys = keys
        self._base = base
        self._loading_info = loading_info

    def save(self, config: RunConfig, update: int, kind: str) -> Path:
        """Write the adapter of `update` as `last`, `best` or `step`. Returns the path of its weights."""
        if kind == "step":
            self.save_to(self.folder, config, update, f"{update:07d}_{ADAPTER_FILE}")
        return self.save_to(self.folder / BEST_FOLDER if kind == "best" else self.folder, config, update)

    def save_to(
        self,
        folder: Path,
        config: RunConfig,
        update: int | None,
        file_name: str = ADAPTER_FILE,
        *,
        write: adapters.Write | None = None,
        weights: dict[str, mx.array] | None = None,
    ) -> Path:
        """Write the current adapter, or `weights` of an earlier update, to any folder. Returns the path of the file."""
        return adapters.save_adapter(
            self._model,
            self.description(config, update),
            folder,
            file_name,
            write=write or self.write_file,
            weights=weights,
        )

    def description(self, config: RunConfig, update: int | None) -> dict[str, Any]:
        """The contents of adapter_config.json for the adapter of `update`."""
        return adapters.adapter_description(
            config, self._keys, base=self._base, loading_info=self._loading_info, update=update
        )

    def restore_best(self, config: RunConfig, best_step: int | None) -> None:
        """After a rewind or resume, write the adapter of the best update to best/.

        Does nothing if best/ holds it already, or if neither the run nor the folder has a best adapter.
        """
        folder, best = self.folder / BEST_FOLDER, self.best
        there = (folder / ADAPTER_FILE).is_file()
        if best is not None and (best_step or there) and not _holds(folder, best):
            self.save_to(folder, config, best_step, weights=best)
        self.best_is_stale = False
        if config.fine_tune_type == "full":
            self.best = None


def _holds(folder: Path, weights: dict[str, mx.array]) -> bool:
    """Whether the adapter in a folder equals `weights` bit for bit."""
    try:
        there = typing.cast(dict[str, mx.array], mx.load(str(folder / ADAPTER_FILE)))
    except (OSError, RuntimeError, ValueError):
        return False
    return there.keys() == weights.keys() and all(bool(mx.array_equal(there[name], weights[name])) for name in there)
