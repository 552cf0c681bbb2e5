"""Where each message lies in a rendered conversation: tag every text, render again, prove, measure.

A chat template is a program: it may drop, trim, move or quote what it is given. So nothing is guessed from its
source. Every text of the conversation is replaced by private-use characters, one code point for each text, and the
template renders that copy too. Where the copy equals the real render except at those characters, they show where
each text went. The template's own text around them (the frame) is then divided at the point where the generation
prompt of the same template ends, and after the token that ends the turn.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], bool], str]
"""Messages and `add_generation_prompt` to text. Raises RenderFailed."""

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_TEXT_FIELDS = ("content", *REASONING_FIELDS)
# Templates branch on these values or look things up by them, so they are never replaced.
_STRUCTURAL_KEYS = frozenset({"role", "type", "id", "tool_call_id", "name", "channel", "recipient"})
_FIRST_PRIVATE, _LAST_PRIVATE = 0xF0000, 0x10FFFD
_LEXEME = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]|\w+|\s|.", re.DOTALL)


class RenderFailed(Exception):
    """The template itself refused these messages."""


class Unproved(Exception):
    """Where a message lies could not be proved."""


@dataclass(frozen=True)
class TemplateFacts:
    """What one template does whatever the conversation.

    constants     strings that it looks for inside texts
    header        how it opens the assistant's turn after a user's; None when it cannot be asked
    prompt_tail   everything it writes after a lone user text when a generation prompt is asked for
    user_frame    everything it writes before a lone user text
    prompts       whether `add_generation_prompt` or the end of a user turn opens the assistant's turn
    """

    constants: tuple[str, ...]
    header: str | None
    prompt_tail: str
    user_frame: str
    prompts: bool


@dataclass(frozen=True)
class Turn:
    """The characters `[start, end)` that an assistant message generates, its end-of-turn included."""

    message: int
    start: int
    end: int
    ends_turn: bool
    context_as_in_inference: bool


@dataclass(frozen=True)
class Located:
    """Where every message lies in the rendered text.

    turns     one for each assistant message that is in the text
    regions   (message, start, end) of the texts of the other messages
    lost      (message, field, characters lost, characters given), for texts the template leaves out
    absent    assistant messages of which nothing is in the text
    """

    turns: tuple[Turn, ...]
    regions: tuple[tuple[int, int, int], ...]
    lost: tuple[tuple[int, str, int, int], ...]
    absent: tuple[int, ...]


def locate_messages(
    messages: Sequence[Message],
    text: str,
    render: Render,
    facts: TemplateFacts,
    eos_ranges: Sequence[tuple[int, int]],
) -> Located:
    """Find every message in `text`, which is `render(messages, False)`.

    `eos_ranges` are the character ranges of the end-of-sequence tokens in `text`, in order.
    Raises Unproved with the reason when no way of tagging leads to a proof.
    """
    reason: Unproved | None = None
    for tagging in _TAGGINGS:
        try:
            return _locate(messages, text, render, facts, eos_ranges, tagging)
        except Unproved as error:
            reason = reason or error
    raise reason or Unproved("no text could be tagged")


# --- tagging ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tagging:
    """Which characters of which texts are replaced."""

    kept: str
    tool_names: bool = True
    other_fields: bool = True
    tool_arguments: bool = True


# From the most telling to the most cautious. Quotes and backslashes are kept because JSON escapes them, so that
# a replaced one would change the length.
_TAGGINGS = (
    _Tagging(kept=r"[\s\"'\\]"),
    _Tagging(kept=r"[\W_]"),
    _Tagging(kept=r"[\W_]", tool_names=False, other_fields=False),
    _Tagging(kept=r"[\W_]", tool_names=False, other_fields=False, tool_arguments=False),
)


@dataclass(frozen=True)
class _Leaf:
    """One text of one message. `rest` is what remains untagged at its end."""

    message: int
    path: tuple[str, ...]
    tagged_characters: int
    rest: str


@dataclass(frozen=True)
class _Tags:
    """A tagged copy of a conversation. Leaf k is written with `chr(first + k)`, probes with what follows."""

    messages: list[Message]
    leaves: list[_Leaf]
    first: int

    def owner(self, tag: str) -> int:
        """The message that a tag belongs to."""
        return self.leaves[ord(tag) - self.first].message

    def pattern(self) -> str:
        return f"[{chr(self.first)}-{chr(self.first + max(len(self.leaves), 1) - 1)}]"

    def tail(self, rendered: str) -> tuple[str, str]:
        """The last tag in a render, empty when there is none, and what follows it."""
        low, high = chr(self.first), chr(self.first + len(self.leaves))
        for position in range(len(rendered) - 1, -1, -1):
            if low <= rendered[position] < high:
                return rendered[position], rendered[position + 1 :]
        return "", rendered


def _tag(messages: Sequence[Message], text: str, constants: Sequence[str], tagging: _Tagging) -> _Tags:
    leaves: list[_Leaf] = []
    kept = re.compile(f"(?:{'|'.join([*map(re.escape, constants), tagging.kept])})+")
    kept_without_constants = re.compile(f"{tagging.kept}+")
    first = _free_code_point(messages, text)

    def tagged(value: Any, message: int, path: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            return {key: tagged(item, message, (*path, str(key))) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [tagged(item, message, path) for item in value]
        if not isinstance(value, str) or not _is_text(path, tagging):
            return value
        tag = chr(first + len(leaves))
        written = _replace_others(value, kept, tag)
        if tag not in written:
            written = _replace_others(value, kept_without_constants, tag)
        if tag not in written:
            return value
        rest = written[written.rindex(tag) + 1 :]
        leaves.append(_Leaf(message, path, written.count(tag), rest))
        return written

    return _Tags([tagged(m, i, ()) for i, m in enumerate(messages)], leaves, first)


def _is_text(path: tuple[str, ...], tagging: _Tagging) -> bool:
    if path[0] == "tool_calls":
        if "arguments" in path:
            return tagging.tool_arguments
        return path[-1] == "name" and tagging.tool_names
    if path[-1] in _STRUCTURAL_KEYS:
        return False
    return path[0] in _TEXT_FIELDS or tagging.other_fields


def _replace_others(value: str, kept: re.Pattern[str], tag: str) -> str:
    pieces, position = [], 0
    for match in kept.finditer(value):
        pieces += [tag * (match.start() - position), match.group()]
        position = match.end()
    return "".join([*pieces, tag * (len(value) - position)])


def _free_code_point(messages: Sequence[Message], text: str) -> int:
    """The first of a stretch of private-use code points that occur nowhere in the conversation."""
    strings = [text, *_strings(messages)]
    needed = len(strings) + len(messages)
    used = sorted(
        {ord(c) for string in strings if not string.isascii() for c in string if ord(c) >= _FIRST_PRIVATE}
    )
    first = _FIRST_PRIVATE
    for code_point in used:
        if first <= code_point < first + needed:
            first = code_point + 1
    if first + needed > _LAST_PRIVATE:
        raise Unproved("the conversation uses up the private-use characters that mark texts")
    return first


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


# --- proof -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """Consecutive equal tags `[start, end)` in the tagged render."""

    start: int
    end: int
    tag: str
    message: int


def _locate(
    messages: Sequence[Message],
    text: str,
    render: Render,
    facts: TemplateFacts,
    eos_ranges: Sequence[tuple[int, int]],
    tagging: _Tagging,
) -> Located:
    tags = _tag(messages, text, facts.constants, tagging)
    try:
        tagged_text = render(tags.messages, False)
    except RenderFailed as error:
        raise Unproved(f"the template fails on a copy with other texts ({error})") from error
    runs = _runs(tagged_text, tags)
    _prove(text, tagged_text, runs)
    lost = tuple(_lost_texts(tags, runs))
    silent = _silent_assistants(messages, runs)
    absent: list[int] = []
    probes: list[int] = []
    if silent:
        absent = [i for i in silent if _is_left_out(messages, i, text, render)]
        tags, tagged_text = _probe(tags, [i for i in silent if i not in absent], text, render)
        runs = _runs(tagged_text, tags)
        first_probe = chr(tags.first + len(tags.leaves) - (len(silent) - len(absent)))
        probes = [run.start for run in runs if run.tag >= first_probe]
    scene = _Scene(tags, tagged_text, runs, probes, render, facts, text, eos_ranges)
    turns = [_turn(scene, i) for i, m in enumerate(messages) if _is_assistant(m) and i not in absent]
    turns.sort(key=lambda turn: turn.start)
    for before, after in zip(turns, turns[1:]):
        if before.end > after.start:
            raise Unproved(f"messages {before.message} and {after.message} overlap in the text")
    return Located(tuple(turns), tuple(_other_regions(scene, messages)), lost, tuple(absent))


def _is_assistant(message: Message) -> bool:
    return message.get("role") == "assistant"


def _runs(tagged_text: str, tags: _Tags) -> list[_Run]:
    return [
        _Run(match.start(), match.end(), match.group()[0], tags.owner(match.group()[0]))
        for match in re.finditer(rf"({tags.pattern()})\1*", tagged_text)
    ]


def _prove(text: str, tagged_text: str, runs: Sequence[_Run]) -> None:
    """Raise Unproved unless both renders are equal wherever there is no tag."""
    if len(text) != len(tagged_text):
        raise Unproved("the template's text depends on what the messages say")
    position = 0
    for start, end in [*((run.start, run.end) for run in runs), (len(text), len(text))]:
        if text[position:start] != tagged_text[position:start]:
            raise Unproved("the template's text depends on what the messages say")
        position = end


def _lost_texts(tags: _Tags, runs: Sequence[_Run]) -> Iterator[tuple[int, str, int, int]]:
    present: dict[str, int] = {}
    for run in runs:
        present[run.tag] = present.get(run.tag, 0) + run.end - run.start
    for k, leaf in enumerate(tags.leaves):
        lost = leaf.tagged_characters - present.get(chr(tags.first + k), 0)
        told = leaf.path[0] == "tool_calls" or (
            leaf.path[0] in _TEXT_FIELDS and leaf.path[-1] in (*_TEXT_FIELDS, "text")
        )
        if lost > 0 and told:
            yield leaf.message, leaf.path[0], lost, leaf.tagged_characters


def _silent_assistants(messages: Sequence[Message], runs: Sequence[_Run]) -> list[int]:
    heard = {run.message for run in runs}
    return [i for i, message in enumerate(messages) if _is_assistant(message) and i not in heard]


def _is_left_out(messages: Sequence[Message], i: int, text: str, render: Render) -> bool:
    others = [*messages[:i], *messages[i + 1 :]]
    try:
        return bool(others) and render(others, False) == text
    except RenderFailed:
        return False


def _probe(tags: _Tags, silent: Sequence[int], text: str, render: Render) -> tuple[_Tags, str]:
    """Give each silent message one more character, and prove that without it the text is the same."""
    for at_end in (True, False):
        leaves, messages = list(tags.leaves), list(tags.messages)
        for i in silent:
            probe = chr(tags.first + len(leaves))
            content = messages[i].get("content", "")
            rest = "" if at_end or not isinstance(content, str) else content
            leaves.append(_Leaf(i, ("content",), 1, rest))
            messages[i] = {**messages[i], "content": _with_probe(content, probe, at_end)}
        probed = replace(tags, messages=messages, leaves=leaves)
        try:
            tagged_text = render(messages, False)
            runs = _runs(tagged_text, probed)
            without, probe_runs = (
                tagged_text,
                [r for r in runs if ord(r.tag) >= tags.first + len(tags.leaves)],
            )
            for run in reversed(probe_runs):
                without = without[: run.start] + without[run.end :]
            _prove(text, without, _runs(without, tags) if tags.leaves else [])
        except (RenderFailed, Unproved):
            continue
        if [run.message for run in probe_runs] == list(silent) and all(
            r.end - r.start == 1 for r in probe_runs
        ):
            return probed, tagged_text
    raise Unproved(
        f"message {silent[0]} (assistant) has no text of its own that could be followed into the render"
    )


def _with_probe(content: Any, probe: str, at_end: bool) -> Any:
    if isinstance(content, (list, tuple)):
        part = {"type": "text", "text": probe}
        return [*content, part] if at_end else [part, *content]
    return f"{content}{probe}" if at_end else f"{probe}{content}"


# --- frames ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scene:
    """All that is needed to measure one assistant turn. Positions are in `tagged_text` unless said otherwise."""

    tags: _Tags
    tagged_text: str
    runs: Sequence[_Run]
    probes: Sequence[int]
    render: Render
    facts: TemplateFacts
    text: str
    eos_ranges: Sequence[tuple[int, int]]

    def in_text(self, position: int) -> int:
        """The same place in the real text, which has no probes."""
        return position - bisect_left(self.probes, position)


def _turn(scene: _Scene, i: int) -> Turn:
    own = [k for k, run in enumerate(scene.runs) if run.message == i]
    if len(own) != own[-1] - own[0] + 1:
        raise Unproved(f"the text of message {i} (assistant) is mixed with that of others")
    start, as_in_inference = _start(scene, i, own[0])
    end, ends_turn = _end(scene, i, own[-1])
    return Turn(i, scene.in_text(start), end, ends_turn, as_in_inference)


def _start(scene: _Scene, i: int, first_run: int) -> tuple[int, bool]:
    """Where the generation prompt before message `i` ends, and whether all before it is what inference gives."""
    previous = scene.runs[first_run - 1] if first_run else None
    boundary = previous.end if previous else 0
    frame = scene.tagged_text[boundary : scene.runs[first_run].start]
    prompt = _try_render(scene, i, True)
    length = None
    if prompt is not None:
        tag, tail = scene.tags.tail(prompt)
        if tag == (previous.tag if previous else ""):
            length = _prompt_length(scene, i, frame, tail)
    if length is None:
        length = _header_end(scene, frame)
    if length is None:
        raise Unproved(f"the start of message {i} (assistant) cannot be told from the template's own text")
    start = boundary + length
    return start, prompt is not None and len(prompt) == start and scene.tagged_text.startswith(prompt)


def _try_render(scene: _Scene, count: int, generation_prompt: bool) -> str | None:
    """The first `count` tagged messages, or None where the template does not render them."""
    if count == 0:
        return None
    try:
        return scene.render(scene.tags.messages[:count], generation_prompt)
    except RenderFailed:
        return None


def _prompt_length(scene: _Scene, i: int, frame: str, tail: str) -> int | None:
    """How much of `frame` is the prompt, given what an inference prompt has in its place."""
    header = scene.facts.header
    without = _try_render(scene, i, False) if header is None or not frame.startswith(tail) else None
    plain_tail = scene.tags.tail(without)[1] if without is not None else ""
    if frame.startswith(tail):
        if header is None and tail == plain_tail and frame[len(tail) :].strip():
            return None
        if header and not tail.endswith(header) and header in frame:
            # The template opens a turn after this message without being asked to.
            return max(len(tail), frame.rindex(header) + len(header))
        return len(tail)
    shared, before_prompt = _shared_lexemes(tail, frame), _shared_lexemes(tail, plain_tail)
    opening = tail[before_prompt:shared]
    return shared if shared > before_prompt and _marks_the_assistant(scene, opening) else None


def _header_end(scene: _Scene, frame: str) -> int | None:
    """Where the assistant's header ends in a frame for which no inference prompt exists."""
    tail, header = scene.facts.prompt_tail, scene.facts.header
    if header is None:
        return None
    if not header.strip():
        # No header: what also stands before a user's text is not the assistant's either.
        return len(frame) if scene.facts.user_frame.startswith(frame) or not frame.strip() else None
    if header in frame:
        return frame.rindex(header) + len(header)
    lexemes = [match.group() for match in _LEXEME.finditer(tail)]
    for k in range(len(lexemes)):
        ending = "".join(lexemes[k:])
        if ending in frame and _marks_the_assistant(scene, ending):
            return frame.rindex(ending) + len(ending)
    openings = [match.group() for match in _LEXEME.finditer(header)]
    for k in range(len(openings) - 1, 0, -1):
        opening = "".join(openings[:k])
        if opening in frame and _marks_the_assistant(scene, opening):
            return frame.rindex(opening) + len(opening)
    return None


