"""`%config Finetune`: what a person prefers in every notebook; `c.Finetune.background = "never"` in IPython's file."""

from __future__ import annotations

import os
from typing import Any

from traitlets import Enum, Unicode, observe
from traitlets.config import Configurable

_CACHE = "MLX_NB_CACHE"


class Finetune(Configurable):
    """What `%%finetune` does where a cell does not say."""

    background = Enum(
        ("auto", "always", "never"),
        "auto",
        help="Train in the background: where somebody has the notebook open (auto), always, or never.",
    ).tag(config=True)
    cache_folder = Unicode("", help="Folder for fetched and converted models; empty = the usual one.").tag(config=True)

    _before: str | None = None

    def __init__(self, **options: Any) -> None:
        self._before = os.environ.get(_CACHE)
        super().__init__(**options)

    @property
    def wait(self) -> bool | None:
        """Whether a cell waits for its run; None = where nobody looks."""
        return {"auto": None, "always": False, "never": True}[self.background]

    @observe("cache_folder")
    def _on_cache_folder(self, change: Any) -> None:
        if change.new:
            os.environ[_CACHE] = change.new
        else:
            self.close()

    def close(self) -> None:
        """Give the cache folder back."""
        if self._before is None:
            os.environ.pop(_CACHE, None)
        else:
            os.environ[_CACHE] = self._before
