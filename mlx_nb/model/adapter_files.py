"""Reads an adapter on disk: its files, its shape and base model, and the settings that a run takes over from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_nb.config.methods import method_named
from mlx_nb.config.run_config import RunConfig
from mlx_nb.config.settings import LoraParameters
from mlx_nb.errors import ConfigError, ModelError, shown
from mlx_nb.files.places import path_problem, suggest_path
from mlx_nb.files.typed_json import WrongJson, json_object, read_as
from mlx_nb.files.written_files import ADAPTER_FILE, CONFIG_FILE, PEFT_FILE
from mlx_nb.model.fingerprint import base_identity, weights_fingerprint
from mlx_nb.model.loading import load_skeleton
from mlx_nb.model.model_source import model_folder, model_named
from mlx_nb.model.peft_files import RECORD, NotHeld, PeftAdapter, read_peft
from mlx_nb.model.tensor_names import Header, place, read_header

START, REFERENCE = "resume_adapter_file", "reference_adapter"
SCALE = "lora_parameters.scale"
_PICKLED = "adapter_model.bin"


@dataclass(frozen=True)
class AdapterFile:
    """An adapter in mlx-lm's format or in PEFT's.

    setting   the setting that names it, for messages
    weights   its safetensors file
    config    its adapter_config.json; None for a file without one
    shape     the shape in adapter_config.json as flat settings: fine_tune_type, num_layers, lora_parameters.rank, ...
    modules   paths of the modules with low-rank matrices, relative to their layer if they are in one
    layers    the number of layers that it changes
    model     the name of the model it was trained on; None if it is not recorded
    base      the `base_identity` of that model; None if it is not recorded
    peft      its contents if it is in PEFT's format
    """

    setting: str
    weights: Path
    config: Path | None
    shape: dict[str, Any]
    modules: tuple[str, ...]
    layers: int
    model: str | None
    base: dict[str, Any] | None
    peft: PeftAdapter | None = None

    def shape_on(self, model: nn.Module) -> dict[str, Any]:
        """Its shape as flat settings on this model."""
        return self.shape if self.peft is None else self.peft.shape_on(model)


def open_adapter(source: str, setting: str) -> AdapterFile:
    """The adapter in the folder or file `source`. Raises ModelError in one line.

    It is in mlx-lm's format, or in PEFT's.
    """
    try:
        path = Path(source).expanduser()
        problem = path_problem(path)
    except RuntimeError as error:
        problem = str(error).rstrip(".")
    if problem is not None:
        raise ModelError(f"{setting}: {shown(source)} cannot be a file or folder: {problem}.")
    try:
        path = Path(source).expanduser()
        weights = adapter_weights_file(path)
        config = weights.parent / CONFIG_FILE
        described = _described(config, setting) if config.is_file() else None
        if (weights.parent / _PICKLED).is_file() and not weights.is_file():
            raise ModelError(
                f"{setting}: {path} is a PEFT adapter in {_PICKLED}, a pickle, which may run any code and is not read. "
                f"Save it as {PEFT_FILE}, which is PEFT's default."
            )
        if described is None and (setting == REFERENCE or weights.name == PEFT_FILE):
            raise ModelError(f"{setting}: {path} has no {CONFIG_FILE}. Give the folder of an adapter, or `none`.")
        if not weights.is_file():
            saved = Path("adapters", source)
            hint = (
                f" Did you mean {str(saved)!r}?"
                if (saved / ADAPTER_FILE).is_file()
                else suggest_path(source, _is_adapter)
            )
            raise ModelError(
                f"{setting}: no such file: {weights}.{hint} Give an {ADAPTER_FILE} or the folder with one."
            )
        header = read_header(weights, setting)
    except (OSError, ValueError, RuntimeError) as error:  # ValueError and RuntimeError: not a valid path
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{setting}: {shown(source)} cannot be read: {reason}.") from None
    if described is not None and (weights.name == PEFT_FILE or described.get("peft_type") is not None):
        return _peft_adapter(setting, weights, config, described, header)
    names = list(header.shapes)
    places = [place(name) for name in names]
    layers = len({layer for layer, _ in places if layer is not None})
    facts = described or {}
    ours = facts.get("mlx_nb") or {}
    return AdapterFile(
        setting,
        weights,
        None if described is None else config,
        {} if described is None else _shape(facts, names, layers, all(layer is not None for layer, _ in places)),
        tuple(dict.fromkeys(inner.removesuffix(".lora_a") for _, inner in places if inner.endswith(".lora_a"))),
        layers,
        ours.get("model") or facts.get("model"),
        ours.get("base"),
    )


def adapter_weights_file(path: Path) -> Path:
    """The weights file of the adapter in a folder, in mlx-lm's format or in PEFT's. Any other path is that file."""
    if not path.is_dir():
        return path
    peft_alone = (path / PEFT_FILE).is_file() and not (path / ADAPTER_FILE).is_file()
    return path / (PEFT_FILE if peft_alone else ADAPTER_FILE)


def _peft_adapter(
    setting: str, weights: Path, config: Path, described: Mapping[str, Any], header: Header
) -> AdapterFile:
    try:
        peft = read_peft(described, header)
    except NotHeld as error:
        raise ModelError(f"{setting}: {weights.parent} is a PEFT adapter that MLX cannot hold: {error}.") from None
    except WrongJson as error:
        raise ModelError(f"{setting}: {config} cannot be used: {error}.") from None
    ours = _recorded(header.metadata.get(RECORD))
    places = [module.place for module in peft.modules]
    return AdapterFile(
        setting,
        weights,
        config,
        peft.shape(),
        tuple(dict.fromkeys(inner for _, inner in places)),
        len({layer for layer, _ in places if layer is not None}),
        ours.get("model") or peft.model,
        ours.get("base"),
        peft,
    )


def peft_record(folder: Path) -> dict[str, Any]:
    """What mlx_nb recorded in an adapter in PEFT's format; empty for any other. Raises ModelError."""
    weights = folder / PEFT_FILE
    return _recorded(read_header(weights, START).metadata.get(RECORD)) if weights.is_file() else {}


