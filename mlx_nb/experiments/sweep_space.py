"""The settings of a sweep: which of them have several values, and the settings of each of its runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_nb.config.run_config import SETTINGS, takes_value
from mlx_nb.config.yaml_text import load_mapping, read_yaml_file
from mlx_nb.errors import CommandError, ConfigError, shown

MOST_RUNS = 256
SEED = "seed"
# Settings that change what a validation measures, so that its losses cannot be compared.
_OTHER_LOSSES = frozenset(
    name for name, declared in SETTINGS.items() if declared.metadata["group"] in ("method", "rollouts", "model", "rows")
)


def read_settings(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The settings of YAML text, of a YAML file or of a dict, not checked yet. Raises ConfigError."""
    if isinstance(source, Mapping):
        return dict(source)
    if not isinstance(source, str | Path):
        raise ConfigError(f"a sweep takes its settings as YAML text, a file or a dict, not {shown(source)}.")
    return dict(
        load_mapping(read_yaml_file(source), str(source)).values
        if isinstance(source, Path)
        else load_mapping(source).values
    )


def axes_of(settings: Mapping[str, Any]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """The swept settings with their values, and the others.

    A setting is swept if it has a list that it would not take as one value: `learning_rate: [1e-5, 1e-4]`, and
    `lora_parameters: {rank: [8, 32]}` or `lora_parameters.rank: [8, 32]`. A setting that takes a list is swept by a
    list of lists. Raises ConfigError for an empty list.
    """
    axes: dict[str, list[Any]] = {}
    fixed: dict[str, Any] = {}
    for name, value in _nested(settings).items():
        if name not in SETTINGS:
            fixed[name] = value
        elif isinstance(value, Mapping):
            inner = {
                key: one for key, one in value.items() if isinstance(one, list) and not takes_value(name, {key: one})
            }
            axes |= {f"{name}.{key}": values for key, values in inner.items()}
            if rest := {key: one for key, one in value.items() if key not in inner}:
                fixed[name] = rest
        elif isinstance(value, list) and not takes_value(name, value):
            axes[name] = value
        else:
            fixed[name] = value
    for name, values in axes.items():
        if not values:
            raise ConfigError(f"`{name}` has no values to try. Give a list such as [1, 2].")
        if repeated := [one for place, one in enumerate(values) if one in values[:place]]:
            raise ConfigError(f"`{name}` has the value {repeated[0]!r} twice.")
    return axes, fixed


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`lora_parameters.rank: 8` as `lora_parameters: {rank: 8}`."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        outer, dot, inner = str(name).partition(".")
        if dot and outer in SETTINGS:
            group = found.setdefault(outer, {})
            if not isinstance(group, Mapping):
                raise ConfigError(f"`{outer}` is given as {shown(group)} and as `{name}`.")
            found[outer] = {**group, inner: value}
        elif isinstance(value, Mapping) and isinstance(found.get(str(name)), Mapping):
            found[str(name)] = {**found[str(name)], **value}
        else:
            found[str(name)] = value
    return found


def points_of(axes: Mapping[str, list[Any]], trials: int | None, seed: int) -> list[dict[str, Any]]:
    """Every combination of the values, or `trials` of them at random, in the order of the grid.

    Raises ConfigError for nothing to compare, or for more than MOST_RUNS runs.
    """
    points = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    if trials is not None:
        if isinstance(trials, bool) or not isinstance(trials, int) or trials < 2:
            raise ConfigError(f"trials must be a whole number of 2 or more, not {trials!r}.")
        chosen = np.random.default_rng(seed).permutation(len(points))[:trials]
        points = [points[place] for place in sorted(chosen)]
    if len(points) < 2:
        raise ConfigError(
            "a sweep needs a setting with several values, such as `learning_rate: [1e-5, 1e-4, 1e-3]` or "
            "`lora_parameters.rank: [8, 32]`."
        )
    if len(points) > MOST_RUNS:
        raise ConfigError(
            f"these are {len(points)} runs, more than {MOST_RUNS}. `trials` takes some of them at random."
        )
    return points


def settings_at(fixed: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one run: the fixed ones with the values of `point`."""
    return _nested({**fixed, **point}) if point else dict(fixed)


def refuse_incomparable(axes: Mapping[str, list[Any]], fixed: Mapping[str, Any], halving: bool) -> None:
    """Raise CommandError for swept settings with which validations would not measure the same thing."""
    outer = {name: name.partition(".")[0] for name in axes}
    if fixed.get("best_by") is None:
        for name in axes:
            if outer[name] in _OTHER_LOSSES:
                raise CommandError(
                    f"with several values of `{name}` the validation losses are not comparable. Choose a metric of the "
                    "answers to decide, such as `metrics: [exact_match]` with `best_by: exact_match`."
                )
    if "best_by" in axes or "metrics" in axes:
        raise CommandError("`best_by` and `metrics` say what decides the sweep, so they have one value.")
    if "batch_size" in axes and fixed.get("val_batches") != -1:
        raise CommandError(
            "with several values of `batch_size` each validation would measure other rows, because it takes "
            "`val_batches` batches. Add `val_batches: -1`, which takes all rows."
        )
    if halving and (late := [name for name in (SEED, "iters", "epochs", "schedule_iters") if name in axes]):
        raise CommandError(f"halving drops runs by their progress, so `{late[0]}` has one value in it.")
