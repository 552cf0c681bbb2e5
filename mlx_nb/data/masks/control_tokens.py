"""Control tokens that are written out in a row's own text: finds them, and tokenizes them as plain text.

A tokenizer turns the characters `<|im_end|>` into the token that ends a turn, no matter whether the chat template or
the user wrote them. This module distinguishes the two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from mlx_nb.data.masks.tagging import Unproved
from mlx_nb.data.masks.template_facts import RenderFailed, texts_in
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.errors import MaskRefused

# Private-use planes whose characters can spell the control tokens in a copy of the tokenizer.
_PLANES = (0xF0000, 0x100000)
_PLANE_SIZE = 0xFFFE
_DEPENDS = "the template's own text depends on the control tokens in the messages"
_NO_WORD = re.compile(r"[\s▁]*")
_ASCII = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
_NEXT = str.maketrans({a: b for letters in _ASCII for a, b in zip(letters, letters[1:] + letters[0])})


@dataclass(frozen=True, eq=False)
class ControlTokens:
    """The tokens that mean more than their characters: `<|im_end|>`, `</s>`, `<think>`; not runs of spaces.

    spelled   the characters of each id
    special   the ids that the tokenizer itself calls special
    """

    spelled: Mapping[int, str]
    special: frozenset[int]

    @cached_property
    def _is_control(self) -> np.ndarray:
        """(N,) bool by id; the last entry is for all larger ids."""
        table = np.zeros(max(self.spelled, default=-1) + 2, bool)
        table[list(self.spelled)] = True
        return table

    @cached_property
    def alone(self) -> dict[int, str]:
        """The characters of each id, without surrounding white space."""
        return {token: text.strip() for token, text in self.spelled.items()}

    def positions(self, tokens: np.ndarray) -> np.ndarray:
        """Their indices among (T,) tokens."""
        return np.flatnonzero(self._is_control[np.minimum(tokens, len(self._is_control) - 1)])


class Written(NamedTuple):
    """A control token at `[start, end)` of a text, spelled by these characters."""

    start: int
    end: int
    token: int
    spelled: str


# By tokenizer and its size, since tokens may be added to a tokenizer.
_KNOWN: WeakKeyDictionary[Any, tuple[int, ControlTokens]] = WeakKeyDictionary()
_COPIES: WeakKeyDictionary[Any, dict[tuple[int, int], _PlainCopy]] = WeakKeyDictionary()


def control_tokens(tokenizer: Tokenizer) -> ControlTokens:
    """The control tokens of a fast tokenizer."""
    size = len(tokenizer)
    known = _KNOWN.get(tokenizer)
    if known is None or known[0] != size:
        known = _KNOWN[tokenizer] = size, _read_control_tokens(tokenizer)
    return known[1]


def _read_control_tokens(tokenizer: Tokenizer) -> ControlTokens:
    added = tokenizer.added_tokens_decoder
    special = {int(i) for i, token in added.items() if token.special} | {int(i) for i in tokenizer.all_special_ids}
    spelled = {int(i): str(token.content) for i, token in added.items()}
    spelled |= {i: str(tokenizer.convert_ids_to_tokens(i)) for i in special - spelled.keys()}
    spelled = {i: text for i, text in spelled.items() if not _NO_WORD.fullmatch(text)}
    return ControlTokens(spelled, frozenset(special & spelled.keys()))


def written_out(tokens: np.ndarray, offsets: np.ndarray, text: str, tokenizer: Tokenizer) -> tuple[Written, ...]:
    """The control tokens spelled by the characters of `text`, in order; the unknown token is not one."""
    control = control_tokens(tokenizer)
    found, alone = [], control.alone
    at = control.positions(tokens)
    for token, (start, end) in zip(tokens[at].tolist(), offsets[at].tolist()):
        if text[start:end].strip() == alone[token]:
            found.append(Written(start, end, token, alone[token]))
    return tuple(found)


# --- their origin ----------------------------------------------------------------------------------------------------


def from_content(
    found: Sequence[Written],
    text: str,
    given: Any,
    render: Callable[[Any], str],
    constants: Callable[[], Sequence[str]],
) -> tuple[Written, ...]:
    """Those of `found` in `text` that come from the conversation; the others come from the template.

    given      everything that the template receives: messages and tools, as nested lists and mappings
    render     `given` to text; `render(given)` is `text`. Raises RenderFailed
    constants  gives the strings that the template looks for inside texts, such as `</think>`: it writes those itself

    Decided by a second render in which the letters of each control token in a string are replaced. Raises Unproved if
    the template then writes something else.
    """
    spelled = {written.spelled for written in found}
    if not _holds("\n".join(texts_in(given, keys=True)), spelled):
        return ()
    strings = [string for string in _strings(given) if _holds(string.text, spelled)]
    if not strings:
        return ()
    conversation = _Conversation(given, text, render, spelled)
    other = conversation.rendered_with([_any_of(spelled)] * len(strings))
    if other is None:
        other = conversation.rendered_with(conversation.changeable(strings, constants()))
    if other is None:
        raise Unproved(_DEPENDS)
    return tuple(one for one in found if other[one.start : one.end] != text[one.start : one.end])


@dataclass(frozen=True)
class _String:
    """A text in a conversation, with its key and the role of its message."""

    text: str
    key: str = ""
    role: str = ""


@dataclass(frozen=True)
class _Conversation:
    """The template's input and output, and the control tokens of which some may come from the conversation."""

    given: Any
    text: str
    render: Callable[[Any], str]
    spelled: set[str]

    def rendered_with(self, patterns: Sequence[re.Pattern[str] | None]) -> str | None:
        """Render with replaced letters where the k-th pattern matches in the k-th string with a control token.

        None if the output of the template then differs elsewhere.
        """
        numbers = count()

        def changed(value: Any) -> Any:
            if isinstance(value, str):
                pattern = patterns[next(numbers)] if _holds(value, self.spelled) else None
                return value if pattern is None else pattern.sub(lambda match: _other_letters(match[0]), value)
            if isinstance(value, Mapping):
                return {changed(key): changed(item) for key, item in value.items()}
            return [changed(item) for item in value] if isinstance(value, (list, tuple)) else value

        try:
            other = self.render(changed(self.given))
        except RenderFailed:
            return None
        return other if _differs_in_letters_only(other, self.text) else None

    def changeable(self, strings: Sequence[_String], constants: Sequence[str]) -> list[re.Pattern[str] | None]:
        """What can be replaced in each string: every control token, or those that the template does not look for.

        None if there are no others. Raises Unproved if one of the others cannot be replaced.
        """
        own = {one for one in self.spelled if not any(one in constant for constant in constants)}
        cautious = [_any_of(own) if _holds(string.text, own) else None for string in strings]
        if self.rendered_with(cautious) is None:
            raise Unproved(_DEPENDS)
        every, patterns = _any_of(self.spelled), list(cautious)
        alike: dict[tuple[str, str, frozenset[str]], list[int]] = {}
        for k, string in enumerate(strings):
            if looked_for := frozenset(one for one in self.spelled - own if one in string.text):
                alike.setdefault((string.role, string.key, looked_for), []).append(k)

        def can_be_changed(some: Sequence[int]) -> bool:
            tried = list(cautious)
            for k in some:
                tried[k] = every
            return self.rendered_with(tried) is not None

        for members in alike.values():
            for k in _largest(members, can_be_changed):
                patterns[k] = every
        return patterns


