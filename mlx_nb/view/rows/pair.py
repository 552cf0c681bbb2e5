"""Renders a preference row: the chosen and the rejected answer side by side, with differences marked."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from html import escape
from math import nan
from typing import NamedTuple

import numpy as np

from mlx_nb.data.masks.conversation import TokenizedConversation
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.errors import DataError
from mlx_nb.view import theme
from mlx_nb.view.rows.cells import Cell, checked_loss, grouped, row_cells, summary
from mlx_nb.view.rows.diff import mark_differences
from mlx_nb.view.rows.html import (
    PAGE_TOKENS,
    QUIET,
    RowStyle,
    blocks_html,
    notes_html,
    paged_html,
    samples_html,
    strip_html,
)
from mlx_nb.view.rows.text import block_lines, highest_losses, legend_line, note_lines
from mlx_nb.view.theme import BLUE, GREY, one_line, tint

_OPEN_PROMPT = 400  # tokens; a longer prompt is folded
_NAMES = ("✓ chosen", "✗ rejected")


@dataclass(frozen=True, eq=False)
class Answer:
    """One answer with its prompt: `token_loss` and `token_loss_base` are (T,) in nats, None where not measured."""

    conversation: TokenizedConversation
    token_loss: np.ndarray | None = None
    token_loss_base: np.ndarray | None = None
    dropped_tokens: int = 0


class PairCells(NamedTuple):
    """The parts of a pair: the messages that both answers share, then the rest of each."""

    prompt: list[Cell]
    chosen: list[Cell]
    rejected: list[Cell]


def pair_cells(chosen: Answer, rejected: Answer, tokenizer: Tokenizer) -> PairCells:
    """The cells of a pair, with differences marked. The prompt has no losses."""
    sides = [
        row_cells(
            answer.conversation,
            tokenizer,
            answer.token_loss,
            answer.token_loss_base,
            show_ends=not answer.dropped_tokens,
        )
        for answer in (chosen, rejected)
    ]
    shared = _shared_tokens(chosen.conversation, rejected.conversation)
    start = min(_start_of_message(cells, shared) for cells in sides)
    prompt = [replace(cell, loss=nan, base_loss=nan) for cell in sides[0] if cell.first < start]
    answers = [[cell for cell in cells if cell.first >= start] for cells in sides]
    return PairCells(prompt, *mark_differences(*answers))


def _shared_tokens(chosen: TokenizedConversation, rejected: TokenizedConversation) -> int:
    """The number of untrained tokens that both begin with."""
    most = min(len(chosen.tokens), len(rejected.tokens))
    same = chosen.tokens[:most] == rejected.tokens[:most]
    untrained = (chosen.loss_mask[:most] == 0) & (rejected.loss_mask[:most] == 0)
    apart = np.flatnonzero(~(same & untrained))
    return int(apart[0]) if len(apart) else most


def _start_of_message(cells: list[Cell], shared: int) -> int:
    """The first token of the message in which the shared tokens end."""
    at = next((k for k, cell in enumerate(cells) if cell.stop > shared), len(cells))
    if at == len(cells):
        return shared
    while at and cells[at - 1].message == cells[at].message:
        at -= 1
    return cells[at].first


def pages_of_pair(cells: PairCells) -> int:
    """The number of pages of the longer answer."""
    lengths = [side[-1].stop - side[0].first if side else 0 for side in (cells.chosen, cells.rejected)]
    return max(1, -(-max(lengths) // PAGE_TOKENS))


def render_pair_html(
    chosen: Answer,
    rejected: Answer,
    tokenizer: Tokenizer,
    *,
    title: str = "",
    per_token: bool = False,
    page: int = 0,
    show_mask: bool = True,
    hidden_roles: Collection[str] = (),
) -> str:
    """The pair as HTML: the prompt once, then the answers side by side, or stacked in a narrow window.

    Each answer looks like a row of `render_html`; differences from the other answer have a bar above. `page` is a page
    of the answers. Raises DataError for a page that neither has, and for losses of the wrong length.
    """
    cells = pair_cells(chosen, rejected, tokenizer)
    pages = pages_of_pair(cells)
    if not 0 <= page < pages:
        raise DataError(f"page {page} does not exist: the answers have {pages} of {grouped(PAGE_TOKENS)} tokens.")
    look = RowStyle(per_token, show_mask, hidden_roles, edges=False)
    losses = sum(loss is not None for loss in (chosen.token_loss, chosen.token_loss_base))
    masks = np.concatenate([answer.conversation.loss_mask for answer in (chosen, rejected)])
    columns = [
        _column_html(name, answer, side, look, page, losses)
        for name, answer, side in zip(_NAMES, (chosen, rejected), (cells.chosen, cells.rejected))
    ]
    heading = f"<b>{escape(one_line(title), quote=True)}</b>&emsp;" if title else ""
    return (
        f'<div class="mlx-nb-tokens" dir="ltr" style="max-width:90em;text-align:left">'
        f"<div>{heading}{_counts(cells)}</div>"
        f"{samples_html(masks, [*cells.prompt, *cells.chosen, *cells.rejected], losses=losses)}"
        f'<div style="{theme.WRAP}">{_prompt_html(cells.prompt, chosen.conversation.tokens, look)}'
        f'<div style="display:flex;flex-wrap:wrap;gap:0 20px">{"".join(columns)}</div></div></div>'
    )


def _counts(cells: PairCells) -> str:
    """The length of each answer, and how many of its tokens differ."""
    parts = [
        f"{name} {grouped(total)} tokens, {grouped(differing)} different"
        for name, side in (("chosen", cells.chosen), ("rejected", cells.rejected))
        for total, differing in [(_tokens(side), _tokens([cell for cell in side if cell.differs]))]
    ]
    return " · ".join(parts)


def _tokens(cells: list[Cell]) -> int:
    return sum(len(cell.weights) for cell in cells)


def _prompt_html(prompt: list[Cell], tokens: np.ndarray, look: RowStyle) -> str:
    if not prompt:
        return ""
    count = _tokens(prompt)
    return (
        f'<details{" open" if count <= _OPEN_PROMPT else ""} style="margin:10px 0 4px 0">'
        f'<summary style="margin:0 0 6px 0">prompt <span style="{QUIET}">{grouped(count)} tokens, read before '
        f"either answer</span></summary>"
        f"{blocks_html(prompt, tokens, look._replace(per_token=look.per_token and count <= PAGE_TOKENS))}</details>"
    )


def _column_html(name: str, answer: Answer, cells: list[Cell], look: RowStyle, page: int, losses: int) -> str:
    conversation, first = answer.conversation, name == _NAMES[0]
    beyond = page * PAGE_TOKENS >= max(1, _tokens(cells))
    body = (
        f'<div style="{QUIET}">this answer has no tokens on this page</div>'
        if beyond
        else paged_html(cells, conversation.tokens, look, page, PAGE_TOKENS, alone=look.per_token or losses > 0)
    )
    # The rule above separates the columns when they are stacked.
    rule = f"border-top:3px {'solid' if first else 'dashed'} {tint(BLUE if first else GREY, 0.9)}"
    return (
        f'<div style="flex:1 1 20em;min-width:0;margin:4px 0 8px 0;{rule};padding:4px 0 0 0">'
        f'<div><b>{name}</b> <span style="{QUIET}">{summary(conversation, answer.dropped_tokens)}</span></div>'
        f"{strip_html(conversation.loss_mask)}"
        f"{notes_html(conversation, cells, answer.token_loss, answer.token_loss_base)}"
        f'<div style="margin:8px 0 0 0">{body}</div></div>'
    )


def render_pair_text(
    chosen: Answer, rejected: Answer, tokenizer: Tokenizer, *, title: str = "", color: bool = True, width: int = 100
) -> str:
    """The pair for a terminal: the prompt, the chosen answer and the rejected one, like rows of `render_text`.

    Without `color`, differences are enclosed in `▸` and `◂`.
    """
    # Without color, token losses cannot be shown.
    quiet = [answer if color else replace(answer, token_loss=None) for answer in (chosen, rejected)]
    cells = pair_cells(quiet[0], quiet[1], tokenizer)
    heading = f"{one_line(title)}  " if title else ""
    lines = [heading + _counts(cells), legend_line(color=color, differs=True)]
    if cells.prompt:
        lines += ["", f"prompt: {grouped(_tokens(cells.prompt))} tokens, read before either answer"]
        lines += block_lines(cells.prompt, width, color=color)
    for name, answer, side in zip(_NAMES, (chosen, rejected), (cells.chosen, cells.rejected)):
        conversation, loss = answer.conversation, answer.token_loss
        lines += ["", f"{name}: {summary(conversation, answer.dropped_tokens)}"]
        lines += note_lines(conversation, side, loss, color=color)
        lines += block_lines(side, width, color=color)
        if loss is not None:
            lines += [
                "",
                *highest_losses(conversation, checked_loss("token_loss", loss, len(conversation.tokens)), side),
            ]
    return "\n".join(lines)
