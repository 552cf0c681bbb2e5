"""Splits a tokenized row into cells for display, and counts its tokens. Independent of HTML and terminals."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import numpy as np

from mlx_nb.data.masks.conversation import TokenizedConversation
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.errors import DataError

TEMPLATE = "template"


@dataclass(frozen=True)
class Cell:
    """Tokens `[first, stop)` that are shown together: the fewest that decode to text, or a run that looks the same.

    kind is "text", "special" (bordered), or "unseen" (characters that no token covers; first == stop).
    `loss` and `base_loss` are in nats, summed over the cell, NaN where unknown. `message` is -1 outside
    messages. `differs`: the other answer of a pair has another text there. `written`: a control token that occurs in
    the row's own text.
    """

    first: int
    stop: int
    text: str
    kind: str
    role: str
    message: int
    weights: tuple[float, ...]
    loss: float = math.nan
    base_loss: float = math.nan
    differs: bool = False
    written: bool = False

    @property
    def weight(self) -> float:
        """The weight with the largest absolute value."""
        return max(self.weights, key=abs, default=0.0)

    @property
    def loss_known(self) -> bool:
        """Whether it has a loss to color by."""
        return not (math.isnan(self.loss) and math.isnan(self.base_loss))


def added_tokens(tokenizer: Tokenizer) -> set[int]:
    """Ids of added tokens such as `<|im_end|>` and `<think>`, except runs of spaces."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    visible = {int(token_id) for token_id, token in added.items() if token.special or str(token).strip()}
    return visible | {int(token_id) for token_id in getattr(tokenizer, "all_special_ids", None) or ()}


def checked_loss(name: str, losses: np.ndarray | None, length: int) -> np.ndarray:
    """(length,) losses, NaN where unknown. Raises DataError for another length."""
    if losses is None:
        return np.full(length, np.nan)
    values = np.asarray(losses, dtype=np.float64)
    if values.shape != (length,):
        raise DataError(
            f"{name} has shape {values.shape}, but the row has {length} tokens: pass one loss per token, "
            "at the position of the token that is predicted, NaN where it is unknown."
        )
    return values


def row_cells(
    conversation: TokenizedConversation,
    tokenizer: Tokenizer,
    token_loss: np.ndarray | None = None,
    token_loss_base: np.ndarray | None = None,
    *,
    show_ends: bool = True,
) -> list[Cell]:
    """The row as cells in order. Tokens of one character share a cell; characters without a token get their own."""
    text, tokens, offsets = conversation.text, conversation.tokens.tolist(), conversation.offsets.tolist()
    weights = conversation.loss_mask.tolist()
    losses = checked_loss("token_loss", token_loss, len(tokens))
    base_losses = checked_loss("token_loss_base", token_loss_base, len(tokens))
    added = added_tokens(tokenizer)
    written = {(one.start, one.end) for one in conversation.written}
    spans = conversation.spans
    span_starts = [one.start for one in spans]

    def owner(character: int) -> tuple[str, int]:
        at = bisect_right(span_starts, character) - 1
        if at >= 0 and character < spans[at].end:
            return spans[at].role, spans[at].message
        return TEMPLATE, -1

    def unseen(start: int, end: int) -> Cell:
        role, message = owner(start)
        return Cell(first, first, text[start:end], "unseen", role, message, ())

    cells: list[Cell] = []
    covered = first = 0
    while first < len(tokens):
        start, end = offsets[first]
        stop = first + 1
        while stop < len(tokens) and start < end and offsets[stop][0] < min(end, offsets[stop][1]):
            end = max(end, offsets[stop][1])
            stop += 1
        # Some tokenizers exclude the space before a word from its offsets.
        if covered < start and text[covered:start].isspace():
            start = covered
        if covered < start and (covered or show_ends):
            cells.append(unseen(covered, start))
        role, message = owner(end - 1 if end > start else start)
        cells.append(
            Cell(
                first,
                stop,
                text[start:end] or str(tokenizer.convert_ids_to_tokens(tokens[first])),
                "special" if tokens[first] in added or start == end else "text",
                role,
                message,
                tuple(weights[first:stop]),
                float(losses[first:stop].sum()),
                float(base_losses[first:stop].sum()),
                written=(start, end) in written,
            )
        )
        covered, first = max(covered, end), stop
    if covered < len(text) and show_ends:
        cells.append(unseen(covered, len(text)))
    return _join_template_to_messages(cells)


