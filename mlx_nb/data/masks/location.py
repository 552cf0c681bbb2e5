"""Locates every message in a rendered conversation.

In a long conversation each turn is measured in a window of it, and windows of equal shape only once. The result for a
window is used if the template writes the same around the turn there as in the whole text; otherwise the beginning of
the whole conversation is rendered for that turn.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from mlx_nb.data.masks.assistant_turns import Turn, TurnContext, measure_turn, refuse_prefix_mismatch
from mlx_nb.data.masks.tagging import TAGGINGS, TaggedRender, Tagging, Unproved, tag_and_prove
from mlx_nb.data.masks.template_facts import Message, Render, RenderFailed, TemplateFacts
from mlx_nb.data.masks.windows import LONG, Window, Windows
from mlx_nb.errors import MaskRefused

Ranges = Sequence[tuple[int, int]]
EosRanges = Callable[[Sequence[Message], str], Ranges]
"""The character ranges of the end-of-sequence tokens in the text that messages were rendered to, in order."""


@dataclass(frozen=True)
class Located:
    """The position of every message in the rendered text.

    turns     one for each assistant message in the text, in order
    regions   (message, start, end) of the texts of the other messages
    lost      (message, field, characters lost, characters given), for texts that the template leaves out
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
    eos: Ranges,
    eos_ranges: EosRanges,
) -> Located:
    """Locate every message in `text`, which is `render(messages, False)`, with the end-of-sequence tokens `eos`.

    Raises Unproved, with the reason of the first attempt, if no way of tagging leads to a proof.
    """
    reason: Unproved | None = None
    for tagging in TAGGINGS:
        try:
            tagged = tag_and_prove(messages, text, render, facts.constants, tagging)
            context = TurnContext(tagged, render, facts, text, eos)
            located, by_prefixes = _measure(messages, context, tagging, eos_ranges)
            break
        except Unproved as error:
            reason = reason or error
    else:
        raise reason or Unproved("no text could be tagged")
    for turn in by_prefixes:
        refuse_prefix_mismatch(turn, messages, text, render, facts.header)
    return located


def _measure(
    messages: Sequence[Message], context: TurnContext, tagging: Tagging, eos_ranges: EosRanges
) -> tuple[Located, list[Turn]]:
    """The positions of all messages, and the turns that were measured with the whole beginning of the conversation."""
    own: dict[int, list[int]] = {}
    for k, run in enumerate(context.tagged.runs):
        own.setdefault(run.message, []).append(k)
    answers, by_prefixes = dict[int, tuple[int, int]](), dict[int, Turn]()
    for i, runs in own.items():
        if messages[i].get("role") == "assistant":
            if len(runs) != runs[-1] - runs[0] + 1:
                raise Unproved(f"the text of message {i} (assistant) is mixed with that of others")
            answers[i] = runs[0], runs[-1]
            if i < LONG:
                by_prefixes[i] = measure_turn(context, i, *answers[i])
    by_windows: dict[int, Turn] = {}
    if len(messages) > LONG:
        windows = Windows(messages, context.facts.constants)
        by_windows = _measure_by_windows(
            answers, by_prefixes, _WindowContexts(messages, context, tagging, eos_ranges, windows)
        )
        rest = (i for i in answers if i not in by_prefixes and i not in by_windows)
        by_prefixes |= {i: measure_turn(context, i, *answers[i]) for i in rest}
    turns = sorted([*by_prefixes.values(), *by_windows.values()], key=lambda turn: turn.start)
    for before, after in pairwise(turns):
        if before.end > after.start:
            raise Unproved(f"messages {before.message} and {after.message} overlap in the text")
    regions = [r for r in _regions(context.tagged) if messages[r[0]].get("role") != "assistant"]
    located = Located(tuple(turns), tuple(regions), tuple(context.tagged.lost), tuple(context.tagged.absent))
    return located, [by_prefixes[turn.message] for turn in turns if turn.message in by_prefixes]


def _regions(tagged: TaggedRender) -> Iterator[tuple[int, int, int]]:
    """The regions of each message's texts; texts that no other message interrupts form one region."""
    first = 0
    runs = tagged.runs
    for k, run in enumerate(runs):
        if k + 1 == len(runs) or runs[k + 1].message != run.message:
            yield run.message, tagged.in_real(runs[first].start), tagged.in_real(run.end)
            first = k + 1


