"""What takes a module's place while a graph is built; whoever puts it there takes it away again."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn


class ModuleProxy:
    """All but the call, which each kind of stand-in defines, is the module's own, its class included."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # models ask which kind a module is
        return type(self._module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __getitem__(self, name: str) -> Any:
        return self._module[name]

    def __contains__(self, name: str) -> bool:
        return name in self._module
