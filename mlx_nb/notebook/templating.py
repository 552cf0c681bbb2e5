"""`{name}` in a `%%finetune` body becomes the value of the notebook's variable `name`. Strict, and no evaluation."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from mlx_nb.errors import CommandError, did_you_mean

_PLACE = re.compile(r"\{\{(?P<literal>[^{}\n]*)\}\}|\{(?P<name>[A-Za-z_]\w*)\}")


def fill(body: str, namespace: Mapping[str, Any]) -> str:
    """The body with every `{name}` replaced; `{{text}}` stands for `{text}`.

    A YAML mapping such as `{rank: 8}` or `{length: {max: 80}}` is left alone. Raises CommandError for an undefined
    name, with its line, and for a value that has no plain text form.
    """

    def replace(match: re.Match[str]) -> str:
        name = match.group("name")
        if name is None:
            return f"{{{match.group('literal')}}}"
        line = body.count("\n", 0, match.start()) + 1
        if name not in namespace:
            names = [known for known in namespace if not known.startswith("_")]
            raise CommandError(f"line {line}: {{{name}}} is not defined in the notebook.{did_you_mean(name, names)}")
        return _as_yaml(namespace[name], name, line)

    return _PLACE.sub(replace, body)


def _as_yaml(value: Any, name: str, line: int) -> str:
    if isinstance(value, (str, PurePath)):
        text = str(value)
        if "\n" not in text:
            return text
    elif isinstance(value, bool) or value is None:
        return json.dumps(value)
    elif isinstance(value, (int, float)) and math.isfinite(value):
        return repr(value)
    elif isinstance(value, (list, tuple, dict)):
        try:
            return json.dumps(value)
        except TypeError:
            pass
    raise CommandError(
        f"line {line}: {{{name}}} is a {type(value).__name__} and cannot be written into the YAML. "
        f"To train on rows in a variable, write `data: {name}` without braces."
    )
