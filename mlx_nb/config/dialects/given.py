"""One key of another program's file, and its meaning if only its name differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlx_nb.config.dialects.programs import Dialect
from mlx_nb.config.dialects.records import Meaning
from mlx_nb.config.hints import is_all_linear, is_off, method_lines
from mlx_nb.config.neighbor_words import OFF, VALUES
from mlx_nb.config.run_config import SETTINGS


class Given(NamedTuple):
    """A key with its value, all keys of the file without their sections, and the program."""

    word: str
    value: Any
    around: Mapping[str, Any]
    dialect: Dialect
    from_file: bool

    def first(self, *words: str) -> Any:
        """The value of the first of these words that is in the file; None without any."""
        return next((self.around[word] for word in words if self.around.get(word) is not None), None)

    @property
    def accumulation(self) -> int:
        """Forward passes in one update."""
        return accumulation_of(self.around)

    @property
    def is_on(self) -> bool:
        """Whether a switch is on."""
        return str(self.value).lower() not in OFF


def accumulation_of(values: Mapping[str, Any]) -> int:
    """Forward passes in one update."""
    words = ("grad_accumulation_steps", "gradient_accumulation_steps", "accumulation_steps")
    value = next((values[word] for word in words if values.get(word) is not None), 1)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 1


def lacks_validation(dialect: Dialect, values: Mapping[str, Any]) -> bool:
    """Whether the program would find no validation rows in its folder, and would train without."""
    data = values.get("data")
    if not dialect.micro or not isinstance(data, str):
        return False
    folder = Path(data).expanduser()
    return (folder / "train.jsonl").is_file() and not (folder / "valid.jsonl").exists()


Rule = Callable[[Given], Meaning]


def renamed(given: Given, name: str) -> Meaning:
    """A setting with the same meaning, perhaps under another name or inside a group."""
    outer, _, inner = name.partition(".")
    value = given.value
    if isinstance(value, str):
        value = VALUES.get(outer, {}).get(value, value)
    if outer in ("method", "loss") and isinstance(value, str):
        lines = method_lines(value)
        if outer == "method" and not lines:
            return Meaning("not here", {}, f"mlx_nb has no method {value}")
        if outer == "method":
            return as_here(given, lines)
    if not inner and is_off(value) and (value is None or _off_is_default(outer, value)):
        return Meaning("ignored", {}, "the default here")
    if value is None:
        return Meaning("ignored", {}, "the default here")
    if name in ("target_modules", "lora_parameters.keys"):
        if is_all_linear(value):
            return Meaning("ignored", {}, "every linear layer is adapted by default")
        value = [one.strip() for one in value.split(",")] if isinstance(value, str) else value
    return as_here(given, {outer: {inner: value}} if inner else {outer: value})


def as_here(given: Given, becomes: Mapping[str, Any], note: str = "") -> Meaning:
    """These settings, taken if they are the key itself."""
    same = becomes == {given.word: given.value}
    return Meaning("taken" if same else "converted", becomes, note)


def _off_is_default(name: str, value: Any) -> bool:
    """Whether 0, -1 or false means our default there, as for a number of updates; 0 warm-up means none."""
    return SETTINGS[name].default is None and name not in ("warmup", "beta", "label_smoothing", "lr_schedule")