def _largest(members: Sequence[int], holds: Callable[[Sequence[int]], bool]) -> Sequence[int]:
    """The largest of a few natural subsets of strings for which `holds` is true: mostly all of them, or none."""
    if holds(members):
        return members
    middle = len(members) // 2
    if not middle or (len(members) > 3 and not any(holds([members[k]]) for k in (0, middle, -1))):
        return ()
    return [*_largest(members[:middle], holds), *_largest(members[middle:], holds)]


def _differs_in_letters_only(other: str, text: str) -> bool:
    """Whether each character of `other` is that of `text` or its replacement by `_other_letters`."""
    if len(other) != len(text):
        return False
    a, b, c = (np.frombuffer(s.encode("utf-32-le", "surrogatepass"), np.uint32) for s in (other, text, _next(text)))
    return bool(((a == b) | (a == c) | ((b == c) & (a == ord("x")))).all())


def _holds(string: str, spelled: set[str]) -> bool:
    return any(one in string for one in spelled)


def _next(text: str) -> str:
    return text.translate(_NEXT)


def _other_letters(spelled: str) -> str:
    """Replace letters and digits, keeping the length; in a token without any, replace the other characters."""
    other = _next(spelled)
    return other if other != spelled else "x" * len(spelled)


def _any_of(spelled: set[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(spelled, key=len, reverse=True))))