# --- long conversations ----------------------------------------------------------------------------------------------


def _measure_by_windows(
    answers: Mapping[int, tuple[int, int]], known: Mapping[int, Turn], windows: _WindowContexts
) -> dict[int, Turn]:
    """The later turns that their windows locate; empty if windows contradict turns that are `known`."""
    for i, turn in known.items():
        if i >= LONG // 2 and windows.turn(i, *answers[i]) not in (turn, None):
            return {}
    found = ((i, windows.turn(i, *runs)) for i, runs in answers.items() if i not in known)
    return {i: turn for i, turn in found if turn is not None}


@dataclass(frozen=True)
class _Surroundings:
    """The surroundings of a turn's texts, used to recognize the turn in a window.

    frames     what the template writes before and after them, in the tagged text
    neighbors  distance to the messages whose texts come next before and after; None without one
    eos        the end-of-sequence tokens after them, counted from `after`
    before     where the real text continues after the previous message
    after      where the real text continues after the turn's own texts
    """

    frames: tuple[str, str]
    neighbors: tuple[int | None, int | None]
    eos: tuple[tuple[int, int], ...]
    before: int = field(compare=False)
    after: int = field(compare=False)


def _surroundings(context: TurnContext, first_run: int, last_run: int, indexes: Sequence[int]) -> _Surroundings:
    """`indexes` are the numbers of the turn context's messages in the whole conversation."""
    tagged = context.tagged
    runs, i = tagged.runs, indexes[tagged.runs[first_run].message]
    previous = runs[first_run - 1] if first_run else None
    following = runs[last_run + 1] if last_run + 1 < len(runs) else None
    begin, end = previous.end if previous else 0, following.start if following else len(tagged.text)
    after, limit = tagged.in_real(runs[last_run].end), tagged.in_real(end)
    return _Surroundings(
        (tagged.text[begin : runs[first_run].start], tagged.text[runs[last_run].end : end]),
        (indexes[previous.message] - i if previous else None, indexes[following.message] - i if following else None),
        tuple((a - after, b - after) for a, b in context.eos_between(after, limit)),
        tagged.in_real(begin),
        after,
    )


@dataclass(frozen=True)
class _WindowContexts:
    """The windows of one conversation, and the measurements of each window shape."""

    messages: Sequence[Message]
    context: TurnContext
    tagging: Tagging
    eos_ranges: EosRanges
    windows: Windows
    known: dict[Hashable, tuple[Turn, _Surroundings] | None] = field(default_factory=dict)

    def turn(self, i: int, first_run: int, last_run: int) -> Turn | None:
        """The position of message `i` in the whole text by its window; None if the window cannot decide it."""
        window = self.windows.around(i)
        if window.shape not in self.known:
            self.known[window.shape] = self._measure(window)
        own = _surroundings(self.context, first_run, last_run, range(len(self.messages)))
        measured = self.known[window.shape]
        if measured and measured[1] != own:
            # What the template copies, such as the name of a tool, is not part of a shape.
            measured = self._measure(window)
        if not measured or measured[1] != own:
            return None
        turn, other = measured
        start, end = own.before + turn.start - other.before, own.after + turn.end - other.after
        return Turn(i, start, end, turn.ends_turn, turn.context_as_in_inference)

    def _measure(self, window: Window) -> tuple[Turn, _Surroundings] | None:
        """The turn and its surroundings, in a conversation of the window's messages alone."""
        messages, context = [self.messages[k] for k in window.indexes], self.context
        try:
            text = context.render(messages, False)
            tagged = tag_and_prove(messages, text, context.render, context.facts.constants, self.tagging)
            small = TurnContext(tagged, context.render, context.facts, text, self.eos_ranges(messages, text))
            own = [k for k, run in enumerate(tagged.runs) if run.message == window.slot]
            if not own or len(own) != own[-1] - own[0] + 1:
                return None
            turn = measure_turn(small, window.slot, own[0], own[-1])
            refuse_prefix_mismatch(turn, messages, text, context.render, context.facts.header)
        except (RenderFailed, Unproved, MaskRefused):
            return None
        return turn, _surroundings(small, own[0], own[-1], window.indexes)
