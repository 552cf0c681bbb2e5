"""A proxy that temporarily replaces a module while a graph is built. The caller installs and removes it."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn


class ModuleProxy:
    """Forwards everything to the module, including its class. Subclasses define the call."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # models use isinstance on modules
        return type(self._module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __getitem__(self, name: str) -> Any:
        return self._module[name]

    def __contains__(self, name: str) -> bool:
        return name in self._module
