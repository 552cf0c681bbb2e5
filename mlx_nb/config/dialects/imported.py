"""Reads a file, a text or a command line of another program as settings of ours, with a line about every key."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_nb.config.command_lines import program_of, read_command
from mlx_nb.config.dialects.given import Given, accumulation_of, lacks_validation
from mlx_nb.config.dialects.meanings import meaning_of
from mlx_nb.config.dialects.programs import DIALECTS, ByMethod, Dialect, dialect_named, dialect_of
from mlx_nb.config.dialects.records import Line, Meaning, as_yaml, merged, report, written
from mlx_nb.config.fields import SettingError, SettingErrors
from mlx_nb.config.hints import unsectioned
from mlx_nb.config.methods import METHODS, Method
from mlx_nb.config.run_config import LENGTHS, SETTINGS, RunConfig
from mlx_nb.config.yaml_text import Document, load_mapping, read_yaml_file
from mlx_nb.errors import ConfigError

DIALECT = "dialect"  # the key that names the program in a text
_WITHOUT_EFFECT = ("has no effect", "excludes", "is for texts")


@dataclass(frozen=True)
class Imported:
    """Settings read from another program's.

    dialect   the program
    settings  ours, by name; those with a mistake or without an effect are left out, as `lines` say
    lines     one for each key of the file, and for each default of the program that differs from ours
    """

    dialect: str
    settings: Mapping[str, Any]
    lines: tuple[Line, ...]
    name: str = ""

    @property
    def missing(self) -> tuple[Line, ...]:
        """The lines that would change what is trained, and are not here."""
        return tuple(line for line in self.lines if line.status == "not here")

    @property
    def config(self) -> RunConfig:
        """The settings as a RunConfig. Raises ConfigError if something that a run needs is missing."""
        return RunConfig.from_dict(self.settings)

    @property
    def yaml(self) -> str:
        """The settings as YAML, one a line."""
        return as_yaml(self.settings)

    def cell(self, name: str = "run") -> str:
        """A `%%finetune` cell with the settings."""
        return f"%%finetune --name {name}\n{self.yaml}".rstrip()

    def refuse_missing(self) -> None:
        """Raise ConfigError with one line for each key that is not here."""
        if self.missing:
            where = f"{self.name}, " if self.name else ""
            lines = [f"{where}{' '.join(str(line).split())}" for line in self.missing]
            advice = "`%finetune import` and `mlx-nb import` write the other settings."
            raise ConfigError("\n".join([*lines, f"These settings of {self.dialect} are not here. {advice}"]))

    def __str__(self) -> str:
        note = DIALECTS[self.dialect].note
        title = f"{self.name or 'These settings'}, read as settings of {self.dialect}:"
        return report(f"{title}\n{note}" if note else title, self.lines)


def import_settings(source: str | Path, dialect: str | None = None, **overrides: Any) -> Imported:
    """Settings of another program, as ours.

    `source` is a file (YAML or JSON), its text, or a command line such as `mlx_lm.lora --model ... --train`. `dialect`
    names the program, None = recognized by its words. `overrides` are settings of ours that replace what was read.
    Raises ConfigError in one line for a text that cannot be read, for a command that does not train, and if no program
    is recognized.
    """
    document, program = _read(source)
    named = document.values.get(DIALECT) if dialect is None else dialect
    found = dialect_named(str(named)) if named is not None else dialect_of(document, program)
    if found is None:
        raise ConfigError(
            f"{document.name or 'the text'} has no setting by which another program is recognized. If it is for "
            f"another, name it with `dialect`: {', '.join(sorted(DIALECTS))}. If not, it can be used as it is."
        )
    return _imported(document, found, overrides, from_file=not program)


def is_foreign(source: str | Path) -> bool:
    """Whether a file is another program's, or a text says so in `dialect`. Raises ConfigError if it is unreadable."""
    document, _ = _read(source)
    if DIALECT in document.values:
        return True
    return bool(document.name) and dialect_of(document) is not None and not _ours(document)


def read_settings(source: str | Path, **overrides: Any) -> tuple[RunConfig, Imported | None]:
    """The settings of YAML text or a file, ours or another program's; with what was imported if they are another's.

    A text is another program's if it says so in `dialect`, a file also by words that only one program has. Raises
    ConfigError as `RunConfig.from_yaml` and `import_settings` do, and for settings that are not here.
    """
    if not isinstance(source, str | Path) or not is_foreign(source):
        return RunConfig.from_yaml(source, **overrides), None
    imported = import_settings(source, **overrides)
    imported.refuse_missing()
    return imported.config, imported


def _ours(document: Document) -> bool:
    return all(key in SETTINGS for key in document.values)