def _marks_the_assistant(scene: _Scene, opening: str) -> bool:
    """Whether a piece of a header is not also written before other roles."""
    if not opening.strip() or opening in scene.facts.user_frame:
        return False
    position = 0
    for run in scene.runs:
        role = scene.tags.messages[run.message].get("role")
        if role != "assistant" and opening in scene.tagged_text[position : run.start]:
            return False
        position = run.end
    return True


def _end(scene: _Scene, i: int, last_run: int) -> tuple[int, bool]:
    """Where message `i` ends in the real text, and whether an end-of-turn is part of it."""
    run = scene.runs[last_run]
    following = scene.runs[last_run + 1].start if last_run + 1 < len(scene.runs) else len(scene.tagged_text)
    frame = scene.tagged_text[run.end : following]
    is_last = i == len(scene.tags.messages) - 1
    closed = scene.tagged_text if is_last else _try_render(scene, i + 1, False)
    tag, tail = scene.tags.tail(closed) if closed is not None else ("", "")
    shared = frame[: _shared_lexemes(tail, frame)] if tag and scene.tags.owner(tag) == i else ""
    rest = scene.tags.leaves[ord(run.tag) - scene.tags.first].rest
    content = len(rest) if shared.startswith(rest) else 0
    if not shared[content:].strip() and not is_last:
        shared = max(shared, _closing_before_prompt(scene, i, frame), key=len)
    origin = scene.in_text(run.end)
    for start, end in scene.eos_ranges:
        if origin + content <= start and end <= origin + len(shared):
            return end, True
    length = max(content, len(shared.rstrip()))
    if shared[content:].strip():
        return origin + length, True
    for start, end in scene.eos_ranges:
        # No end-of-turn of its own: the marker of the next role is what generation stops at.
        if (
            origin + length <= start
            and end <= origin + len(frame)
            and not scene.text[origin + length : start].strip()
        ):
            return end, True
    return origin + length, False


