"""Renders the tokens of a row for a terminal."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable
from itertools import groupby

import numpy as np

from mlx_nb.data.masks.conversation import TokenizedConversation, row_remarks
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.view.rows.cells import (
    TEMPLATE,
    Cell,
    checked_loss,
    grouped,
    mean_losses,
    merged_runs,
    partial_weights,
    role_counts,
    row_cells,
    summary,
)
from mlx_nb.view.theme import one_line, visible_parts

_BOLD, _DIM, _UNDERLINED, _REVERSED = "1", "2", "4", "7"
# Color 32 of the 256 is a blue that reads on black and on white; the loss scale sets its own black text.
_TRAINED = "4;38;5;32"
_DIFFERS = "1;4;38;5;166"
_LOSS_COLORS = (
    (1.0, ""),
    (2.0, "38;5;16;48;5;223"),
    (4.0, "38;5;16;48;5;216"),
    (math.inf, "38;5;16;48;5;208"),
)
_HIGHEST_LOSSES = 8
_TAB = "   "

Piece = tuple[str, str]


def _columns(character: str) -> int:
    """Terminal columns that a character takes."""
    if unicodedata.combining(character) or character in "\u200d\ufe0f":
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _wrapped(pieces: Iterable[Piece], width: int) -> list[list[Piece]]:
    """Lines of at most `width` columns, broken at line breaks, between words, and inside longer words."""
    lines: list[list[Piece]] = [[]]
    column = 0
    for text, style in pieces:
        for word in re.findall(r"\n|\s?\S+|[^\S\n]+", text):
            if word == "\n":
                lines.append([])
                column = 0
                continue
            needed = sum(map(_columns, word))
            if column and column + needed > width and needed <= width:
                lines.append([])
                column = 0
                word = word.lstrip(" ")
                needed = sum(map(_columns, word))
            for character in word if column + needed > width else [word]:
                taken = sum(map(_columns, character))
                if column + taken > width:
                    lines.append([])
                    column = 0
                lines[-1].append((character, style))
                column += taken
    return lines


def _painted(pieces: Iterable[Piece]) -> str:
    line = ""
    for style, group in groupby(pieces, key=lambda piece: piece[1]):
        text = "".join(piece for piece, _ in group)
        line += f"\x1b[{style}m{text}\x1b[0m" if style else text
    return line


def _style(run: Cell) -> str:
    styles = [_BOLD] if run.kind == "special" else []
    if not math.isnan(run.loss):
        styles.append(next(style for limit, style in _LOSS_COLORS if run.loss < limit or limit == math.inf))
        if run.weight:
            styles.append(_UNDERLINED)
    else:
        styles.append(_DIFFERS if run.differs else _TRAINED if run.weight else _DIM)
    return ";".join(style for style in styles if style)


def _colored(runs: Iterable[Cell]) -> list[Piece]:
    pieces: list[Piece] = []
    for run in runs:
        style = _style(run)
        if run.kind == "text" and run.weight not in (0.0, 1.0):
            pieces.append((f"×{run.weight:g}", _DIM))
        for text, kind in visible_parts(run.text, edges=not run.loss_known):
            shown = text.replace("\t", _TAB)
            pieces.append((shown, f"{style};{_REVERSED}" if kind == "escape" else style))
    return pieces


def _marked(runs: Iterable[Cell]) -> list[Piece]:
    """Plain pieces with trained text in `⟦⟧` and differences in `▸◂`."""
    pieces: list[Piece] = []
    runs = list(runs)
    in_pair = any(run.differs for run in runs)
    marks = "⟦⟧▸◂" if in_pair else "⟦⟧"
    named = str.maketrans({mark: f"‹U+{ord(mark):04X}›" for mark in marks} | {"\t": _TAB})
    for weight, group in groupby(runs, key=lambda run: run.weight):
        text = ""
        for differs, part in groupby(group, key=lambda run: run.differs):
            word = "".join(
                piece.translate(named) for run in part for piece, _ in visible_parts(run.text, edges=not in_pair)
            )
            text += f"▸{word}◂" if differs else word
        if weight == 0:
            pieces.append((text, ""))
            continue
        label = "" if weight == 1 else f"×{weight:g} "
        # The closing mark belongs before the line break that ends the trained text.
        end = "\n" if text.endswith("\n") else ""
        pieces.append((f"⟦{label}{text.removesuffix(end)}⟧{end}", ""))
    return pieces


def highest_losses(conversation: TokenizedConversation, token_loss: np.ndarray, cells: list[Cell]) -> list[str]:
    """Lines with the trained tokens that have the highest loss."""
    losses = np.where(conversation.loss_mask != 0, token_loss, np.nan)
    known = np.flatnonzero(~np.isnan(losses))
    worst = known[np.argsort(-losses[known], kind="stable")][:_HIGHEST_LOSSES]
    texts = {token: cell.text for cell in cells for token in range(cell.first, cell.stop)}
    lines = ["highest losses     loss  probability  token"]
    lines += [
        f"  token {at:>7} {losses[at]:>8.3f} {math.exp(-losses[at]):>12.3g}  " + one_line(texts[at], edges=True)
        for at in worst.tolist()
    ]
    return lines if len(lines) > 1 else []


def render_text(
    conversation: TokenizedConversation,
    tokenizer: Tokenizer,
    *,
    title: str = "",
    color: bool = True,
    width: int = 100,
    token_loss: np.ndarray | None = None,
    dropped_tokens: int = 0,
) -> str:
    """The row for a terminal of `width` columns: trained tokens underlined and blue, the rest dim.

    Without `color` there are no escape sequences, and trained text is enclosed in `⟦⟧`.
    `token_loss` is (T,) in nats, NaN where unknown: it colors the tokens and lists the highest losses.
    `dropped_tokens` is the number of tokens that were cut off. Control characters of the row are shown by name, never
    sent to the terminal. Raises DataError for losses of the wrong length.
    """
    losses = checked_loss("token_loss", token_loss, len(conversation.tokens))
    cells = row_cells(conversation, tokenizer, losses if color else None, show_ends=not dropped_tokens)

    heading = f"{_paint(one_line(title), _BOLD, color)}  " if title else ""
    lines = [heading + summary(conversation, dropped_tokens), legend_line(color=color)]
    lines += [
        f"weight {weight:g}: {grouped(n)} tokens" for weight, n in partial_weights(conversation.loss_mask).items()
    ]
    lines += note_lines(conversation, cells, token_loss, color=color)
    lines += block_lines(cells, width, color=color)
    if token_loss is not None:
        lines += ["", *highest_losses(conversation, losses, cells)]
    return "\n".join(lines)


def _paint(text: str, style: str, color: bool) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if color else text


def legend_line(*, color: bool, differs: bool = False) -> str:
    """The legend; `differs` adds the mark for differences in a pair."""
    if color:
        entries = [_paint("trained", _TRAINED, color), _paint("not trained", _DIM, color)]
    else:
        entries = ["⟦trained⟧", "not trained"]
    if differs:
        entries.append(_paint("differs", _DIFFERS, color) if color else "▸differs◂")
    return " ".join(entries) + "  ⏎ newline  ⇥ tab  · space  ‹U+…› hidden character"


def note_lines(
    conversation: TokenizedConversation, cells: list[Cell], token_loss: np.ndarray | None, *, color: bool
) -> list[str]:
    """Trained tokens by role, the mean loss, and remarks about the row."""
    counts = role_counts(cells).items()
    roles = " · ".join(f"{one_line(role)} {grouped(n)} of {grouped(total)}" for role, (total, n) in counts)
    lines = [f"trained: {roles}"]
    if color and token_loss is not None:
        labels = zip(("0–1", "1–2", "2–4", "4+"), _LOSS_COLORS)
        scale = " ".join(_paint(f" {label} ", style or "0", color) for label, (_, style) in labels)
        lines.append(f"loss in nats {scale}")
    means = mean_losses(conversation, (token_loss,))
    lines += [f"mean loss of the trained tokens {mean:.3f} nats" for mean in means]
    return lines + [f"⚠ {one_line(problem)}" for problem in row_remarks(conversation)]


def block_lines(cells: Iterable[Cell], width: int, *, color: bool) -> list[str]:
    """The messages, each under the name of its role and behind a bar."""
    lines: list[str] = []
    for _, group in groupby(cells, key=lambda cell: cell.message):
        block = list(group)
        role = next((cell.role for cell in block if cell.role != TEMPLATE), "")
        lines += ["", _paint(one_line(role), _BOLD, color)] if role else [""]
        runs = merged_runs(block, per_token=False)
        wrapped = _wrapped(_colored(runs) if color else _marked(runs), max(width - 2, 10))
        if not wrapped[-1]:
            wrapped.pop()
        lines += [f"│ {_painted(line)}".rstrip() for line in wrapped]
    return lines
