"""Other tools' ways to write conversations: dialogs as one text, messages as JSON text, questions with history.

The tuples at the top are the column names that are recognized; a new alias goes there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlx_nb.data.rows.columns import Messages, decoded, kind_of_value, read_messages, read_text
from mlx_nb.data.sources.row_source import is_of_messages
from mlx_nb.errors import DataError

CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
# Alpaca, Dolly and ms-swift: the columns of the question, of its input, and of earlier turns.
ASKING_COLUMNS = ("instruction", "query")
_CONTEXT_COLUMNS = ("input", "context")
ANSWERING_COLUMNS = ("output", "response")
# Columns of pairs and labels that may hold the question, besides `prompt`.
_QUESTION_COLUMNS = ("question", "problem", "input")
_ANSWER_COLUMNS = ("completion", "response", "output", "answer")
_LABEL_COLUMNS = ("label", "kto_tag")
_BETTER = ("chosen", "preferred", "accepted", "better")
_WORSE = ("rejected", "dispreferred", "non_preferred", "nonpreferred", "unpreferred", "worse")
_NOUNS = ("response", "answer", "output", "completion", "reply", "text", "message", "messages", "conversation")

# A lone object in a JSON text is a message only with one of these roles; otherwise it is an answer in JSON.
_ANSWERING_ROLES = ("assistant", "gpt", "user", "human")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


# --- values ---------------------------------------------------------------------------------------------------------


def read_text_or_messages(value: Any, column: str, roles: Mapping[str, str]) -> Any:
    """A text, or messages in any of the supported forms.

    Those are a list of messages, one message, an object with `messages`, any of them as JSON text, or a dialog as one
    text (see `dialog`).
    """
    if isinstance(value, str):
        value = from_json(value)
    if isinstance(value, str):
        value = dialog(value) or value
    if isinstance(value, Mapping):
        inner = next((name for name in CONVERSATION_COLUMNS if name in value), None)
        if inner:
            return read_messages(value[inner], f"{column}.{inner}", roles)
        if is_of_messages([value]):
            return read_messages([value], column, roles)
    if isinstance(value, (list, tuple)):
        return read_messages(value, column, roles)
    if not isinstance(value, str):
        raise DataError(f"`{column}` must be text or a list of messages, not {kind_of_value(value)}.")
    return read_text(value, f"`{column}`")


def dialog(text: str) -> Messages | None:
    r"""The messages of a text such as HH-RLHF's `\n\nHuman: Hi\n\nAssistant: Hello`; None for any other text.

    A trailing `Assistant:` with nothing after it is not a message.
    """
    if not text.lstrip().startswith("Human:") or "\n\nAssistant:" not in text:
        return None
    parts = [part.strip() for part in _SPEAKER.split(text)[1:]]
    messages = [{"role": _SPEAKERS[who], "content": text} for who, text in zip(parts[::2], parts[1::2])]
    return messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages


def from_json(text: str) -> Any:
    """The messages in a JSON text; the text itself if it is anything else, such as an answer in JSON."""
    try:
        value = decoded(text, "")
    except DataError:
        return text
    if isinstance(value, Mapping) and "messages" not in value:
        return value if _is_message(value) else text
    messages = value["messages"] if isinstance(value, Mapping) else value
    return value if is_of_messages(messages) else text


def _is_message(item: Mapping[str, Any]) -> bool:
    role = item.get("role", item.get("from"))
    return isinstance(role, str) and role in _ANSWERING_ROLES and bool({"content", "value", "tool_calls"} & set(item))


# --- questions ------------------------------------------------------------------------------------------------------


def question(record: Mapping[str, Any], column: str, roles: Mapping[str, str]) -> Any:
    """The question in a text column, followed by `input` or `context`; with a `history`, the messages up to it."""
    prompt = read_text(record[column], f"`{column}`")
    about = next((name for name in _CONTEXT_COLUMNS if name != column and record.get(name)), None)
    if about and column in ASKING_COLUMNS:
        prompt = f"{prompt}\n\n{read_text(record[about], f'`{about}`')}"
    before = _history(record, roles)
    return [*before, {"role": "user", "content": prompt}] if before else prompt


def asking_columns(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """The columns of an instruction and its output, in the words of Alpaca, Dolly and ms-swift; None without both."""
    asking = _filled(record, ASKING_COLUMNS)
    answering = _filled(record, ANSWERING_COLUMNS)
    return (asking[0], answering[0]) if asking and answering else None


def question_column(record: Mapping[str, Any]) -> str | None:
    """The column, besides `prompt`, with the question of a judged answer. Raises DataError if it is ambiguous."""
    found = _filled(record, CONVERSATION_COLUMNS) or _filled(record, ASKING_COLUMNS)
    if found:
        return found[0]
    return _only(_filled(record, _QUESTION_COLUMNS), "prompt")


def _history(record: Mapping[str, Any], roles: Mapping[str, str]) -> Messages:
    """Earlier turns: [question, answer] pairs, or messages."""
    turns = decoded(record.get("history"), "history") or []
    if is_of_messages(turns):
        return read_messages(turns, "history", roles)
    if isinstance(turns, str):
        return []
    messages: Messages = []
    for index, turn in enumerate(turns if isinstance(turns, (list, tuple)) else [turns]):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise DataError(f"`history[{index}]` must be a pair [question, answer], not {kind_of_value(turn)}.")
        for role, text in zip(("user", "assistant"), turn):
            messages.append({"role": role, "content": read_text(text, f"`history[{index}]`")})
    return messages


# --- columns --------------------------------------------------------------------------------------------------------


def conversation_column(record: Mapping[str, Any]) -> str | None:
    """The first column with a conversation."""
    return next(iter(_filled(record, CONVERSATION_COLUMNS)), None)


def chosen_column(record: Mapping[str, Any]) -> str | None:
    """The column of the better answer; next to a worse one, an answer without such a word is the better one."""
    found = _judged(record, _BETTER)
    if found or not rejected_column(record):
        return found
    return _only(_filled(record, _ANSWER_COLUMNS), "chosen") or conversation_column(record)


def rejected_column(record: Mapping[str, Any]) -> str | None:
    """The column of the worse answer: `rejected`, `rejected_response`, `response_rejected`, `non_preferred_output`."""
    return _judged(record, _WORSE)


def answer_column(record: Mapping[str, Any]) -> str | None:
    """The column of a labeled answer."""
    if "completion" in record:
        return "completion"
    return _only(_filled(record, _ANSWER_COLUMNS), "completion")


def label_column(record: Mapping[str, Any]) -> str | None:
    """The column that says whether an answer is good."""
    return next((name for name in _LABEL_COLUMNS if record.get(name) is not None), None)


def _judged(record: Mapping[str, Any], words: tuple[str, ...]) -> str | None:
    if words[0] in record:
        return words[0]
    names = {f"{a}_{b}" for word in words for noun in _NOUNS for a, b in ((word, noun), (noun, word))} | set(words)
    found = [column for column in record if isinstance(column, str) and column.lower() in names]
    return _only([column for column in found if record[column] is not None], words[0])


def _filled(record: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    return [name for name in names if record.get(name) is not None]


def _only(found: list[str], what: str) -> str | None:
    if len(found) > 1:
        names = " and ".join(f"`{name}`" for name in found)
        raise DataError(f"{names} could each be the {what}. Set {what}_feature to one of them.")
    return found[0] if found else None


# --- rows for something else ----------------------------------------------------------------------------------------


def looks_like(record: Mapping[str, Any]) -> str:
    """What kind of row it is if its method cannot read it, and what to do with it; empty if unknown."""
    names = set(map(str, record))
    answered = {"prompt", "completion"} <= names or bool(names & set(CONVERSATION_COLUMNS))
    if isinstance(record.get("labels"), (list, tuple)) and "completions" in names:
        return "This judges each step of an answer, which no method here learns from."
    if chosen_column(record) and rejected_column(record):
        return "These are pairs, for `method: dpo`, `method: cpo` or `method: orpo`."
    if label_column(record) is not None and (answered or answer_column(record)):
        return "These are labeled answers, for `method: kto`."
    if any(
        _two_of(names, stem) for stem in ("response", "answer", "completion", "output", "conversation", "human_ref")
    ):
        return "These are two answers, and which is better is in another column: make `chosen` and `rejected` of them."
    several = next((name for name in ("completions", "responses", "answers", "candidates") if name in names), None)
    if several and isinstance(record[several], (list, tuple)):
        return f"`{several}` holds several answers: take a better one as `chosen` and a worse one as `rejected`."
    if "segments" in names:
        return (
            "`segments` are pieces of text with a label each: make `messages`, or `prompt` and `completion`, of them."
        )
    if {"role", "content"} <= names or {"from", "value"} <= names:
        return "This is one message, and a row is a conversation: a list of messages, or {messages: [...]}."
    if {"text", "role", "parent_id"} <= names:
        return "This is one message of a tree: make a row with `messages` of each path from a question to an answer."
    if answered or asking_columns(record):
        return "These are answers to imitate, for `method: sft`."
    if "prompt" in names and not (chosen_column(record) or rejected_column(record) or answer_column(record)):
        return "These are prompts without an answer, for `method: grpo`."
    return ""


def _two_of(names: set[str], stem: str) -> bool:
    lower = {name.lower() for name in names}
    return any({f"{stem}_{a}", f"{stem}_{b}"} <= lower for a, b in (("0", "1"), ("1", "2"), ("a", "b")))
