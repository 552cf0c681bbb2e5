"""Options for all runs of a notebook: `%config Finetune`, or `c.Finetune` in ipython_config.py for all notebooks."""

from __future__ import annotations

import os
from typing import Any

import traitlets
from traitlets.config import Configurable

_CACHE = "MLX_NB_CACHE"


class Finetune(Configurable):
    """Options that do not belong to one run, such as `%config Finetune.wait = True`."""

    wait = traitlets.Bool(
        None,
        allow_none=True,
        help="True: cells wait until the run pauses or ends, as with --wait. False: they return at once, as with "
        "--background. None: they return at once in an interactive notebook, and queued cells wait.",
    ).tag(config=True)
    refresh_seconds = traitlets.Float(
        0.3, min=0.05, help="Seconds between updates of the panel. Affects panels shown from now on."
    ).tag(config=True)
    snapshot_memory = traitlets.Int(
        None, allow_none=True, min=0, help="`snapshot_memory` in MB for cells that do not set it. None: its default."
    ).tag(config=True)
    cache_folder = traitlets.Unicode(
        "", help="Folder for downloaded and converted models. Empty: MLX_NB_CACHE, or the user's cache folder."
    ).tag(config=True)

    def __init__(self, **options: Any) -> None:
        self._cache_before = os.environ.get(_CACHE)
        super().__init__(**options)

    @traitlets.observe("cache_folder")
    def _use_cache_folder(self, change: Any) -> None:
        if change["new"]:
            os.environ[_CACHE] = change["new"]
        elif self._cache_before is None:
            os.environ.pop(_CACHE, None)
        else:
            os.environ[_CACHE] = self._cache_before

    def close(self) -> None:
        """Restore the previous cache folder when the extension is unloaded."""
        self.cache_folder = ""