def _strings(value: Any, key: str = "", role: str = "") -> Iterator[_String]:
    """Every string in nested values, including keys, in the order in which they are replaced."""
    if isinstance(value, str):
        yield _String(value, key, role)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item, key, role)
    elif isinstance(value, Mapping):
        role = str(value.get("role", role))
        for name, item in value.items():
            yield from _strings(name, "", role)
            yield from _strings(item, str(name), role)


# --- as plain text ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _PlainCopy:
    """A tokenizer in which only private-use characters spell control tokens; `ids` maps back to the original ids."""

    tokenizer: Any
    private: Mapping[str, str]
    ids: Mapping[int, int]


def encode_as_text(text: str, genuine: Sequence[Written], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(T,) int32 tokens and (T, 2) int32 characters they cover, where only `genuine` are control tokens.

    Raises MaskRefused if the tokenizer nevertheless makes control tokens of other characters.
    """
    plane = next((p for p in _PLANES if not any(p <= ord(c) < p + _PLANE_SIZE for c in text)), None)
    if plane is None:
        raise MaskRefused("the text uses up the private-use characters that mark control tokens. Drop the row.")
    copy = _plain_copy(tokenizer, plane)
    pieces, position = [], 0
    for one in genuine:
        at = text.index(one.spelled, one.start)
        pieces += [text[position:at], copy.private[one.spelled]]
        position = at + len(one.spelled)
    encoding = copy.tokenizer.encode("".join([*pieces, text[position:]]), add_special_tokens=False)
    tokens = np.array([copy.ids.get(token, token) for token in encoding.ids], np.int32)
    offsets = np.asarray(encoding.offsets, np.int32).reshape(-1, 2)
    if len(written_out(tokens, offsets, text, tokenizer)) != len(genuine):
        raise MaskRefused(
            "this tokenizer makes control tokens of characters in the text, whatever `special_tokens_in_text` says. "
            "Remove them from the row."
        )
    return tokens, offsets


def _plain_copy(tokenizer: Tokenizer, plane: int) -> _PlainCopy:
    copies = _COPIES.setdefault(tokenizer, {})
    key = len(tokenizer), plane
    if key not in copies:
        copies.clear()
        copies[key] = _made_plain_copy(tokenizer, plane)
    return copies[key]


def _made_plain_copy(tokenizer: Tokenizer, plane: int) -> _PlainCopy:
    from tokenizers import Tokenizer as PlainTokenizer

    spelled = control_tokens(tokenizer).spelled
    if len(spelled) >= _PLANE_SIZE:
        raise MaskRefused("the tokenizer has too many control tokens to tell them from text.")
    # Of equal length, so that offsets remain those of the text.
    private = {text: chr(plane + k) * len(text) for k, text in enumerate(spelled.values())}
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    made.update(truncation=None, padding=None, post_processor=None)
    for token in made["added_tokens"]:
        token["content"] = private.get(token["content"], token["content"])
    model = made["model"]
    if isinstance(model["vocab"], Mapping):
        model["vocab"] = {private.get(text, text): index for text, index in model["vocab"].items()}
    else:
        model["vocab"] = [[private.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token") in private:
        model["unk_token"] = private[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, private)]
    copy = PlainTokenizer.from_str(json.dumps(made))
    ids = {own: index for index, text in spelled.items() if (own := copy.token_to_id(private[text])) is not None}
    stripped = {text.strip(): characters.strip() for text, characters in private.items()}
    return _PlainCopy(copy, stripped, ids)


def _makes(merge: Any, private: Mapping[str, str]) -> bool:
    """Whether a BPE merge takes or makes one of these."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in private or right in private or left + right in private
