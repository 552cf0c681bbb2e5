"""Keeps IPython from reading a `?` at the end of a `%finetune` line as a request for help on its last word."""

from __future__ import annotations

import re
from tokenize import DEDENT, INDENT, TokenInfo
from typing import Any

from IPython.core.inputtransformer2 import TokenTransformBase
from IPython.core.interactiveshell import InteractiveShell

# `%finetune?` alone is IPython's help on the magic.
_LINE = re.compile(r"(?P<before>\s*(?:[\w.]+\s*=\s*)?)%finetune[ \t]+(?P<words>.*\?)\s*")
_COMMAND = re.compile(r"(?P<name>\w*)\s*\?+")


class QuestionMarks:
    """An input transformation of one shell. `close` removes it.

    `%finetune generate What is honey?` keeps its question mark, and `%finetune set?` is `%finetune help set`.
    """

    def __init__(self, shell: InteractiveShell) -> None:
        self._transformers: list[Any] = shell.input_transformer_manager.token_transformers
        self._transformers.append(QuestionMark)

    def close(self) -> None:
        """Remove the transformation."""
        if QuestionMark in self._transformers:
            self._transformers.remove(QuestionMark)


class QuestionMark(TokenTransformBase):
    """A line `%finetune ...?`, which becomes the call that IPython makes of a magic without the question mark."""

    priority = 1  # before IPython's own for `?`

    @classmethod
    def find(cls, tokens_by_line: list[list[TokenInfo]]) -> QuestionMark | None:
        """The first such line, if there is one."""
        for tokens in tokens_by_line:
            first = next((token for token in tokens if token.type not in (INDENT, DEDENT)), None)
            if first is not None and "%finetune" in first.line and _LINE.fullmatch(first.line):
                return cls(first.start)
        return None

    def transform(self, lines: list[str]) -> list[str]:
        """The lines of the cell with the call."""
        line = lines[self.start_line]
        found = _LINE.fullmatch(line)
        assert found is not None
        command = _COMMAND.fullmatch(found["words"])
        words = f"help {command['name']}".rstrip() if command else found["words"]
        call = f"{found['before']}get_ipython().run_line_magic('finetune', {words!r})\n"
        return [*lines[: self.start_line], call, *lines[self.start_line + 1 :]]