def _closing_before_prompt(scene: _Scene, i: int, frame: str) -> str:
    """How message `i` is closed when a generation prompt follows: templates may close only then."""
    header = scene.facts.header
    prompted = _try_render(scene, i + 1, True)
    if not header or prompted is None:
        return ""
    tag, tail = scene.tags.tail(prompted)
    if not tag or scene.tags.owner(tag) != i:
        return ""
    if tail.endswith(header):
        tail = tail[: -len(header)]
        return frame[: _shared_lexemes(tail, frame)]
    return tail if frame.startswith(tail) else ""


def _shared_lexemes(a: str, b: str) -> int:
    """The length of the longest common beginning of `a` and `b` that splits no lexeme of `a` or `b`."""
    length = 0
    for x, y in zip(_LEXEME.finditer(a), _LEXEME.finditer(b)):
        if x.group() != y.group():
            break
        length = x.end()
    return length


def _other_regions(scene: _Scene, messages: Sequence[Message]) -> Iterator[tuple[int, int, int]]:
    """The texts of messages that are not the assistant's; runs that nobody interrupts are one region."""
    current: list[int] | None = None
    for run in scene.runs:
        if current and current[0] == run.message:
            current[2] = run.end
            continue
        if current and not _is_assistant(messages[current[0]]):
            yield current[0], scene.in_text(current[1]), scene.in_text(current[2])
        current = [run.message, run.start, run.end]
    if current and not _is_assistant(messages[current[0]]):
        yield current[0], scene.in_text(current[1]), scene.in_text(current[2])