def _recorded(record: Any) -> dict[str, Any]:
    try:
        read = json_object(record.encode()) if isinstance(record, str) else {}
        read_as(_Ours, read, others=True)
    except ValueError:  # only informative
        return {}
    return dict(read)


def _is_adapter(entry: Path) -> bool:
    return entry.suffix == ".safetensors" or adapter_weights_file(entry).is_file()


@dataclass(frozen=True)
class _Base:
    """`base_identity` as stored in an adapter."""

    weights: str
    load_in_bits: int | None = None


@dataclass(frozen=True)
class _Ours:
    """The keys that mlx_nb adds to adapter_config.json."""

    model: str | None = None
    base: _Base | None = None


@dataclass(frozen=True)
class _Description:
    """The keys of adapter_config.json that are read. Their values are validated as settings later."""

    fine_tune_type: str | None = None
    train_type: str | None = None
    num_layers: int | str | None = None
    lora_parameters: dict[str, Any] | None = None
    model: str | None = None
    mlx_nb: _Ours | None = None
    peft_type: str | None = None


def _described(config: Path, setting: str) -> dict[str, Any]:
    try:
        content = json_object(config.read_bytes())
        if not isinstance(content, dict):
            raise WrongJson("it is not an object")
        if isinstance(ours := content.get("mlx_nb"), dict):
            # The other keys are only informative.
            content["mlx_nb"] = {name: ours.get(name) for name in ("model", "base")}
        read_as(_Description, content, others=True)
    except WrongJson as error:
        raise ModelError(
            f"{setting}: {config} cannot be read, so the shape of the adapter is unknown: {error}."
        ) from None
    return content


def _shape(facts: Mapping[str, Any], names: Sequence[str], layers: int, only_layers: bool) -> dict[str, Any]:
    """The shape in adapter_config.json, interpreted like mlx-lm, under the names of our settings."""
    kind = facts.get("fine_tune_type") or facts.get("train_type")  # mlx-lm, mlx-lm-lora
    if kind is None:
        endings = {name.rsplit(".", 1)[-1] for name in names}
        kind = "full" if "lora_a" not in endings else "dora" if "m" in endings else "lora"
    shape: dict[str, Any] = {"fine_tune_type": kind}
    if (count := facts.get("num_layers")) is not None:
        every = isinstance(count, int) and count <= 0
        # In mlx-lm `full` with all layers trains nothing outside the layers.
        shape["num_layers"] = (layers if kind == "full" and only_layers else -1) if every else count
    lora = facts.get("lora_parameters")
    if kind != "full" and isinstance(lora, Mapping):
        known = {declared.name for declared in fields(LoraParameters)}
        shape |= {f"lora_parameters.{name}": value for name, value in lora.items() if name in known}
        shape.setdefault("lora_parameters.keys", None)
    return shape


def with_adapter_settings(config: RunConfig) -> RunConfig:
    """`config` with the shape of its start adapter in place of settings that were not given.

    Raises ModelError if the adapter cannot be read, if a given setting contradicts it (naming both values), or if its
    scale is not recorded.
    """
    if config.resume_adapter_file is None:
        return config
    adapter = open_adapter(str(config.located(START)), START)
    shape = dict(adapter.shape)
    if adapter.peft is not None and adapter.peft.depends_on_model:
        shape = adapter.shape_on(load_skeleton(model_folder(model_named(config)))[0])
    if method_named(config.method).kind.sampled:
        shape.pop("lora_parameters.dropout", None)  # completions are sampled without dropout
    low_rank = shape.get("fine_tune_type", config.fine_tune_type) != "full"
    if low_rank and SCALE not in shape and SCALE not in config.given:
        raise _no_scale(adapter, f", or give {SCALE}")
    described = _as_settings(adapter, shape)
    given = [(name, _value(config, name), _value(described, name)) for name in shape if name in config.given]
    conflicts = [
        f"{name} is {_shown(theirs)} in the adapter and {_shown(ours)} here"
        for name, ours, theirs in given
        if not _agree(name, ours, theirs, adapter, config)
    ]
    if conflicts:
        raise ModelError(
            f"resume_adapter_file: {adapter.weights} has another shape: {'; '.join(conflicts)}. Remove these settings "
            "to use those of the adapter."
        )
    try:
        return filled(config, {name: _value(described, name) for name in shape})
    except ConfigError as error:
        raise ModelError(f"resume_adapter_file: {adapter.config} does not fit this run: {error}") from None