def _read(source: str | Path) -> tuple[Document, str]:
    """The document, and the program of a command line ("" = it is a file or a text)."""
    name = ""
    if isinstance(source, Path) or ("\n" not in source and Path(source).suffix in (".yaml", ".yml", ".json")):
        if program_of(str(source)) is None:
            path = Path(source).expanduser()
            source, name = read_yaml_file(path), str(path)
    source = str(source)
    command = read_command(source, name)
    if command is None:
        return load_mapping(source, name), ""
    if not command.values:  # a command that is not for training
        raise ConfigError(command.problems[0][1])
    if command.values.get("test") and not command.values.get("train"):
        adapter = command.values.get("adapter_path", "adapters")
        raise ConfigError(
            "the command measures an adapter and trains nothing. Here it is "
            f"`mlx-nb evaluate {shlex.quote(str(adapter))} --split test`."
        )
    values = dict(command.values)
    config = values.pop("config", values.pop("c", None))
    if config is not None:
        inner = load_mapping(read_yaml_file(Path(str(config)).expanduser()), str(config))
        values = {**inner.values, **values}
    return dataclasses.replace(command, values=values, problems=()), program_of(source) or ""


def _imported(document: Document, dialect: Dialect, overrides: Mapping[str, Any], *, from_file: bool) -> Imported:
    flat = list(unsectioned(document.values))
    around = {word: value for _, word, value in flat}
    lines: list[Line] = []
    settings: dict[str, Any] = {}
    for path, word, value in flat:
        if word == DIALECT:
            continue
        meaning = meaning_of(Given(word, value, around, dialect, from_file))
        mark = document.mark(*path)
        lines.append(Line(".".join(path), value, meaning, mark[0] if mark else None))
        merged(settings, meaning.becomes)
    _add_defaults(settings, lines, dialect, around)
    merged(settings, overrides)
    lines, settings = _checked(settings, lines)
    return Imported(dialect.name, settings, tuple(lines), document.name)


def _add_defaults(settings: dict[str, Any], lines: list[Line], dialect: Dialect, around: Mapping[str, Any]) -> None:
    """Add the program's defaults for what its file leaves out, where they are not ours."""
    method = METHODS.get(str(settings.get("method", "sft")), METHODS["sft"])
    if isinstance(settings.get("lr_schedule"), str):
        settings["lr_schedule"] = {"name": settings["lr_schedule"]}
    for name, given in dialect.defaults.items():
        value = given.of(method.name) if isinstance(given, ByMethod) else given
        if name in settings and not isinstance(settings[name], Mapping):
            continue
        if not _applies(name, method, settings) or (name == "steps_per_eval" and lacks_validation(dialect, around)):
            continue
        if isinstance(value, Mapping):
            there = {*settings.get(name, {}), *(["warmup"] if "warmup_ratio" in around else [])}
            value = {key: item for key, item in value.items() if key not in there}
            if not value:
                continue
        if dialect.micro and name in ("iters", "steps_per_eval"):
            value = max(1, value // accumulation_of(around))
        ours = SETTINGS[name].default
        note = f"ours is {written(ours)}" if isinstance(ours, str | int | float) else ""
        lines.append(Line(name, value, Meaning("default", {name: value}, note)))
        merged(settings, {name: value})


def _applies(name: str, method: Method, settings: Mapping[str, Any]) -> bool:
    """Whether a default has an effect with the method and the settings that were given."""
    if not method.uses(name, SETTINGS[name].metadata["only_for"]):
        return False
    if name == "loss_on":
        return method.row_kind == "tokens"
    if name in LENGTHS:
        return not any(settings.get(other) for other in LENGTHS)
    return name != "optimizer_config" or settings.get("optimizer", "adam") in ("adam", "adamw")


def _checked(settings: dict[str, Any], lines: list[Line]) -> tuple[list[Line], dict[str, Any]]:
    """Without the settings that a run would refuse; their lines say why."""
    for _ in range(len(settings) + 1):
        problems = _problems(settings)
        if not problems:
            break
        for problem in problems:
            name, message = problem.path[0], str(problem)
            quiet = any(words in message for words in _WITHOUT_EFFECT)
            settings.pop(name, None)
            at = next((index for index, line in enumerate(lines) if name in line.meaning.becomes), None)
            if at is None:
                if not any(line.key == name and line.number is None for line in lines):
                    lines.append(Line(name, None, Meaning("not here", {}, message)))
            elif lines[at].status == "default" and quiet:
                del lines[at]
            else:
                lines[at] = dataclasses.replace(
                    lines[at], meaning=Meaning("ignored" if quiet else "not here", {}, message)
                )
        if all(problem.path[0] not in settings for problem in problems) and not settings:
            break
    return lines, settings


def _problems(settings: Mapping[str, Any]) -> tuple[SettingError, ...]:
    try:
        RunConfig(**settings)
    except SettingErrors as several:
        return tuple(several.errors)
    except SettingError as error:
        return (error,)
    return ()
