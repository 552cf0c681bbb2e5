"""What the model can be asked with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_nb.errors import CommandError, shown


def check_asking(prompt: Any, max_tokens: Any, temperature: Any) -> None:
    """Raise CommandError for what nothing can be asked with."""
    if isinstance(prompt, Mapping):
        raise CommandError(f"cannot ask {shown(prompt)}, which is no list of messages. Write `[...]` around a message.")
    prompts = [prompt] if isinstance(prompt, str) or not isinstance(prompt, Sequence) else list(prompt)
    for one in prompts:
        if not isinstance(one, str | Mapping) and not (isinstance(one, Sequence) and not isinstance(one, bytes)):
            raise CommandError(f"cannot ask {one!r}. A prompt is a text, or a list of messages with role and content.")
        if isinstance(one, str) and any("\ud800" <= character <= "\udfff" for character in one):
            raise CommandError("the prompt has half a surrogate pair, which is no valid text. Remove it.")
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int):
        raise CommandError(f"max_tokens must be a whole number of 1 or more, not {max_tokens!r}.")
    number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not number or not 0 <= temperature < math.inf:
        raise CommandError(f"temperature must be a number of at least 0, not {temperature!r}.")
