"""The tokens of a row on screen: which are trained, who says them, what they cost the model.

`render_html` for notebooks, `render_text` for terminals, `render_batch_html` for the arrays of a batch. Every
character of a row is data: it is escaped, and one that hides or reorders others is named instead of printed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from html import escape
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from mlx_nb.data.chat_template import TokenizedConversation
from mlx_nb.errors import DataError
from mlx_nb.view import theme
from mlx_nb.view.batch_table import render_batch_html
from mlx_nb.view.theme import BLUE, GREY, ORANGE, ROLE_COLOURS, one_line, span, tint, visible_html
from mlx_nb.view.token_cells import (
    TEMPLATE,
    Cell,
    grouped,
    mean_losses,
    merged_runs,
    partial_weights,
    role_counts,
    row_cells,
    summary,
)
from mlx_nb.view.token_text import render_text

__all__ = ["render_batch_html", "render_html", "render_text"]

# A notebook keeps every output: a row that would take more shows one page at a time.
_MOST_BYTES = 600_000
_SMALL = "font-size:.85em"
_QUIET = f"{_SMALL};opacity:.8"
_SPECIAL = f"border:1px solid {tint(GREY, 0.8)};border-radius:3px;padding:0 2px"
PAGE_TOKENS = 2000
_UNSEEN = f"opacity:{theme.DIM};text-decoration:line-through"


class _Look(NamedTuple):
    """What the person chose to see."""

    per_token: bool
    show_mask: bool
    hidden_roles: Collection[str]


def _trained_style(weight: float) -> str:
    line = "2px solid" if weight == 1 else "2px dashed"
    colour = BLUE if weight > 0 else ORANGE
    strength = 0.08 + 0.20 * min(abs(weight), 1.0)
    return f"background:{tint(colour, strength)};border-bottom:{line} {tint(colour, 1)}"


def _style(cell: Cell, look: _Look) -> str:
    if cell.kind == "unseen":
        return _UNSEEN
    styles = [_SPECIAL] if cell.kind == "special" else []
    if look.per_token and cell.kind == "text":
        styles.append(f"border-right:1px solid {tint(GREY, 0.45)}")
    if not cell.loss_known and not look.show_mask:
        return ";".join(styles)
    if not cell.loss_known:
        styles.append(_trained_style(cell.weight) if cell.weight else f"opacity:{theme.DIM}")
        return ";".join(styles)
    if math.isnan(cell.base_loss):
        styles.append(f"background:{theme.loss_tint(cell.loss)}")
    elif not math.isnan(cell.loss):
        styles.append(f"background:{theme.change_tint(cell.base_loss - cell.loss)}")
    if cell.weight:
        styles.append(f"border-bottom:2px solid {tint(GREY, 1)}")
    return ";".join(styles)


def _title(cell: Cell, tokens: np.ndarray) -> str:
    if cell.kind == "unseen":
        return "no token covers these characters: the model never sees them"
    count = cell.stop - cell.first
    where = f"token {cell.first}" if count == 1 else f"tokens {cell.first}–{cell.stop - 1} ({grouped(count)})"
    parts = [where]
    if count <= 12:
        ids = ", ".join(str(token) for token in tokens[cell.first : cell.stop].tolist())
        parts.append(f"id {ids}" if count == 1 else f"ids {ids}")
    parts.append(cell.role)
    weights = sorted(set(cell.weights))
    if weights == [0.0]:
        parts.append("not trained, weight 0")
    else:
        parts.append("trained, weight " + ", ".join(f"{weight:g}" for weight in weights))
    if not math.isnan(cell.loss):
        parts.append(f"loss {cell.loss:.3f} nats, probability {math.exp(-cell.loss):.3g}")
    if not math.isnan(cell.base_loss):
        parts.append(f"base model {cell.base_loss:.3f} nats, probability {math.exp(-cell.base_loss):.3g}")
    return " · ".join(parts)


def _run_html(cell: Cell, tokens: np.ndarray, look: _Look) -> str:
    content = visible_html(cell.text, edges=not look.per_token and not cell.loss_known)
    in_runs = look.show_mask and not look.per_token and not cell.loss_known
    if cell.kind == "text" and cell.weight not in (0.0, 1.0) and in_runs:
        content = f'<sup style="opacity:.8;font-size:.7em">×{cell.weight:g}</sup>{content}'
    return span(content, style=_style(cell, look), title=one_line(_title(cell, tokens)), isolate=cell.text)


def _block_html(cells: list[Cell], tokens: np.ndarray, look: _Look) -> str:
    """The cells of one message, behind a bar in the colour of its role."""
    # Cells of a page may hold no more of a message than what the template puts around it.
    role = next((cell.role for cell in cells if cell.role != TEMPLATE), TEMPLATE if cells[0].message < 0 else "")
    hidden = role in look.hidden_roles
    runs = [] if hidden else merged_runs(cells, look.per_token)
    body = "".join(_run_html(run, tokens, look) for run in runs)
    total = sum(len(cell.weights) for cell in cells)
    trained = sum(weight != 0 for cell in cells for weight in cell.weights)
    label = f"<b>{escape(one_line(role), quote=True)}</b>" if role else ""
    count = f"{grouped(trained)} of {grouped(total)} trained" if trained else f"{grouped(total)} tokens"
    count += ", hidden" if hidden else ""
    return (
        f'<div style="border-left:3px solid {tint(ROLE_COLOURS.get(role, GREY), 0.85)};'
        f'padding:0 0 0 10px;margin:0 0 12px 0">'
        f'<div style="{_QUIET};line-height:1.4">{label} {count}</div>'
        f'<div style="{theme.MONOSPACE};font-size:.95em;line-height:1.65">{body}</div></div>'
    )


def _blocks_html(cells: Iterable[Cell], tokens: np.ndarray, look: _Look) -> str:
    groups = groupby(cells, key=lambda cell: cell.message)
    return "".join(_block_html(list(group), tokens, look) for _, group in groups)


def _strip_html(loss_mask: np.ndarray) -> str:
    """The whole row as one thin bar: where in it the trained tokens are."""
    if not len(loss_mask):
        return ""
    columns = np.array_split(loss_mask != 0, min(len(loss_mask), 120))
    shares = [(round(float(column.mean()), 1), len(column)) for column in columns]
    bars = []
    for share, group in groupby(shares, key=lambda item: item[0]):
        width = 100 * sum(length for _, length in group) / len(loss_mask)
        colour = tint(BLUE, 0.25 + 0.75 * share) if share else tint(GREY, 0.25)
        bars.append(f'<span style="width:{width:.2f}%;background:{colour}"></span>')
    title = "the whole row from first to last token; blue where it is trained"
    return f'<div title="{title}" style="display:flex;height:5px;margin:6px 0 8px 0">{"".join(bars)}</div>'


def _sample_html(text: str, style: str) -> str:
    return span(text, style=f"{style};white-space:nowrap")


def _scale_html(words: str, low: str, tints: Sequence[tuple[str, str]], high: str) -> str:
    swatches = "".join(
        f'<span style="background:{colour};padding:0 6px">{escape(label, quote=True)}</span>' for label, colour in tints
    )
    return f'{words} <span style="white-space:nowrap">{low} {swatches} {high}</span>'


def _legend_html(conversation: TokenizedConversation, cells: list[Cell], token_loss: Any, token_loss_base: Any) -> str:
    entries = []
    means = mean_losses(conversation, (token_loss, token_loss_base))
    if token_loss is None:
        entries.append(_sample_html("trained", _trained_style(1.0)))
        entries += [
            _sample_html(f"weight {weight:g}: {grouped(count)} tokens", _trained_style(weight))
            for weight, count in partial_weights(conversation.loss_mask).items()
        ]
        entries.append(_sample_html("not trained", f"opacity:{theme.DIM}"))
    else:
        entries.append(_sample_html("trained", f"border-bottom:2px solid {tint(GREY, 1)}"))
        if token_loss_base is None:
            scale = [(f"{nats}" if nats < 6 else "6+", theme.loss_tint(nats)) for nats in range(7)]
            entries.append(_scale_html("loss in nats", "", scale, ""))
        else:
            scale = [(f"{-nats:+d}" if nats else "0", theme.change_tint(nats)) for nats in range(3, -4, -1)]
            entries.append(_scale_html("loss against the base model:", "better", scale, "worse"))
    if any(cell.kind == "special" for cell in cells):
        entries.append(_sample_html("special token", _SPECIAL))
    if any(cell.kind == "unseen" for cell in cells):
        entries.append(_sample_html("never seen", _UNSEEN))
    entries.append("⏎&nbsp;newline&ensp;⇥&nbsp;tab&ensp;·&nbsp;space&ensp;‹U+…›&nbsp;hidden&nbsp;character")
    roles = [
        f"{escape(one_line(role), quote=True)} {grouped(trained)} of {grouped(total)}"
        for role, (total, trained) in role_counts(cells).items()
    ]
    lines = ["trained: " + " · ".join(roles)]
    if len(means) == 1:
        lines.append(f"mean loss of the trained tokens {means[0]:.3f} nats")
    if len(means) == 2:
        lines.append(
            f"mean loss of the trained tokens {means[0]:.3f} nats, base model {means[1]:.3f}: "
            f"{'better' if means[1] >= means[0] else 'worse'} by {abs(means[1] - means[0]):.3f}"
        )
    lines += [f"⚠ {escape(one_line(problem), quote=True)}" for problem in conversation.problems]
    # The samples are drawn as strong as the tokens they explain.
    samples = f'<div style="{_SMALL};line-height:1.7">{"&emsp; ".join(entries)}</div>'
    return samples + "".join(f'<div style="{_QUIET};line-height:1.7">{line}</div>' for line in lines)


def render_html(
    conversation: TokenizedConversation,
    tokenizer: Any,
    *,
    title: str = "",
    token_loss: np.ndarray | None = None,
    token_loss_base: np.ndarray | None = None,
    per_token: bool = False,
    page: int = 0,
    page_tokens: int = PAGE_TOKENS,
    dropped_tokens: int = 0,
    show_mask: bool = True,
    hidden_roles: Collection[str] = (),
) -> str:
    """The row as HTML: trained tokens tinted and underlined, the rest dimmed, one block per message.

    `token_loss` and `token_loss_base` are (T,) in nats at the position of the predicted token, NaN where
    unknown: with the first the tint is the loss, with both it is what training changed. Runs that look
    alike are one element unless `per_token` is set or their loss is known; then only page `page` of
    `page_tokens` tokens is in the result. Otherwise all pages are, folded except this one, unless they come to
    more than 600 KB together. Without `show_mask` the text is plain; of `hidden_roles` only a line is left.
    `dropped_tokens` were cut off before the row got here. Raises DataError for a
    page that does not exist and for losses of the wrong length.
    """
    if token_loss is None and token_loss_base is not None:
        raise DataError("token_loss_base is given without token_loss: pass both to compare, or token_loss alone.")
    cells = row_cells(conversation, tokenizer, token_loss, token_loss_base, show_ends=not dropped_tokens)
    tokens, total = conversation.tokens, len(conversation.tokens)
    by_page = groupby(cells, key=lambda cell: min(cell.first, total - 1) // page_tokens)
    pages = [list(group) for _, group in by_page] or [[]]
    if not 0 <= page < len(pages):
        raise DataError(
            f"page {page} does not exist: the row has {grouped(total)} tokens, which is {len(pages)} "
            f"page{'s' if len(pages) > 1 else ''} of {grouped(page_tokens)}, counted from 0."
        )
    names = [f"tokens {grouped(part[0].first)}–{grouped(part[-1].stop - 1)}" for part in pages if part]
    look = _Look(per_token, show_mask, hidden_roles)
    one_page = len(pages) == 1 or per_token or token_loss is not None
    parts = {index: _blocks_html(pages[index], tokens, look) for index in ([page] if one_page else range(len(pages)))}
    if len(pages) == 1:
        body = parts[0]
    elif one_page or sum(len(part.encode()) for part in parts.values()) > _MOST_BYTES:
        head = f"{names[page]} of {grouped(total)}, page {page} of 0 to {len(pages) - 1}"
        body = f'<div style="{_QUIET};margin:0 0 8px 0">{head}</div>{parts[page]}'
    else:
        body = "".join(
            f'<details{" open" if index == page else ""}><summary style="{_QUIET};margin:0 0 8px 0">'
            f"{names[index]}</summary>{part}</details>"
            for index, part in parts.items()
        )
    heading = f"<b>{escape(one_line(title), quote=True)}</b>&emsp;" if title else ""
    return (
        f'<div class="mlx-nb-tokens" dir="ltr" style="max-width:60em;text-align:left">'
        f"<div>{heading}{summary(conversation, dropped_tokens)}</div>{_strip_html(conversation.loss_mask)}"
        f"{_legend_html(conversation, cells, token_loss, token_loss_base)}"
        f'<div style="margin:10px 0 0 0;{theme.WRAP}">{body}</div></div>'
    )
