"""Renders the cells of a row as HTML: tokens, messages, pages and the legend.

Every character of a row is escaped, and hidden or reordering characters are shown by name.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from html import escape
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from mlx_nb.data.masks.conversation import TokenizedConversation, row_remarks
from mlx_nb.errors import DataError
from mlx_nb.view import theme
from mlx_nb.view.rows.cells import TEMPLATE, Cell, grouped, mean_losses, merged_runs, partial_weights, role_counts
from mlx_nb.view.theme import BLUE, GREY, ORANGE, ROLE_COLORS, one_line, span, tint, visible_html

# A notebook stores every output, so a larger row is shown one page at a time.
_MOST_BYTES = 600_000
_SMALL = "font-size:.85em"
QUIET = f"{_SMALL};opacity:.8"
_WRITTEN = f"border:2px dashed {tint(ORANGE, 1)};border-radius:3px;padding:0 2px"
_SPECIAL = f"border:1px solid {tint(GREY, 0.8)};border-radius:3px;padding:0 2px"
PAGE_TOKENS = 2000
_UNSEEN = f"opacity:{theme.DIM};text-decoration:line-through"
# A bar above, because trained tokens have one below.
_DIFFERS_BAR = f"border-top:2px solid {tint(ORANGE, 1)}"
_DIFFERS = f"{_DIFFERS_BAR};background:{tint(ORANGE, 0.24)}"


class RowStyle(NamedTuple):
    """The display options of a row."""

    per_token: bool
    show_mask: bool
    hidden_roles: Collection[str]
    edges: bool = True  # show the spaces at the ends of a run


def _trained_style(weight: float) -> str:
    line = "2px solid" if weight == 1 else "2px dashed"
    color = BLUE if weight > 0 else ORANGE
    strength = 0.08 + 0.20 * min(abs(weight), 1.0)
    return f"background:{tint(color, strength)};border-bottom:{line} {tint(color, 1)}"


def _style(cell: Cell, look: RowStyle) -> str:
    if cell.kind == "unseen":
        return _UNSEEN
    styles = [_WRITTEN] if cell.written else [_SPECIAL] if cell.kind == "special" else []
    if look.per_token and cell.kind == "text":
        styles.append(f"border-right:1px solid {tint(GREY, 0.45)}")
    if not cell.loss_known:
        if look.show_mask:
            styles.append(_trained_style(cell.weight) if cell.weight else f"opacity:{theme.DIM}")
        return ";".join([*styles, _DIFFERS] if cell.differs else styles)
    if math.isnan(cell.base_loss):
        styles.append(f"background:{theme.loss_tint(cell.loss)}")
    elif not math.isnan(cell.loss):
        styles.append(f"background:{theme.change_tint(cell.base_loss - cell.loss)}")
    if cell.weight:
        styles.append(f"border-bottom:2px solid {tint(GREY, 1)}")
    return ";".join([*styles, _DIFFERS_BAR] if cell.differs else styles)


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
    if cell.written:
        parts.append("a control token that the row's own text spells")
    if cell.differs:
        parts.append("differs from the other answer")
    return " · ".join(parts)


def _run_html(cell: Cell, tokens: np.ndarray, look: RowStyle) -> str:
    content = visible_html(cell.text, edges=look.edges and not look.per_token and not cell.loss_known)
    in_runs = look.show_mask and not look.per_token and not cell.loss_known
    if cell.kind == "text" and cell.weight not in (0.0, 1.0) and in_runs:
        content = f'<sup style="opacity:.8;font-size:.7em">×{cell.weight:g}</sup>{content}'
    return span(content, style=_style(cell, look), title=one_line(_title(cell, tokens)), isolate=cell.text)


def _block_html(cells: list[Cell], tokens: np.ndarray, look: RowStyle) -> str:
    """The cells of one message, behind a bar in the color of its role."""
    # A page may contain only the template text of a message.
    role = next((cell.role for cell in cells if cell.role != TEMPLATE), TEMPLATE if cells[0].message < 0 else "")
    hidden = role in look.hidden_roles
    runs = [] if hidden else merged_runs(cells, look.per_token)
    body = "".join(_run_html(run, tokens, look) for run in runs)
    counts = role_counts(cells)
    total, trained = counts.pop(role if role in counts else TEMPLATE, (0, 0))
    of_template, template_trained = counts.pop(TEMPLATE, (0, 0))
    label = f"<b>{escape(one_line(role), quote=True)}</b>" if role else ""
    count = f"{grouped(trained)} of {grouped(total)} trained" if trained else f"{grouped(total)} tokens"
    if of_template:
        count += f" · template {f'{grouped(template_trained)} of ' if template_trained else ''}{grouped(of_template)}"
    count += ", hidden" if hidden else ""
    return (
        f'<div style="border-left:3px solid {tint(ROLE_COLORS.get(role, GREY), 0.85)};'
        f'padding:0 0 0 10px;margin:0 0 12px 0">'
        f'<div style="{QUIET};line-height:1.4">{label} {count}</div>'
        f'<div style="{theme.MONOSPACE};font-size:.95em;line-height:1.65">{body}</div></div>'
    )


def blocks_html(cells: Iterable[Cell], tokens: np.ndarray, look: RowStyle) -> str:
    """The cells, with one block per message."""
    groups = groupby(cells, key=lambda cell: cell.message)
    return "".join(_block_html(list(group), tokens, look) for _, group in groups)


def strip_html(loss_mask: np.ndarray) -> str:
    """A thin bar for the whole row that shows where its trained tokens are."""
    if not len(loss_mask):
        return ""
    columns = np.array_split(loss_mask != 0, min(len(loss_mask), 120))
    shares = [(round(float(column.mean()), 1), len(column)) for column in columns]
    bars = []
    for share, group in groupby(shares, key=lambda item: item[0]):
        width = 100 * sum(length for _, length in group) / len(loss_mask)
        color = tint(BLUE, 0.25 + 0.75 * share) if share else tint(GREY, 0.25)
        bars.append(f'<span style="width:{width:.2f}%;background:{color}"></span>')
    title = "the whole row from first to last token; blue where it is trained"
    return f'<div title="{title}" style="display:flex;height:5px;margin:6px 0 8px 0">{"".join(bars)}</div>'


def _sample_html(text: str, style: str) -> str:
    return span(text, style=f"{style};white-space:nowrap")


def _scale_html(words: str, low: str, tints: Sequence[tuple[str, str]], high: str) -> str:
    swatches = "".join(
        f'<span style="background:{color};padding:0 6px">{escape(label, quote=True)}</span>' for label, color in tints
    )
    return f'{words} <span style="white-space:nowrap">{low} {swatches} {high}</span>'


def samples_html(loss_mask: np.ndarray, cells: list[Cell], *, losses: int = 0) -> str:
    """The legend for these cells. `losses`: how many losses each token has (0, 1: the model, 2: also the base)."""
    entries = []
    if not losses:
        entries.append(_sample_html("trained", _trained_style(1.0)))
        entries += [
            _sample_html(f"weight {weight:g}: {grouped(count)} tokens", _trained_style(weight))
            for weight, count in partial_weights(loss_mask).items()
        ]
        entries.append(_sample_html("not trained", f"opacity:{theme.DIM}"))
    else:
        entries.append(_sample_html("trained", f"border-bottom:2px solid {tint(GREY, 1)}"))
        if losses == 1:
            scale = [(f"{nats}" if nats < 6 else "6+", theme.loss_tint(nats)) for nats in range(7)]
            entries.append(_scale_html("loss in nats", "", scale, ""))
        else:
            scale = [(f"{-nats:+d}" if nats else "0", theme.change_tint(nats)) for nats in range(3, -4, -1)]
            entries.append(_scale_html("loss against the base model:", "better", scale, "worse"))
    if any(cell.differs for cell in cells):
        entries.append(_sample_html("differs from the other answer", _DIFFERS_BAR if losses else _DIFFERS))
    if any(cell.kind == "special" for cell in cells):
        entries.append(_sample_html("special token", _SPECIAL))
    if any(cell.written for cell in cells):
        entries.append(_sample_html("control token in the row's own text", _WRITTEN))
    if any(cell.kind == "unseen" for cell in cells):
        entries.append(_sample_html("never seen", _UNSEEN))
    entries.append("⏎&nbsp;newline&ensp;⇥&nbsp;tab&ensp;·&nbsp;space&ensp;‹U+…›&nbsp;hidden&nbsp;character")
    # The samples have the same strength as the tokens.
    return f'<div style="{_SMALL};line-height:1.7">{"&emsp; ".join(entries)}</div>'


def notes_html(conversation: TokenizedConversation, cells: list[Cell], token_loss: Any, token_loss_base: Any) -> str:
    """Trained tokens by role, the mean loss, and remarks about the row."""
    means = mean_losses(conversation, (token_loss, token_loss_base))
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
    lines += [f"⚠ {escape(one_line(problem), quote=True)}" for problem in row_remarks(conversation)]
    return "".join(f'<div style="{QUIET};line-height:1.7">{line}</div>' for line in lines)


def paged_html(
    cells: list[Cell], tokens: np.ndarray, look: RowStyle, page: int, page_tokens: int, *, alone: bool
) -> str:
    """The cells page by page, folded except `page`. Only that page with `alone`, or if all are too large.

    Raises DataError for a page that does not exist.
    """
    start = cells[0].first if cells else 0
    # A cell without tokens at the very end belongs to the previous page.
    last = max((cell.first for cell in cells if cell.stop > cell.first), default=start)
    by_page = groupby(cells, key=lambda cell: (min(cell.first, last) - start) // page_tokens)
    pages = [list(group) for _, group in by_page] or [[]]
    total = len(tokens) - start
    if not 0 <= page < len(pages):
        raise DataError(
            f"page {page} does not exist: the row has {grouped(total)} tokens, which is {len(pages)} "
            f"page{'s' if len(pages) > 1 else ''} of {grouped(page_tokens)}, counted from 0."
        )
    if len(pages) == 1:
        return blocks_html(cells, tokens, look)
    names = [f"tokens {grouped(part[0].first)}–{grouped(part[-1].stop - 1)}" for part in pages]
    parts = {index: blocks_html(pages[index], tokens, look) for index in ([page] if alone else range(len(pages)))}
    if alone or sum(len(part.encode()) for part in parts.values()) > _MOST_BYTES:
        head = f"{names[page]} of {grouped(start + total)}, page {page} of 0 to {len(pages) - 1}"
        return f'<div style="{QUIET};margin:0 0 8px 0">{head}</div>{parts[page]}'
    return "".join(
        f'<details{" open" if index == page else ""}><summary style="{QUIET};margin:0 0 8px 0">'
        f"{names[index]}</summary>{part}</details>"
        for index, part in parts.items()
    )