def filled(config: RunConfig, shape: Mapping[str, Any]) -> RunConfig:
    """`config` with the flat settings in `shape` in place of settings that were not given."""
    changes: dict[str, Any] = {}
    for name, value in shape.items():
        if name in config.given:
            continue
        outer, _, inner = name.partition(".")
        if inner:
            group = changes.setdefault(outer, config.to_dict()[outer])
            group[inner] = value
        else:
            changes[outer] = value
    return config.replace(**changes).with_given(config.given) if changes else config


def shape_of(adapter: AdapterFile, model: nn.Module) -> RunConfig:
    """A configuration with the adapter's own shape, to attach it to `model`.

    Raises ModelError if its scale is not recorded.
    """
    if adapter.shape.get("fine_tune_type") != "full" and SCALE not in adapter.shape:
        raise _no_scale(adapter, "")
    return _as_settings(adapter, adapter.shape_on(model))


def _as_settings(adapter: AdapterFile, shape: Mapping[str, Any]) -> RunConfig:
    try:
        return filled(RunConfig(), shape)
    except ConfigError as error:
        raise ModelError(f"{adapter.setting}: {adapter.config}: {error}") from None


def _no_scale(adapter: AdapterFile, otherwise: str) -> ModelError:
    what = f"{adapter.config} does not have" if adapter.config else f"no {CONFIG_FILE} beside {adapter.weights} has"
    return ModelError(
        f"{adapter.setting}: {what} the scale that the adapter was trained with, and it cannot be used without it. "
        f"Restore its {CONFIG_FILE}{otherwise}."
    )


def _value(config: RunConfig, name: str) -> Any:
    outer, _, inner = name.partition(".")
    value = getattr(config, outer)
    return getattr(value, inner) if inner else value


def _agree(name: str, ours: Any, theirs: Any, adapter: AdapterFile, config: RunConfig) -> bool:
    if name == "num_layers" and adapter.shape.get("fine_tune_type") == "full":
        return bool(ours == theirs)
    if name == "num_layers":
        return ours in (theirs, adapter.layers) or (ours == -1 and adapter.layers == _layers_of(config))
    if name != "lora_parameters.keys" or ours is None or ours == theirs:
        return bool(ours == theirs)
    matches = {
        module: [key for key in ours if module == key or module.endswith(f".{key}")] for module in adapter.modules
    }
    return all(matches.values()) and {key for keys in matches.values() for key in keys} == set(ours)


def _layers_of(config: RunConfig) -> int | None:
    """The number of layers of the model; None if it cannot be opened. Reads no weights."""
    try:
        return len(load_skeleton(model_folder(model_named(config)))[0].layers)
    except ModelError:
        return None


def _shown(value: Any) -> str:
    if value is None:
        return "every linear layer"
    return ", ".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)


def check_base(
    adapter: AdapterFile, model: str, folder: Path, load_in_bits: int | None, allowed: Collection[str]
) -> tuple[str, ...]:
    """Compare the base that an adapter was trained on with the model in `folder`. Returns notes.

    Raises ModelError if they differ and "model" is not in `allowed`; equal shapes alone do not make them compatible.
    """
    difference = _base_difference(adapter, model, folder, load_in_bits)
    if not difference:
        unknown = adapter.model is None and adapter.base is None
        return (f"{adapter.setting}: the base model of {adapter.weights} is not recorded.",) if unknown else ()
    if "model" not in allowed:
        raise ModelError(
            f"{adapter.setting}: {adapter.weights} was trained on another base: {difference}. Give that `model`, or "
            "continue anyway with allow_changed=['model'] (`--allow-changed model` in a notebook)."
        )
    return (f"{adapter.setting}: {adapter.weights} was trained on another base: {difference}.",)


def _base_difference(adapter: AdapterFile, model: str, folder: Path, load_in_bits: int | None) -> str:
    """The difference between the bases as text; "" if none is known."""
    names = f"`model: {adapter.model}` in the adapter, `model: {model}` here"
    if adapter.base is not None:
        if adapter.base.get("weights") != base_identity(weights_fingerprint(folder), load_in_bits)["weights"]:
            return names if adapter.model != model else f"the weights of `model: {model}` have changed since"
        bits = adapter.base.get("load_in_bits")
        theirs, ours = (f"`load_in_bits: {'null' if one is None else one}`" for one in (bits, load_in_bits))
        return "" if bits == load_in_bits else f"{theirs} in the adapter, {ours} here"
    if adapter.model is None or adapter.model == model:
        return ""
    try:
        other = Path(adapter.model).expanduser()
        same = other.is_dir() and weights_fingerprint(other) == weights_fingerprint(folder)
    except (OSError, ValueError, RuntimeError):  # not a path, or not one on this machine
        return names
    return "" if same else names
