"""Parses a pasted mlx-lm or mlx-lm-lora command line, so that its options can be explained as settings."""

from __future__ import annotations

import re
from typing import Any

from mlx_nb.config.yaml_text import Document, read_value

_COMMAND = re.compile(
    r"\$?\s*(?:python3?\s+-m\s+)?(?P<program>mlx_lm(?:_lora)?)(?:[. ](?P<verb>[a-z]+)(?=\s|$)|(?=\s+-))"
)
_TRAINING = ("lora", "train", "dora")
_OTHERWISE = {
    "generate": 'ask a run with `%finetune generate "..."`',
    "chat": 'ask a run with `%finetune generate "..."`',
    "fuse": "`%finetune fuse FOLDER` writes the model of a run, `%finetune gguf FOLDER` its GGUF file",
    "convert": "mlx_nb quantizes a model as it loads it: `load_in_bits: 4`",
    "server": "mlx_nb has no server",
}


def program_of(text: str) -> str | None:
    """The program of a command line, such as `mlx_lm.lora`; None if the text is not one."""
    found = _command_in(text.splitlines())[1]
    return f"{found['program']}.{found['verb'] or 'train'}" if found else None


def _command_in(lines: list[str]) -> tuple[int, re.Match[str] | None]:
    """The index of the first line that is not a comment, and the program that it begins with."""
    first = next((number for number, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")), 0)
    return first, _COMMAND.match(lines[first].lstrip()) if lines else None


def read_command(text: str, name: str = "") -> Document | None:
    """The options of a command as settings; None if the text is not a command.

    The result always has a problem: a command is not valid here. Options that are not settings are kept, so that they
    get the errors of unknown settings.
    """
    lines = text.splitlines()
    first, found = _command_in(lines)
    if found is None:
        return None
    mark = (first + 1, len(lines[first]) - len(lines[first].lstrip()) + 1)
    verb = found["verb"] or "train"
    program = f"{found['program']}.{verb}"
    if verb not in _TRAINING:
        advice = _OTHERWISE.get(verb, "`%%finetune?` lists all settings")
        return Document({}, name=name, problems=((mark, f"`{program}` is a command, not a setting: {advice}."),))
    values: dict[str, Any] = {}
    marks: dict[tuple[str, ...], tuple[int, int]] = {}
    for at, option, words in _options(lines[first:], first + 1):
        given = [read_value(word.strip("'\"")) for word in words]
        values[option] = True if not given else given[0] if len(given) == 1 else given
        marks[(option,)] = at
    message = (
        f"`{program}` is a command, not a setting. `%finetune import` translates it; or write each option as a line: "
        "`iters: 600` for `--iters 600`."
    )
    if values.get("test") and "train" not in values:
        message += " To test an adapter, name it in `resume_adapter_file` and use `%finetune eval test`."
    return Document(values, marks, name, ((mark, message),))


def _options(lines: list[str], number: int) -> list[tuple[tuple[int, int], str, list[str]]]:
    r"""(line and column, name, following words) of each option of a command that may continue over lines with `\`."""
    options: list[tuple[tuple[int, int], str, list[str]]] = []
    for offset, line in enumerate(lines):
        code = re.sub(r"(^|\s)#.*", "", line)
        for word in re.finditer(r"\"[^\"]*\"|'[^']*'|\S+", code):
            text = word.group()
            if re.fullmatch(r"--?[A-Za-z][\w-]*(=.*)?", text):
                option, _, value = text.lstrip("-").partition("=")
                options.append(
                    ((number + offset, word.start() + 1), option.replace("-", "_"), [value] if value else [])
                )
            elif options and text != "\\":
                options[-1][2].append(text)
        if not code.rstrip().endswith("\\"):
            break
    return options
