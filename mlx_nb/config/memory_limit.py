"""The setting `memory_limit`: `auto`, `off`, or a size such as 12GB."""

from __future__ import annotations

from mlx_nb.errors import ConfigError

AUTO, OFF = "auto", "off"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def bytes_of(text: str) -> int:
    """The bytes of a size such as 12GB or 800 MB. Raises ConfigError."""
    number, unit = text.strip()[:-2].strip(), text.strip()[-2:].upper()
    try:
        size = float(number)
        if unit in _UNITS and 0 < size < 1e6:
            return int(size * _UNITS[unit])
    except ValueError:
        pass
    raise ConfigError(f"{text!r} is not a size of memory. Write it like 12GB or 800MB.")


def problem_with_limit(value: str) -> str | None:
    """Why a value of `memory_limit` is invalid; None if it is valid."""
    if value in (AUTO, OFF):
        return None
    try:
        bytes_of(value)
    except ConfigError:
        return f"`memory_limit: {value}` is neither auto, off, nor a size such as 12GB or 800MB."
    return None
