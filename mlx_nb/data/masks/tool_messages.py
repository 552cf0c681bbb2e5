"""Messages and tools in the form that a chat template expects: for training, rollouts and generation.

The arguments of a tool call are an object, or the JSON text of one (in every export of OpenAI). Templates expect one of
the two: `tojson` writes a text with its quotes escaped, `+` does not accept an object. Rendering shows which; both are
then passed in that form, so that they become the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_nb.data.masks.render import SOME_TOOL
from mlx_nb.data.masks.template_facts import Message
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.data.masks.tool_values import NotJson, ValueRemarks, read_arguments, written_value
from mlx_nb.errors import MaskRefused

_FLAGS = ("train", "weight")
# Words that no template writes or looks for.
_KEY, _WORD, _NUMBER_KEY, _RESULT = "quillon", "tressic", "oblenar", "pelvorn"
_ARGUMENTS = {_KEY: _WORD, _NUMBER_KEY: 7}


@dataclass(frozen=True)
class ArgumentsForm:
    """The form in which a chat template writes the arguments of a tool call.

    as_object   it expects an object; otherwise the JSON text of one
    takes_text  a text is written verbatim
    """

    as_object: bool
    takes_text: bool


@dataclass(frozen=True)
class ShownConversation:
    """The input of a chat template.

    messages  without nulls and training marks, as many as before
    tools     None without any
    problems  what the user should know about the values in tool calls and tools
    notes     what was changed in them by rule
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]


_FORMS: dict[tuple[str, bool], ArgumentsForm] = {}


def shown_conversation(
    messages: Sequence[Message], tools: Sequence[Any] | None, tokenizer: Tokenizer
) -> ShownConversation:
    """Convert messages and tools to the form that the tokenizer's chat template expects.

    Raises MaskRefused for a value that cannot be written, and for arguments in a form that the template cannot use.
    """
    of_tools = _Writer("the tools")
    shown_tools = [of_tools.written(tool, "") for tool in tools or ()] or None
    writers, shown = [of_tools], []
    for index, message in enumerate(messages):
        written = {}
        for key, item in message.items():
            if key == "tool_calls" and item:
                form = arguments_form(tokenizer, with_tools=shown_tools is not None)
                writer = _Writer(f"message {index} ({message.get('role')})")
                writers.append(writer)
                written[key] = [writer.call(call, form) for call in item]
            elif item is not None and key not in _FLAGS:
                written[key] = item if key == "content" else _without_nulls(item)
        shown.append(written)
    problems = tuple(problem for writer in writers for problem in writer.problems())
    return ShownConversation(shown, shown_tools, problems, tuple(note for writer in writers for note in writer.notes()))


def arguments_form(tokenizer: Tokenizer, *, with_tools: bool) -> ArgumentsForm:
    """How the tokenizer's chat template writes arguments; studied once for each template."""
    # mlx-lm's wrapper renders some models with code of its own.
    source = repr([getattr(tokenizer, name, None) for name in ("chat_template", "_chat_template")])
    key = (source, with_tools)
    if key not in _FORMS:
        _FORMS[key] = _study_form(tokenizer, [SOME_TOOL] if with_tools else None)
    return _FORMS[key]


def _study_form(tokenizer: Tokenizer, tools: list[Any] | None) -> ArgumentsForm:
    """Render a call with an object and with its text, ending the conversation or followed by its result."""
    text = json.dumps(_ARGUMENTS)
    only_text_renders = False
    for answered in (False, True):
        of_object, of_text = (_render_call(tokenizer, given, tools, answered) for given in (_ARGUMENTS, text))
        takes_text = of_text is not None and text in of_text
        if of_object is not None and _KEY in of_object and _WORD in of_object and str(_ARGUMENTS) not in of_object:
            return ArgumentsForm(True, takes_text)
        if of_text is not None and _KEY in of_text and _WORD in of_text and f'\\"{_KEY}' not in of_text:
            return ArgumentsForm(False, takes_text)
        only_text_renders = only_text_renders or (of_object is None and of_text is not None)
    return ArgumentsForm(not only_text_renders, False)


def _render_call(tokenizer: Tokenizer, arguments: Any, tools: list[Any] | None, answered: bool) -> str | None:
    """The rendered text, or None if the template refuses."""
    call = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": arguments}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    if answered:
        messages.append({"role": "tool", "content": _RESULT, "tool_call_id": "call00001", "name": "f"})
        messages.append({"role": "assistant", "content": "b"})
    given = {"tools": tools} if tools else {}
    try:
        result: str | None = tokenizer.apply_chat_template(messages, tokenize=False, **given)
        return result
    except Exception:  # a template is a program and may raise anything
        return None


def _without_nulls(value: Any) -> Any:
    """A field of a message that is not a tool call, without nulls: templates hardly ever write it."""
    try:
        return written_value(value, ValueRemarks(), "")
    except (NotJson, RecursionError):
        return value


class _Writer:
    """Writes the values of one message, or of the tools, and records what was changed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.remarks = ValueRemarks()
        self.unread = 0

    def written(self, value: Any, where: str) -> Any:
        try:
            return written_value(value, self.remarks, where)
        except NotJson as error:
            raise MaskRefused(
                f"a value in {self.name} cannot be written: {error}. Correct it, or drop the row."
            ) from None
        except RecursionError:
            raise MaskRefused(f"{self.name} is nested too deeply to write. Drop the row.") from None

    def call(self, call: Any, form: ArgumentsForm) -> Any:
        """A tool call, alone or as a `function`, with its arguments in the form that the template expects."""
        if not isinstance(call, Mapping):
            return self.written(call, "tool_calls")
        if isinstance(function := call.get("function"), Mapping):
            return {
                key: self.call(function, form) if key == "function" else self.written(item, key)
                for key, item in call.items()
                if item is not None
            }
        written = {
            key: self.arguments(item, form) if key == "arguments" else self.written(item, key)
            for key, item in call.items()
            if item is not None or key == "arguments"
        }
        return written if "arguments" in written else {**written, "arguments": self.arguments(None, form)}

    def arguments(self, value: Any, form: ArgumentsForm) -> Any:
        if isinstance(value, str):
            try:
                value = read_arguments(value, self.remarks)
            except NotJson as error:
                if form.takes_text:
                    self.unread += 1
                    return value
                raise MaskRefused(
                    f"the arguments of a tool call in {self.name} are a text that cannot be read as an object: {error}."
                    " This chat template writes objects only. Correct the arguments, or drop the row."
                ) from None
        else:
            value = {} if value is None else self.written(value, "")
        return value if form.as_object else json.dumps(value, ensure_ascii=False)

    def problems(self) -> Iterator[str]:
        if self.unread:
            yield (
                f"{self.name}: the arguments of a tool call ({self.unread} in all) are not a JSON object and are "
                "written as they are."
            )
        yield from (f"{self.name}: {sentence}" for sentence in self.remarks.sentences(notes=False))

    def notes(self) -> Iterator[str]:
        yield from (f"{self.name}: {sentence}" for sentence in self.remarks.sentences(notes=True))
