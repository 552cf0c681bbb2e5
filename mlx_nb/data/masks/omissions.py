"""Finds the messages of which a chat template renders nothing, by rendering the conversation without them."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence

from mlx_nb.data.masks.template_facts import Message, Render, RenderFailed, texts_in
from mlx_nb.data.masks.windows import LONG, Windows

_MOST_RENDERS = 64  # for finding which messages of a long conversation are omitted together


def omitted_messages(
    messages: Sequence[Message], silent: Sequence[int], text: str, render: Render, constants: Sequence[str]
) -> list[int]:
    """The `silent` messages of which nothing is rendered: removing one of them does not change the text."""
    if not silent:
        return []
    if len(messages) <= LONG:
        return [i for i in silent if _is_omitted(messages, i, text, render)]
    windows, known = Windows(messages, constants), dict[Hashable, bool]()
    absent = []
    for i in silent:
        window = windows.around(i)
        if window.shape not in known:
            known[window.shape] = _is_omitted_in_window([messages[k] for k in window.indexes], window.slot, render)
        if known[window.shape]:
            absent.append(i)
    left_out = set(absent)
    try:
        if not absent or render([m for i, m in enumerate(messages) if i not in left_out], False) == text:
            return absent
    except RenderFailed:
        pass
    return [i for i in silent if _is_omitted(messages, i, text, render)]


def omitted_together(
    messages: Sequence[Message], silent: Sequence[int], found: Collection[int], text: str, render: Render
) -> list[int]:
    """The `silent` messages that a template omits together with their neighbors, such as the beginning of a long chat.

    A window is too short to show that. Candidates are found by missing texts and verified together: removing them does
    not change the text. `found` are the messages with rendered texts.
    """
    if len(messages) <= LONG:
        return []
    missing = {
        i
        for i, message in enumerate(messages)
        if i not in found and any(part.strip() for part in texts_in(message.get("content"), keys=False))
    }

    def same_without(some: Sequence[int]) -> bool:
        left_out = set(some)
        try:
            return render([message for i, message in enumerate(messages) if i not in left_out], False) == text
        except RenderFailed:
            return False

    gone, pieces, renders = list[int](), [[i for i in silent if not missing.isdisjoint((i - 1, i, i + 1))]], 0
    while pieces and renders < _MOST_RENDERS:
        piece, renders = pieces.pop(), renders + 1
        if piece and same_without(piece):
            gone += piece
        elif len(piece) > 1:
            pieces += [piece[: len(piece) // 2], piece[len(piece) // 2 :]]
    return sorted(gone) if gone and same_without(gone) else []


def _is_omitted_in_window(messages: Sequence[Message], slot: int, render: Render) -> bool:
    try:
        return _is_omitted(messages, slot, render(messages, False), render)
    except RenderFailed:
        return False


def _is_omitted(messages: Sequence[Message], i: int, text: str, render: Render) -> bool:
    others = [*messages[:i], *messages[i + 1 :]]
    try:
        return bool(others) and render(others, False) == text
    except RenderFailed:
        return False
