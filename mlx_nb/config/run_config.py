"""RunConfig: the settings of a run, read from Python, a dict or YAML, and checked together."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path, PurePath
from typing import Any, ClassVar

import yaml

from mlx_nb.config.checks import problems_of
from mlx_nb.config.command_lines import read_command
from mlx_nb.config.fields import SettingError, SettingErrors, coerce, function_name, kinds_of, names_given, plain
from mlx_nb.config.hints import foreign_settings, inner_hint, value_hint
from mlx_nb.config.methods import METHODS
from mlx_nb.config.mixture_sources import is_mixture, is_source, source_problem
from mlx_nb.config.optimizers import arguments_of, has_no_decay
from mlx_nb.config.settings import DeclaredSettings, LoraParameters, LrSchedule
from mlx_nb.config.yaml_text import Document, load_mapping, read_yaml_file
from mlx_nb.errors import ConfigError, listed_problems, shown


@dataclass(frozen=True, init=False)
class RunConfig(DeclaredSettings):
    """All settings of a run. Frozen; `replace` gives a changed, checked copy.

    Relative paths in it are relative to `working_folder`, None = the process's working folder. Raises ConfigError if a
    setting is unknown, of the wrong type, out of bounds, or would have no effect.
    """

    working_folder: ClassVar[Path | None] = None

    @property
    def given(self) -> frozenset[str]:
        """Names of the settings that were given; synonyms count as the settings they stand for."""
        return frozenset(".".join(_OTHER_NAMES.get((name,), (name,))) for name in super().given)

    def __init__(self, **values: Any) -> None:
        kinds = kinds_of(RunConfig)
        foreign = list(foreign_settings(values, SETTINGS, _GROUPS, takes_value))
        errors, refused = [], set()
        # A setting given under another program's name is checked together with the others.
        meant = {one.meant: one.value for one in foreign if one.meant and one.meant not in values}
        named = {one.meant: one for one in foreign if one.meant in meant}
        if str(values.get("fine_tune_type")) in METHODS and "method" not in values:
            meant["method"] = values["fine_tune_type"]
        for name, declared in SETTINGS.items():
            value, default = values.get(name, _MISSING), _default_of(declared)
            if name in meant:
                fits = meant[name] is not None and takes_value(name, meant[name])
                value = meant[name] if fits else _MISSING
                refused |= set() if fits else {name}
            try:
                taken = default if value is _MISSING else _converted(name, value, declared, kinds[name])
            except SettingErrors as several:
                errors += [inner_hint(one, values, SETTINGS, takes_value) for one in several.errors]
            except SettingError as error:
                error = SettingError(error.path, f"{error}{value_hint(name, value)}")
                errors.append(inner_hint(error, values, SETTINGS, takes_value))
            else:
                object.__setattr__(self, name, taken)
                continue
            refused.add(name)
            object.__setattr__(self, name, default)
        problems = [*_merge_synonyms(self), *problems_of(self, refused, set(values))]
        errors += [problem for problem in problems if problem.path[0] not in named]
        for one in foreign:
            own = [problem for problem in problems if named.get(problem.path[0]) is one]
            errors.append(one.with_problems(own))
        if errors:
            order = {key: index for index, key in enumerate(map(str, values))}
            errors.sort(key=lambda error: order.get(error.path[0], len(order)))
            raise errors[0] if len(errors) == 1 else SettingErrors(errors)
        _resolve_overlaps(self)

    @classmethod
    def from_dict(cls, values: Mapping[Any, Any], document: Document | None = None) -> RunConfig:
        """From a flat dict of settings. Raises ConfigError with one line for each that is unknown or wrong.

        `document` is the text that they were read from: each line then begins with file, line and column.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"settings are a dict such as {{'iters': 100}}, not {shown(values)}.")
        document = document or Document({})
        problems: list[tuple[tuple[int, int] | None, str]] = list(document.problems)
        unnamed = [key for key in values if not isinstance(key, str)]
        problems += [(document.mark(str(key)), f"the name of a setting is text, not {shown(key)}.") for key in unnamed]
        try:
            config = cls(**{key: value for key, value in values.items() if isinstance(key, str)})
        except (SettingError, SettingErrors) as error:
            errors = error.errors if isinstance(error, SettingErrors) else (error,)
            problems += [(_mark_of(document, one.path), str(one)) for one in errors]
        if problems:
            problems.sort(key=lambda problem: problem[0] or _AT_THE_END)
            raise ConfigError(listed_problems([document.located(mark, message) for mark, message in problems]))
        return config

    @classmethod
    def from_yaml(cls, source: str | Path, **overrides: Any) -> RunConfig:
        """From YAML text or the path of a YAML file; `overrides` take precedence over the file.

        Raises ConfigError in one line for text that is not YAML, otherwise with one line for each mistake.
        """
        if not isinstance(source, str | Path):
            way = " A dict of settings is for `RunConfig.from_dict`." if isinstance(source, Mapping) else ""
            raise ConfigError(f"settings are read from YAML text or the path of a YAML file, not {shown(source)}.{way}")
        name = ""
        if isinstance(source, Path) or _looks_like_path(source):
            path = Path(source).expanduser()
            source, name = read_yaml_file(path), str(path)
        document = read_command(source, name) or load_mapping(source, name)
        marks = {path: mark for path, mark in document.marks.items() if path[0] not in overrides}
        given = {key: value for key, value in document.values.items() if key not in overrides}
        return cls.from_dict({**given, **overrides}, dataclasses.replace(document, marks=marks))

    def replace(self, **changes: Any) -> RunConfig:
        """A changed, checked copy with the same working folder. What was given before still counts as given."""
        kept = {**self.to_dict(), **{name: getattr(self, name) for name in FUNCTIONS}}
        other = changes.get("optimizer")
        if other not in (None, self.optimizer) and (has_no_decay(self.optimizer) or has_no_decay(other)):
            del kept["weight_decay"]  # the new optimizer has none, and the old one's is not a choice for the new one
        given = {name for name in self.given if name.partition(".")[0] not in changes} | names_given(changes)
        result: RunConfig = RunConfig.from_dict({**kept, **changes}).with_given(given).at(self.working_folder)
        return result

    def at(self, working_folder: Path | None) -> RunConfig:
        """A copy whose relative paths are relative to `working_folder`, wherever the process changes to."""
        other = copy.copy(self)
        object.__setattr__(other, "working_folder", working_folder)
        return other

    def located(self, name: str) -> str | None:
        """The setting `name`, made absolute if it is a relative path of something that exists."""
        return located(getattr(self, name), self.working_folder)

    def with_live(self, **changes: Any) -> RunConfig:
        """A copy with live settings changed, and settings that depend on them.

        A new `learning_rate` also becomes the start of the schedule's arguments; `iters` and `epochs` replace each
        other; without `sample_prompts` or `loss_spike` the settings about them return to their defaults.
        """
        further: dict[str, Any] = {}
        for name, other in (("iters", "epochs"), ("epochs", "iters")):
            if changes.get(name) is not None:
                further[other] = None
        for name, others in _SWITCHES.items():
            if name in changes and changes[name] is None:
                further |= {other: SETTINGS[other].default for other in others}
        if "learning_rate" in changes and self.lr_schedule.arguments:
            schedule = dataclasses.asdict(self.lr_schedule)
            arguments = [changes["learning_rate"], *self.lr_schedule.arguments[1:]]
            further["lr_schedule"] = {**schedule, "arguments": arguments}
        return self.replace(**{**further, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML or JSON; `from_dict` reads them back."""
        values = {name: getattr(self, name) for name in SETTINGS}
        for name, value in values.items():
            if name in FUNCTIONS and value is not None:
                values[name] = [function_name(one) if callable(one) else one for one in value]
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                values[name] = {key: _plain(item) for key, item in dataclasses.asdict(value).items()}
            else:
                values[name] = _plain(value)
        return values

    def to_yaml(self) -> str:
        """The settings that differ from their defaults, as the body of a `%%finetune` cell.

        Rows in memory are only mentioned.
        """
        changed = self.changed()
        unnamed = "" if "data" in self.described() else "# data: rows in memory; write the name of their variable\n"
        return unnamed + (yaml.safe_dump(changed, sort_keys=False, allow_unicode=True) if changed else "")

    def described(self) -> dict[str, Any]:
        """Every setting as a plain value, without the rows themselves if `data` is an object in memory."""
        return {name: value for name, value in self.to_dict().items() if name != "data" or _names_files(value)}

    def changed(self) -> dict[str, Any]:
        """The settings of `described` that differ from their defaults."""
        standard = _defaults()
        return {name: value for name, value in self.described().items() if value != standard[name]}


@functools.cache
def _defaults() -> Mapping[str, Any]:
    """Every setting at its default, as `to_dict` gives it."""
    return types.MappingProxyType(RunConfig().to_dict())


def located(text: str | None, working_folder: Path | None) -> str | None:
    """`text`, made absolute if it is a relative path of something that exists in `working_folder`."""
    if not text or working_folder is None:
        return text
    try:
        path = working_folder / Path(text).expanduser()
        return str(path) if path.exists() else text
    except (OSError, ValueError, RuntimeError):  # a template, or other text that cannot be a path
        return text


def _names_files(data: Any) -> bool:
    """Whether `data` is a name, or a mixture of names."""
    if isinstance(data, list):
        return all(isinstance(one, str) or (is_source(one) and isinstance(one["path"], str)) for one in data)
    return isinstance(data, str)


def _converted(name: str, value: Any, declared: dataclasses.Field[Any], kind: Any) -> Any:
    """The value of a setting as it is stored. Raises SettingError or SettingErrors."""
    if name == "data":
        return _data(value)
    if name in FUNCTIONS and value is not None:
        return _functions(name, value)
    return coerce(value, declared, kind)


def _data(value: Any) -> Any:
    """`data` with names as text and weights as numbers; objects with rows are returned unchanged."""
    if isinstance(value, str | PurePath):
        if not str(value).strip():
            raise SettingError(("data",), "`data` is empty. It takes a name, or rows.")
        return plain(value, ("data",))
    if value is None or isinstance(value, bool | int | float):
        raise SettingError(("data",), f"`data` cannot be {shown(value)}. It takes a name, or rows.")
    if not is_mixture(value):
        return value
    for index, one in enumerate(value):
        if (problem := source_problem(one, index + 1)) is not None:
            key, message = problem
            raise SettingError(("data", str(index), *([key] if key else [])), message)
    sources: list[Any] = []
    for index, one in enumerate(value):
        path = ("data", str(index))
        if not isinstance(one, Mapping):
            sources.append(plain(one, path))
            continue
        rows = one["path"]
        rows = plain(rows, (*path, "path")) if isinstance(rows, str | PurePath) else rows
        sources.append({"path": rows, **plain({key: one[key] for key in one if key != "path"}, path)})
    return sources


def _functions(name: str, value: Any) -> Any:
    """`rewards` or `metrics` as a list or tuple of names, functions and mappings of one name to plain values."""
    entries = value if isinstance(value, list | tuple) else (value,)
    for entry in entries:
        named = isinstance(entry, str) or (isinstance(entry, Mapping) and len(entry) == 1)
        if not named and not callable(entry):
            raise SettingError(
                (name,),
                f"`{name}` cannot hold {shown(entry)}. It takes names, functions, and mappings with one key.",
            )
    return type(entries)(
        entry if callable(entry) else plain(entry, (name, str(index))) for index, entry in enumerate(entries)
    )


def takes_value(name: str, value: Any) -> bool:
    """Whether the setting `name`, which must exist, takes `value`."""
    try:
        _converted(name, value, SETTINGS[name], kinds_of(RunConfig)[name])
    except ConfigError:
        return False
    return True


def unknown_settings(values: Mapping[str, Any]) -> list[SettingError]:
    """One error for each name in `values` that is not a setting."""
    return [one.error for one in foreign_settings(values, SETTINGS, _GROUPS, takes_value)]


def _default_of(declared: dataclasses.Field[Any]) -> Any:
    if declared.default_factory is not dataclasses.MISSING:
        return declared.default_factory()
    return declared.default


def _mark_of(document: Document, path: tuple[str, ...]) -> tuple[int, int] | None:
    """Where a setting is in the text, under either of its names."""
    return document.mark(*path) or document.mark(*_OTHER_NAMES.get(path, ()))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _looks_like_path(source: str) -> bool:
    return "\n" not in source and ":" not in source[2:] and source.strip().endswith((".yaml", ".yml"))


def _merge_synonyms(config: RunConfig) -> Iterator[SettingError]:
    """Fold the synonyms `target_modules` and `warmup` into the settings they stand for."""
    if config.target_modules is not None:
        keys = config.lora_parameters.keys
        if keys is not None and keys != config.target_modules:
            yield SettingError(
                ("target_modules",), "`target_modules` and `lora_parameters.keys` differ. Give one of them."
            )
        merged = dataclasses.replace(config.lora_parameters, keys=config.target_modules)
        object.__setattr__(config, "lora_parameters", merged)
        object.__setattr__(config, "target_modules", None)
    if config.warmup is not None:
        if config.lr_schedule.warmup not in (None, config.warmup):
            yield SettingError(("warmup",), "`warmup` and `lr_schedule.warmup` differ. Give one of them.")
        object.__setattr__(config, "lr_schedule", dataclasses.replace(config.lr_schedule, warmup=config.warmup))
        object.__setattr__(config, "warmup", None)


def _resolve_overlaps(config: RunConfig) -> None:
    """Resolve overlapping settings into one learning rate, one weight decay and the arguments of one optimizer."""
    if has_no_decay(config.optimizer):
        object.__setattr__(config, "weight_decay", 0.0)
    if config.lr_schedule.arguments is not None:
        object.__setattr__(config, "learning_rate", config.lr_schedule.arguments[0])
    arguments = dict(arguments_of(config.optimizer, config.optimizer_config))
    if "weight_decay" in arguments:
        object.__setattr__(config, "weight_decay", float(arguments.pop("weight_decay")))
    object.__setattr__(config, "optimizer_config", arguments)


SETTINGS: dict[str, dataclasses.Field[Any]] = {declared.name: declared for declared in fields(RunConfig)}
LIVE_SETTINGS: tuple[str, ...] = tuple(name for name, declared in SETTINGS.items() if declared.metadata["live"])
RunConfig.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_default_of(declared))
        for name, declared in SETTINGS.items()
    ]
)
FUNCTIONS = ("rewards", "metrics")  # settings with functions of the notebook
LENGTHS = ("iters", "epochs")  # a run has one of them
PATHS = ("data", "model", "resume_adapter_file", "reference_model", "reference_adapter", "chat_template")
# Live settings that switch something off with null, and the settings that depend on them.
_SWITCHES = {"sample_prompts": ("sample_every", "sample_tokens"), "loss_spike": ("spike_patience",)}
_MISSING = object()
_AT_THE_END = (2**31, 0)
_OTHER_NAMES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("warmup",): ("lr_schedule", "warmup"),
    ("target_modules",): ("lora_parameters", "keys"),
}
_GROUPS = {
    "lora_parameters": tuple(declared.name for declared in fields(LoraParameters)),
    "lr_schedule": tuple(declared.name for declared in fields(LrSchedule)),
}
