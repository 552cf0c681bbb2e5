"""Values that settings can take in this notebook: variables with rows, models (and their download), rewards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_nb.data.sources.tables import could_be_rows
from mlx_nb.errors import counted


def row_variables(namespace: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (name, short description) of each variable that holds rows, except names that begin with `_`."""
    for name, value in namespace.items():
        if name.startswith("_") or not could_be_rows(value):
            continue
        if isinstance(value, list | tuple):
            if value and isinstance(value[0], Mapping):
                yield name, counted(len(value), "row")
        elif isinstance(value, Mapping):
            if value and all(could_be_rows(one) for one in value.values()):
                yield name, f"splits {', '.join(map(str, value))}"[:60]
        else:
            yield name, f"a {type(value).__name__} in this notebook"


def available_models() -> dict[str, str]:
    """The models that load without a download, mapped to their location."""
    from mlx_nb.model.model_source import available_models

    return available_models()


def downloaded_model(model: str) -> Path:
    """The folder of a model, which is downloaded if necessary. Raises ModelError."""
    from mlx_nb.model.backend import prepare_backend

    prepare_backend()
    from mlx_nb.model.model_source import model_folder

    return model_folder(model)


def built_in_rewards() -> dict[str, str]:
    """The built-in reward functions, as written in a setting, mapped to their help text."""
    from mlx_nb.rollouts.rewards.builtin import REWARDS

    return {
        name if one.example is None else f"{{{name}: {one.example}}}": one.function.__doc__ or ""
        for name, one in REWARDS.items()
    }
