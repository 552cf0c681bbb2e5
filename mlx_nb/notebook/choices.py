"""The possible values of settings and arguments in this notebook, with a short help for each, for completion."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlx_nb.config.checks import MESSAGE_ROLES
from mlx_nb.config.help import choices_of, inner_settings, setting_help, short_help
from mlx_nb.config.methods import METHODS
from mlx_nb.config.optimizers import OPTIMIZERS
from mlx_nb.config.run_config import FUNCTIONS, SETTINGS
from mlx_nb.files.written_files import CHECKPOINTS
from mlx_nb.run.available import available_models, built_in_rewards, row_variables

_MOST_ENTRIES = 300  # in one folder
_ROW_FILES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".gz", ".zst", ".bz2", ".xz")
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_MIXTURE_KEYS = {"path": "rows to mix in, as in `data`", "weight": "share of these rows, relative to the others"}


class Choice(NamedTuple):
    """A possible completion, and its help."""

    text: str
    help: str = ""


def keys(method: str | None, given: Iterable[str] = ()) -> list[Choice]:
    """The settings that have an effect with a method (None = any), except those already given."""
    known = METHODS.get(method) if method else None
    used = [
        name
        for name, declared in SETTINGS.items()
        if name not in given and (known is None or known.uses(name, declared.metadata["only_for"]))
    ]
    helps = {line.name: line.help for line in setting_help()}
    return [Choice(f"{name}: ", short_help(helps[name])) for name in used]


def inner_keys(group: str, optimizer: str = "adamw") -> list[Choice]:
    """The settings inside a group."""
    if group == "data":
        return [Choice(f"{name}: ", help) for name, help in _MIXTURE_KEYS.items()]
    if group == "optimizer_config":
        known = OPTIMIZERS.get(optimizer)
        return [Choice(f"{name}: ", one.words) for name, one in known.arguments.items()] if known else []
    return [Choice(f"{name}: ", short_help(help)) for name, help in inner_settings(group).items()]


def values(
    path: tuple[str, ...], fragment: str, namespace: Mapping[str, Any], body: Mapping[str, str], *, lists: bool = False
) -> list[Choice]:
    """The possible values of the setting at `path`. `body` has the other settings of the cell, as text.

    With `lists`, the elements of a list setting; else its whole value.
    """
    name = path[0]
    if path in (("data",), ("data", "path")):
        return [*_row_variables(namespace), *paths(fragment, lambda path: path.suffix in _ROW_FILES)]
    if name in ("model", "reference_model"):
        return [*_models(), *paths(fragment, lambda path: path.suffix == ".gguf")]
    if name in ("resume_adapter_file", "reference_adapter"):
        bare = [Choice("none", "the bare base")] if name == "reference_adapter" else []
        return [*bare, *adapters(), *paths(fragment, lambda path: path.suffix == ".safetensors")]
    if name == "chat_template":
        return paths(fragment, lambda path: path.suffix in (".jinja", ".txt"))
    if name in FUNCTIONS:
        return _rewards(namespace) if lists else [Choice(f"[{one.text}]", one.help) for one in _rewards(namespace)]
    if path in (("target_modules",), ("lora_parameters", "keys")):
        return [Choice(one) for one in _MODULES] if lists else [Choice("[q_proj, v_proj]", "names of modules")]
    if name.endswith("_feature"):
        return [Choice(one, "column") for one in _columns(namespace.get(body.get("data", "")))]
    if name == "roles" and len(path) > 1:
        return [Choice(one) for one in MESSAGE_ROLES]
    chosen = [Choice(text, help) for text, help in choices_of(".".join(path), body.get("method")).items()]
    return chosen or _default(path)


def _default(path: tuple[str, ...]) -> list[Choice]:
    """The default of a setting that takes a number or text, as a starting point."""
    line = next((line for line in setting_help() if line.name == ".".join(path)), None)
    if line is None or line.default in ("null", "{}", "{...}"):
        return []
    return [Choice(line.default, "default")]


def _row_variables(namespace: Mapping[str, Any]) -> Iterator[Choice]:
    """Variables of the notebook that contain rows."""
    there = {name: value for name, value in namespace.items() if name not in ("In", "Out")}
    return (Choice(name, words) for name, words in row_variables(there))


def _columns(rows: Any) -> list[str]:
    """The names of the columns of rows in memory."""
    if isinstance(rows, Mapping):
        rows = next(iter(rows.values()), None)
    if isinstance(rows, Sequence) and rows and isinstance(rows[0], Mapping):
        return [str(name) for name in rows[0]]
    return [str(name) for name in getattr(rows, "columns", getattr(rows, "column_names", None)) or ()]


def _models() -> list[Choice]:
    return [Choice(name, where) for name, where in available_models().items()]


def _rewards(namespace: Mapping[str, Any]) -> list[Choice]:
    own = [
        Choice(name, "a function in this notebook")
        for name, value in namespace.items()
        if inspect.isfunction(value) and value.__module__ == "__main__" and not name.startswith("_")
    ]
    built_in = [Choice(text, short_help(words)) for text, words in built_in_rewards().items()]
    return own + built_in


def adapters(folder: str = "adapters") -> list[Choice]:
    """The folders of runs that can be resumed."""
    there = sorted(Path(folder).glob(f"*/{CHECKPOINTS}"))
    return [Choice(str(one.parent), "a run's folder") for one in there]


def paths(fragment: str, wanted: Callable[[Path], bool]) -> list[Choice]:
    """Folders, and wanted files, that complete a partial path."""
    begun = fragment[: fragment.rfind("/") + 1]
    folder = Path(begun).expanduser() if begun else Path()
    found: list[Choice] = []
    try:
        for entry in sorted(folder.iterdir())[:_MOST_ENTRIES]:
            if entry.name.startswith(".") or entry.name == "__pycache__":
                continue
            if entry.is_dir():
                found.append(Choice(f"{begun}{entry.name}/", "folder"))
            elif wanted(entry):
                found.append(Choice(f"{begun}{entry.name}", "file"))
    except OSError:
        return []
    return found
