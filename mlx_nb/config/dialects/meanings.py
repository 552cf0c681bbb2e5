"""What one key of another program means here, as settings and a note.

Words with the same meaning come from the tables of `neighbor_words`; a word whose meaning depends on its value or on
other keys has a function in `rules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_nb.config.dialects.given import Given, as_here, renamed
from mlx_nb.config.dialects.records import Meaning
from mlx_nb.config.dialects.rules import RULES
from mlx_nb.config.fields import typo_of
from mlx_nb.config.hints import is_all_linear
from mlx_nb.config.neighbor_words import AFTERWARDS, HARMLESS, INSTEAD, SAME, SWITCHES, UNNECESSARY, UNSUPPORTED
from mlx_nb.config.run_config import SETTINGS


def meaning_of(given: Given) -> Meaning:
    """What a key means here."""
    meaning = _meaning(given)
    notes = [note for note in (meaning.note, _note_about_them(given)) if note]
    return Meaning(meaning.status, meaning.becomes, "; ".join(notes))


def _note_about_them(given: Given) -> str:
    """What the other program itself does with a key, if that is not what the file says; "" otherwise."""
    fixed, word = given.dialect.fixed, given.word
    if given.from_file and word in fixed and given.value != fixed[word]:
        return f"{given.dialect.name} itself uses {fixed[word]} instead, whatever a file says"
    if given.dialect.keys and word not in given.dialect.keys:
        return f"{given.dialect.name} itself has no such option"
    if given.dialect.name == "mlx-lm-lora" and word == "qat_enable" and given.is_on:
        return "there it has no effect on a quantized model"
    return ""


def _meaning(given: Given) -> Meaning:
    word = given.word
    if word == "lora_parameters":
        return _lora_parameters(given)
    if word in RULES:
        return RULES[word](given)
    if word in SETTINGS or word in SAME:
        return renamed(given, SAME.get(word, word))
    if word in SWITCHES:
        name, on, off = SWITCHES[word]
        becomes = _value(on if given.is_on else off)
        return Meaning("converted", {name: becomes}) if becomes != "" else Meaning("ignored", {}, "the default here")
    if word in UNNECESSARY:
        return Meaning("ignored", {}, UNNECESSARY[word].rstrip("."))
    if word in AFTERWARDS:
        return Meaning("ignored", {}, AFTERWARDS[word].rstrip("."))
    if word in HARMLESS:
        return Meaning("ignored", {}, HARMLESS[word])
    if word in UNSUPPORTED:
        if not given.is_on or given.value in ([], {}):
            return Meaning("ignored", {}, "it is off")
        return Meaning("not here", {}, f"mlx_nb has no {UNSUPPORTED[word]}")
    if word in INSTEAD:
        return Meaning("not here", {}, INSTEAD[word][1].rstrip("."))
    near = typo_of(word, (*SETTINGS, *SAME))
    return Meaning("not here", {}, f"no such setting is known{f'; is it `{near}`?' if near else ''}")


def _value(text: str) -> Any:
    return {"true": True, "false": False, "4": 4, "6": 6, "8": 8}.get(text, text)


def _lora_parameters(given: Given) -> Meaning:
    if not isinstance(given.value, Mapping):
        return as_here(given, {"lora_parameters": given.value})
    becomes: dict[str, Any] = {}
    notes = []
    for key, item in given.value.items():
        inner = (
            meaning_of(Given(str(key), item, {**given.around, **given.value}, given.dialect, given.from_file))
            if (key not in ("rank", "scale", "dropout", "keys"))
            else Meaning("taken", {"lora_parameters": {key: item}})
        )
        if key == "keys" and is_all_linear(item):
            continue
        if inner.status == "not here":
            notes.append(f"{key} is not here: {inner.note}")
        group = inner.becomes.get("lora_parameters")
        if isinstance(group, Mapping):
            becomes.update({name: one for name, one in group.items() if one is not None})
    note = "; ".join(notes)
    if given.dialect.name in ("mlx-lm", "mlx-lm-lora") and "alpha" in given.value:
        note = "; ".join([*notes, f"{given.dialect.name} itself wants scale, not alpha"])
    return as_here(given, {"lora_parameters": becomes}, note)
