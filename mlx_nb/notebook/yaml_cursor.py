"""Finds what is being typed at the cursor in an incomplete YAML body, for Tab completion."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_KEY = r"[\w.-]+"


class Place(NamedTuple):
    """What is being typed: a key inside `path`, or a value or list element of the key at `path`.

    `fragment` is the part typed so far.
    """

    path: tuple[str, ...]
    fragment: str
    is_key: bool
    in_list: bool = False


def place_of(above: Sequence[str], before: str) -> Place | None:
    """The place at the end of `before`, a line up to the cursor, below the lines `above`; None inside a comment."""
    if re.search(r"(^|\s)#", before):
        return None
    opened = _opened(before)
    if opened is not None:
        return _in_brackets(above, before, opened)
    if match := re.fullmatch(rf"(\s*)((?:- +)?)({_KEY})\s*:\s+(.*)", before):
        indent = len(match[1]) + len(match[2])
        return Place((*_parents(above, indent, bool(match[2])), match[3]), match[4], False)
    if match := re.fullmatch(r"(\s*)- +(.*)", before):
        parents = _parents(above, len(match[1]) + 1, True)
        return Place(parents, match[2], False, True) if parents else None
    if match := re.fullmatch(rf"(\s*)((?:{_KEY})?)", before):
        return Place(_parents(above, len(match[1]), False), match[2], True)
    return None


def settings_in(lines: Sequence[str]) -> dict[str, str]:
    """The top-level settings in the lines, with their values as written."""
    found = (re.match(rf"({_KEY})\s*:(?:\s+(.*))?$", line) for line in lines)
    return {match[1]: (match[2] or "").split(" #")[0].strip() for match in found if match}


def _opened(before: str) -> int | None:
    """The position of the innermost open bracket."""
    stack: list[int] = []
    quote = ""
    for at, one in enumerate(before):
        if quote:
            quote = "" if one == quote else quote
        elif one in "\"'":
            quote = one
        elif one in "[{":
            stack.append(at)
        elif one in "]}" and stack:
            stack.pop()
    return stack[-1] if stack else None


def _in_brackets(above: Sequence[str], before: str, opened: int) -> Place | None:
    head, inside = before[:opened], re.split(r",\s*", before[opened + 1 :])[-1].lstrip()
    owner = re.search(rf"({_KEY})\s*:\s*$", head)
    if owner is None:
        return None
    indent = len(before) - len(before.lstrip())
    path = (*_parents(above, indent, False), owner[1])
    if before[opened] == "[":
        return Place(path, inside, False, True)
    if match := re.fullmatch(rf"({_KEY})\s*:\s+(.*)", inside):
        return Place((*path, match[1]), match[2], False)
    return Place(path, inside, True) if re.fullmatch(rf"(?:{_KEY})?", inside) else None


def _parents(above: Sequence[str], indent: int, is_element: bool) -> tuple[str, ...]:
    """The keys that enclose a line with this indent; the dash of an element may be directly below its key."""
    found: list[str] = []
    for line in reversed(above):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        depth = len(line) - len(line.lstrip())
        if depth >= indent:
            continue
        if match := re.fullmatch(rf"\s*(?:- +)?({_KEY})\s*:\s*(?:#.*)?", line):
            found.insert(0, match[1])
            indent = depth
        elif not line.lstrip().startswith("- "):
            break
        if indent == 0:
            break
    return tuple(found)