# --- what a template does whatever the conversation ------------------------------------------------------------------

_SEARCHING_METHODS = frozenset(
    "split rsplit partition rpartition startswith endswith replace find rfind index count removeprefix removesuffix".split()
)
_STRIPPING_METHODS = frozenset({"strip", "lstrip", "rstrip"})
_USER_PROBE, _ASSISTANT_PROBE = "\uf8f0", "\uf8f1"


def study_template(source: str, render: Render) -> TemplateFacts:
    """Ask a template what it does: what it looks for in texts, and how it opens the assistant's turn."""
    constants = _tested_constants(source)
    user = {"role": "user", "content": _USER_PROBE}
    unknown = TemplateFacts(constants, None, "", "", True)
    try:
        prompted, plain = render([user], True), render([user], False)
    except RenderFailed:
        return unknown
    if prompted.count(_USER_PROBE) != 1 or plain.count(_USER_PROBE) != 1:
        return unknown
    user_frame, prompt_tail = prompted.split(_USER_PROBE)
    header = prompt_tail[_shared_lexemes(prompt_tail, plain.split(_USER_PROBE)[1]) :]
    if header.strip():
        return TemplateFacts(constants, header, prompt_tail, user_frame, True)
    try:
        pair = render([user, {"role": "assistant", "content": _ASSISTANT_PROBE}], False)
    except RenderFailed:
        return unknown
    match = re.search(f"{_USER_PROBE}(.*?){_ASSISTANT_PROBE}", pair, re.DOTALL)
    if match is None or not match[1].startswith(prompt_tail):
        return unknown
    header = match[1][len(prompt_tail) :]
    if not header.strip():
        return TemplateFacts(constants, "", prompt_tail, user_frame, True)
    return TemplateFacts(constants, header, match[1], user_frame, False)


