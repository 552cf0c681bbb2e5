"""`%config Finetune`: how `%%finetune` behaves, in this notebook or, with `c.Finetune` in a file, in all."""

from __future__ import annotations

import os
from typing import Any

import traitlets
from traitlets.config import Configurable

_CACHE = "MLX_NB_CACHE"


class Finetune(Configurable):
    """What is not of one run. `%config Finetune` lists it, `%config Finetune.wait = True` changes it."""

    wait = traitlets.Bool(
        None,
        allow_none=True,
        help="Cells stay until the run pauses or ends (True, as with --wait), or return at once (False, as with "
        "--background). None: they return where somebody has the notebook open, and queued cells wait.",
    ).tag(config=True)
    refresh_seconds = traitlets.Float(
        0.3, min=0.05, help="Least time between two refreshes of a panel that is shown next."
    ).tag(config=True)
    snapshot_memory = traitlets.Int(
        None, allow_none=True, min=0, help="`snapshot_memory` of cells that do not give it, MB. None: its default."
    ).tag(config=True)
    cache_folder = traitlets.Unicode(
        "", help="Where models are kept that were downloaded or converted. Empty: MLX_NB_CACHE, or the user's cache."
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
        """Bring back the cache folder of before: the extension is being unloaded."""
        self.cache_folder = ""
