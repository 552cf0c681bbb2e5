"""Checks of a user-defined chat template, Jinja text or a file with it, before a model is loaded."""

from __future__ import annotations

import re
from pathlib import Path

from mlx_nb.config.named_templates import NAMED_TEMPLATES
from mlx_nb.config.neighbor_words import TEMPLATE_NAMES, TEMPLATE_OF_MODEL
from mlx_nb.errors import shortened, shown


def is_template_text(value: str) -> bool:
    """Whether a `chat_template` is Jinja text, as opposed to the path of a file."""
    return "{" in value


def standard_jinja(source: str) -> str:
    """A chat template without transformers' `generation` tag, which changes no text and is unknown to jinja2."""
    standard = re.sub(r"\{%([-+]?)\s*generation\s*([-+]?)%\}", r"{%\1 if true \2%}", source)
    return re.sub(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", r"{%\1 endif \2%}", standard)


def template_problem(value: str) -> str | None:
    """What is wrong with a `chat_template`, without looking at files; None if it may be right."""
    if is_template_text(value):
        return _text_problem(value, "`chat_template`")
    word = value.strip().lower()
    if value in NAMED_TEMPLATES or word not in (*TEMPLATE_OF_MODEL, *TEMPLATE_NAMES) or Path(value).exists():
        return None
    if word in TEMPLATE_OF_MODEL:
        return f"`chat_template: {value}` is the default here: the model's own. Remove it."
    return f"`chat_template: {value}` is the name of a template of other programs. {_TAKES}"


def file_problem(value: str, folder: Path) -> str | None:
    """What is wrong with the file that a `chat_template` names, relative to `folder`; None if it is fine or no file."""
    if value in NAMED_TEMPLATES and not (folder / value).exists():
        return None
    try:
        path = folder / Path(value).expanduser()
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        return f"`chat_template`: {shown(value)} cannot be read as a file: {reason}. {_TAKES}"
    return _text_problem(text, f"`chat_template`: {value}")


def _text_problem(source: str, what: str) -> str | None:
    import jinja2
    from jinja2 import meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    standard = standard_jinja(source)
    try:
        environment.compile(standard)
        used = meta.find_undeclared_variables(environment.parse(standard))
    except jinja2.TemplateSyntaxError as error:
        reason = shortened(str(error.message), 200).rstrip(".")
        return f"{what} is not valid Jinja at line {error.lineno}: {reason}."
    except (RecursionError, ValueError) as error:
        return f"{what} is not valid Jinja: {shortened(str(error), 200)}."
    if "messages" not in used:
        return f"{what} never reads `messages`: every conversation would be the same text. {_TAKES}"
    return None


_TAKES = (
    f"It takes {', '.join(NAMED_TEMPLATES)}, Jinja text, or the path of a file with it; remove it for the model's own "
    "template."
)