def _tested_constants(source: str) -> tuple[str, ...]:
    """The strings that a template compares with or looks for in values, longest first."""
    import jinja2
    from jinja2 import nodes

    standard = re.sub(r"\{%([-+]?)\s*generation\s*([-+]?)%\}", r"{%\1 if true \2%}", source)
    standard = re.sub(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", r"{%\1 endif \2%}", standard)
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(standard)
    except jinja2.TemplateError:
        return ()
    named: dict[str, set[str]] = {}
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and isinstance(assignment.node, nodes.Const):
            named.setdefault(assignment.target.name, set()).add(str(assignment.node.value))

    def strings(node: nodes.Node) -> set[str]:
        found = {node} | set(node.find_all((nodes.Const, nodes.Name)))
        values = {n.value for n in found if isinstance(n, nodes.Const) and isinstance(n.value, str)}
        return values.union(*(named.get(n.name, set()) for n in found if isinstance(n, nodes.Name)))

    result: set[str] = set()
    for compare in tree.find_all(nodes.Compare):
        for operand in compare.ops:
            if operand.op in ("in", "notin"):
                result |= (
                    strings(compare.expr) if isinstance(compare.expr, (nodes.Const, nodes.Name)) else set()
                )
            elif operand.op in ("eq", "ne") and not (
                _names_a_role(compare.expr) or _names_a_role(operand.expr)
            ):
                for side in (compare.expr, operand.expr):
                    result |= strings(side) if isinstance(side, nodes.Const) else set()
    for call in tree.find_all(nodes.Call):
        method = call.node.attr if isinstance(call.node, nodes.Getattr) else ""
        found = (
            set().union(*map(strings, call.args))
            if method in _SEARCHING_METHODS | _STRIPPING_METHODS
            else set()
        )
        result |= {c for string in found for c in string} if method in _STRIPPING_METHODS else found
    for applied in tree.find_all(nodes.Filter):
        if applied.name in ("replace", "split", "trim"):
            result |= set().union(*map(strings, applied.args))
    return tuple(sorted((s for s in result if s.strip()), key=len, reverse=True))


def _names_a_role(node: Any) -> bool:
    from jinja2 import nodes

    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value in _STRUCTURAL_KEYS
    name = node.attr if isinstance(node, nodes.Getattr) else node.name if isinstance(node, nodes.Name) else ""
    return name in _STRUCTURAL_KEYS
