"""The roles of messages in the words of many tools; and tool calls in their various shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_nb.config.checks import CALLING, MESSAGE_ROLES
from mlx_nb.data.sources.row_values import refuse_odd_value
from mlx_nb.errors import DataError, did_you_mean, shortened

# Role words of other tools, mapped to those of the chat templates.
_ROLES = {
    **{role: role for role in MESSAGE_ROLES},
    "human": "user",
    "prompter": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bot", "chatbot", "model", "ai"), "assistant"),
    **dict.fromkeys(("observation", "function", "tool_response", "tool_result", "tool_results"), "tool"),
    **dict.fromkeys(("tool_output", "function_response", "function_result", "function_output"), "tool"),
    **dict.fromkeys((CALLING, "tool_call", "tool_calls", "function_calls"), CALLING),
}


def known_role(role: str, own: Mapping[str, str], where: str) -> str:
    """The role of a message in the words of the chat templates, or `function_call`: the assistant calls a tool.

    own  the user's role words and the roles they map to; these take precedence

    Raises DataError for an unknown one.
    """
    found = own.get(role) or _ROLES.get(role.strip().lower().replace("-", "_").replace(" ", "_"))
    if found is None:
        role = shortened(role)
        near = did_you_mean(role.lower(), [*own, *_ROLES])
        known = ", ".join(MESSAGE_ROLES)
        raise DataError(
            f"{where} has the unknown role {role!r}.{near} Known roles: {known}. "
            f"Words of your own: `roles: {{{json.dumps(role, ensure_ascii=False)}: user}}`."
        )
    return found


def calls_in_text(value: Any, role: str, where: str) -> list[dict[str, Any]]:
    """The tool calls in a message of the role `function_call`: one, or a list, as JSON text."""
    try:
        found = json.loads(value, object_pairs_hook=_unique_keys) if isinstance(value, str) else value
        problem = ""
        refuse_odd_value(found, where)
    except (ValueError, RecursionError) as error:
        found, problem = None, f" ({error or 'too deep'})"
    calls = found if isinstance(found, (list, tuple)) else [found]
    if not calls or not all(isinstance(call, Mapping) and {"name", "function"} & set(call) for call in calls):
        raise DataError(
            f"{where} is a tool call (role {role!r}), but its text is not the JSON of one, such as "
            f'{{"name": "f", "arguments": {{}}}}{problem}. Correct it; `roles: {{{role}: assistant}}` makes it text.'
        )
    return [normalized_call(call) for call in calls]


def _unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return read


def normalized_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call in the shape that chat templates read: name and arguments inside `function`."""
    if call.get("function") is not None or not isinstance(call.get("name"), str):
        return dict(call)
    arguments: Any = next((call[key] for key in ("arguments", "parameters") if call.get(key) is not None), {})
    others = {key: item for key, item in call.items() if key not in ("name", "arguments", "parameters", "function")}
    return {"type": "function", **others, "function": {"name": call["name"], "arguments": arguments}}


def normalized_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool description in the shape that chat templates read: inside `function`."""
    if tool.get("function") is not None or not isinstance(tool.get("name"), str):
        return dict(tool)
    if tool.get("type") not in (None, "function"):
        return dict(tool)
    described = {key: item for key, item in tool.items() if key not in ("type", "function")}
    return {"type": "function", "function": described}


def joined_calls(messages: Sequence[tuple[dict[str, Any], bool]]) -> list[dict[str, Any]]:
    """The messages, each tool call that is a separate message (True) merged into the assistant's turn before it."""
    joined: list[dict[str, Any]] = []
    for message, calls in messages:
        before = joined[-1] if joined else {}
        same = all(before.get(mark) == message.get(mark) for mark in ("train", "weight"))
        if calls and before.get("role") == "assistant" and same:
            both = [*before.get("tool_calls", ()), *message["tool_calls"]]
            joined[-1] = {**message, **before, "tool_calls": both}
        else:
            joined.append(message)
    return joined