def _join_template_to_messages(cells: list[Cell]) -> list[Cell]:
    """Assign template text to messages: the end of the previous one, then the start of the next.

    A turn that the template adds itself, such as its own system prompt, stays outside messages.
    """
    joined: list[Cell] = []
    previous = -1
    groups = [(message, list(group)) for message, group in groupby(cells, key=lambda cell: cell.message)]
    end = _end_of_turn(groups)
    for index, (message, group) in enumerate(groups):
        if message >= 0:
            joined += group
            previous = message
            continue
        following = groups[index + 1][0] if index + 1 < len(groups) else -1
        specials = [place for place, cell in enumerate(group) if _of_template(cell)]
        # Positions where a turn ends in this group and a special token opens another one.
        turns = [after for place, after in pairwise(specials) if group[place].text == end]
        # If a message contains its own end token, only the start of the next one remains.
        ends_here = any(_of_template(cell) for cell in joined[-1:]) and not any(
            group[place].text == end for place in specials[:1]
        )
        if following < 0:
            closing = len(group)
        elif previous < 0:
            closing = 0
        elif ends_here:
            closing = next(iter(specials), 0)
        else:
            closing = min(turns, default=next(iter(specials[1:]), 0))
        opening = max([closing, *turns])
        joined += [replace(cell, message=previous) for cell in group[:closing]]
        joined += group[closing:opening]
        joined += [replace(cell, message=following) for cell in group[opening:]]
    return joined


def _end_of_turn(groups: Sequence[tuple[int, list[Cell]]]) -> str:
    """The special token that ends most messages, inside them or just after; empty if there is none."""
    ends: Counter[str] = Counter()
    for (message, group), (_, following) in pairwise([*groups, (-1, [])]):
        if message >= 0:
            ends.update([cell.text for cell in (group[-1], *following) if _of_template(cell)][:1])
    return ends.most_common(1)[0][0] if ends else ""


def _of_template(cell: Cell) -> bool:
    """Whether it is a special token that is not part of the row's own text."""
    return cell.kind == "special" and not cell.written


def merged_runs(cells: Iterable[Cell], per_token: bool) -> Iterator[Cell]:
    """Joins neighboring cells that look the same; a cell with a known loss is not joined."""
    for _, group in groupby(
        cells,
        key=lambda cell: (
            (cell.first, cell.stop, cell.kind)
            if per_token or cell.loss_known or cell.kind != "text"
            else (cell.role, cell.message, cell.weight, cell.differs)
        ),
    ):
        run = list(group)
        if len(run) == 1:
            yield run[0]
        else:
            text = "".join(cell.text for cell in run)
            weights = tuple(weight for cell in run for weight in cell.weights)
            yield replace(run[0], stop=run[-1].stop, text=text, weights=weights)


def grouped(count: int) -> str:
    """A number with thousands separators."""
    return f"{count:,}"


def share(trained: int, total: int) -> str:
    """The percentage of trained tokens."""
    return f"{trained / total:.0%}" if total else "0%"


def summary(conversation: TokenizedConversation, dropped_tokens: int) -> str:
    """The numbers of tokens, trained tokens and tokens cut off, in one line."""
    total, trained = len(conversation.tokens), int(np.count_nonzero(conversation.loss_mask))
    line = f"{grouped(total)} tokens · {grouped(trained)} trained ({share(trained, total)})"
    return f"{line} · {grouped(dropped_tokens)} tokens cut off" if dropped_tokens else line


def role_counts(cells: Iterable[Cell]) -> dict[str, tuple[int, int]]:
    """Per role in order of appearance: tokens, trained tokens."""
    total: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for cell in cells:
        total[cell.role] += len(cell.weights)
        trained[cell.role] += sum(weight != 0 for weight in cell.weights)
    return {role: (count, trained[role]) for role, count in total.items()}


def partial_weights(loss_mask: np.ndarray) -> dict[float, int]:
    """The number of tokens for each weight other than 0 and 1."""
    counts = Counter(loss_mask.tolist())
    return {weight: counts[weight] for weight in sorted(counts) if weight not in (0.0, 1.0)}


def mean_losses(conversation: TokenizedConversation, losses: Sequence[np.ndarray | None]) -> list[float]:
    """The mean of each loss over trained tokens for which all given losses are known."""
    given = [np.asarray(loss, dtype=np.float64) for loss in losses if loss is not None]
    known = conversation.loss_mask != 0
    for loss in given:
        known = known & ~np.isnan(loss)
    return [float(loss[known].mean()) for loss in given] if known.any() else []
