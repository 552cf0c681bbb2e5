"""Displays the arrays of a batch: input tokens, targets, loss mask and padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from types import MappingProxyType

import numpy as np

from mlx_nb.data.examples.batches import TokenBatch
from mlx_nb.data.examples.packing import PackedLines, pack_lines
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.errors import DataError
from mlx_nb.view import theme
from mlx_nb.view.theme import BLUE, GREY, ORANGE, one_line, span, tint, visible_html

# How many positions to show at the start and end of a long run of similar ones.
_SHOWN = (8, 4)
_SHOWN_PADDING = (2, 1)
_OPEN_ROWS = 4
_NOTHING_YET = "no completions have been sampled yet. `%finetune step` samples those of the next update."
_LONGEST_CHARACTER = 8  # tokens that one character may be split into

_DIM = f"opacity:{theme.DIM}"
_QUIET = "font-size:.85em;opacity:.8"
_CARD = (
    "display:inline-block;vertical-align:top;max-width:16em;margin:0 3px 5px 0;padding:1px 5px;"
    f"border:1px solid {tint(GREY, 0.45)};border-radius:3px;{theme.WRAP}"
)
_TRAINED = f"background:{tint(BLUE, 0.28)};border-bottom:2px solid {tint(BLUE, 1)}"
_CROSSING = f"background:{tint(ORANGE, 0.45)};border-bottom:2px dashed {tint(ORANGE, 1)}"


def token_groups(tokens: Sequence[int], tokenizer: Tokenizer) -> list[tuple[int, str]]:
    """(number of tokens, text): one token each, or all tokens of one character."""

    def decoded(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    groups: list[tuple[int, str]] = []
    at = 0
    while at < len(tokens):
        text = decoded(tokens[at : at + 1])
        count = 1
        if "\ufffd" in text:
            count, text = next(
                (
                    (stop - at, joined)
                    for stop in range(at + 2, min(at + _LONGEST_CHARACTER, len(tokens)) + 1)
                    if "\ufffd" not in (joined := decoded(tokens[at:stop]))
                ),
                (1, text),
            )
        else:
            raw = str(tokenizer.convert_ids_to_tokens(int(tokens[at])))
            # Sentence-piece decoders drop the space before the first word.
            text = f" {text}" if raw.startswith("▁") and not text.startswith(" ") else text or raw
        groups.append((count, text))
        at += count
    return groups


def _token_texts(tokens: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text of each token; the tokens of a split character are numbered."""
    return [
        text if count == 1 else f"{text} {part}/{count}"
        for count, text in token_groups(tokens, tokenizer)
        for part in range(1, count + 1)
    ]


def _length(tokens_T: np.ndarray, loss_mask_T: np.ndarray) -> int:
    """Tokens before the padding: the untrained zeros at the end of the row."""
    used = np.flatnonzero((tokens_T != 0) | (loss_mask_T != 0))
    return int(used[-1]) + 1 if len(used) else 0


def _shown_positions(kinds: Sequence[tuple[bool, bool, int]]) -> list[int | range]:
    """Positions to draw, and ranges omitted from long runs of one kind; the first part of a kind is "is padding"."""
    shown: list[int | range] = []
    for kind, group in groupby(range(len(kinds)), key=lambda position: kinds[position]):
        run = list(group)
        first, last = _SHOWN_PADDING if kind[0] else _SHOWN
        if len(run) <= first + last + 1:
            shown += run
        else:
            shown += [*run[:first], range(run[first], run[-last]), *run[-last:]]
    return shown


def _token_html(text: str) -> str:
    return visible_html(text).replace("\n", "").replace("\t", "")


def _card_html(
    position: int,
    tokens: Sequence[int],
    texts: Sequence[str],
    weight: float,
    segments: Sequence[int],
    length: int,
    values: Mapping[str, Sequence[float]],
) -> str:
    """One position: its token, and its target with this weight."""
    title = f"position {position} · id {tokens[position]} · segment {segments[position]}"
    last = position + 1 == len(tokens)
    crossing = bool(weight) and (position + 1 >= length or segments[position] != segments[position + 1])
    if last:
        title += " · the last position predicts nothing"
    else:
        title += f" → predicts token {position + 1} · id {tokens[position + 1]} · weight {weight:g}"
        title += "".join(f" · {name} {given[position + 1]:.4g}" for name, given in values.items() if weight)
    if crossing:
        title += " · trained across a boundary"
    target = "–" if last else _token_html(texts[position + 1])
    style = _CROSSING if crossing else _TRAINED if weight else _DIM
    label = f" ×{weight:g}" if weight not in (0.0, 1.0) else ""
    new_segment = 0 < position < length and segments[position] != segments[position - 1]
    return span(
        f'<span style="font-size:.75em;opacity:.75">{position}</span> '
        + span(_token_html(texts[position]), style=_DIM if position >= length else "", isolate=texts[position])
        + f"<br>→ {span(target, style=style, isolate='' if last else texts[position + 1])}{label}",
        style=f"{_CARD};border-left:4px solid {tint(BLUE, 0.85)}" if new_segment else _CARD,
        title=title,
    )


def _row_html(
    tokens: list[int],
    loss_mask: list[float],
    segments: list[int],
    length: int,
    tokenizer: Tokenizer,
    values: Mapping[str, Sequence[float]],
) -> str:
    """The positions of one line of the batch. The weight of a target is at its own position, one to the right."""
    weights = [*loss_mask[1:], 0.0]
    kinds = [(position >= length, weights[position] != 0, segments[position]) for position in range(len(tokens))]
    texts = _token_texts(tokens[:length], tokenizer) + [f"padding {token}" for token in tokens[length:]]
    cards = "".join(
        f'<span style="{_CARD};{_QUIET}">⋯ {len(position):,} more like this</span>'
        if isinstance(position, range)
        else _card_html(position, tokens, texts, weights[position], segments, length, values)
        for position in _shown_positions(kinds)
    )
    return f'<div style="{theme.MONOSPACE};font-size:.9em;line-height:1.55;margin:4px 0 0 0">{cards}</div>'


class BatchDisplay:
    """The display of `%finetune batch`: the arrays of the next update, one table per micro-batch."""

    def __init__(self, batches: Sequence[TokenBatch], tokenizer: Tokenizer) -> None:
        self.batches = batches
        self._tokenizer = tokenizer

    def _repr_html_(self) -> str:
        if not self.batches:
            return f"<div>{_NOTHING_YET}</div>"
        return "".join(
            render_batch_html(
                batch.tokens_BT,
                batch.loss_mask_BT,
                self._tokenizer,
                line_names(batch),
                lengths=batch.lengths,
                token_values=batch.token_values,
                packed=_packed(batch),
            )
            for batch in self.batches
        )

    def __repr__(self) -> str:
        lines = [] if self.batches else [_NOTHING_YET]
        for number, batch in enumerate(self.batches, start=1):
            width, packed = batch.tokens_BT.shape[1], _packed(batch)
            head = f"batch of the next update, {_shape_words(batch.tokens_BT.shape, packed)}"
            lines.append(head if len(self.batches) == 1 else f"{head}, part {number} of {len(self.batches)}")
            for index, (name, length) in enumerate(zip(line_names(batch), batch.lengths)):
                trained = np.count_nonzero(batch.loss_mask_BT[index])
                end = f"{width - length} padding" if packed is None else _segment_words(packed, index)
                lines.append(f"  {name}: {length} tokens, {trained} trained, {end}")
        return "\n".join(lines)


def _packed(batch: TokenBatch) -> PackedLines | None:
    """The packed row of a packed batch, else None."""
    if not batch.packed:
        return None
    return pack_lines([tokens_T[:length] for tokens_T, length in zip(batch.tokens_BT, batch.lengths)])


def _shape_words(shape: tuple[int, ...], packed: PackedLines | None) -> str:
    if packed is None:
        return f"{shape[0]:,} × {shape[1]:,} positions"
    return f"{shape[0]:,} segments in one row of {len(packed.tokens_N):,} positions"


def _segment_words(packed: PackedLines, line: int) -> str:
    """The position of a line in the packed row; its beginning may be shared with an earlier line."""
    shared, positions = packed.shared[line], packed.positions[line]
    own = positions[shared:]
    there = f"at {own[0]:,} to {own[-1]:,}" if len(own) else "entirely shared"
    return f"segment {line} {there}" + (f", its first {shared:,} tokens shared with an earlier one" if shared else "")


def line_names(batch: TokenBatch) -> list[str]:
    """Names for the lines of `tokens_BT`: `row 3`, `row 3 chosen`, `row 3, label: good`, `row 3 completion 0, ...`."""
    values = batch.row_values
    names = [f"row {row}" for row in batch.rows]
    if len(batch.lengths) == 2 * len(names):
        ends = [_pair_values(values, index) for index in range(len(names))]
        return [f"{name} {answer}{end}" for answer in ("chosen", "rejected") for name, end in zip(names, ends)]
    if "label" in values:
        return [f"{name}, label: {'good' if label else 'bad'}" for name, label in zip(names, values["label"])]
    if "advantage" in values:
        numbers = [batch.rows[:index].count(row) for index, row in enumerate(batch.rows)]
        counts = values.get("counts", np.ones(len(names)))
        return [
            f"{name} completion {number}, advantage {advantage:+.3f}{'' if count else ', cut and not trained'}"
            for name, number, advantage, count in zip(names, numbers, values["advantage"], counts)
        ]
    return names


def _pair_values(values: Mapping[str, np.ndarray], index: int) -> str:
    """Weight and margin of a pair, if they are not the defaults."""
    usual = {"weight": 1.0, "margin": 0.0}
    given = {name: float(values[name][index]) for name in usual if name in values}
    return "".join(f", {name} {value:g}" for name, value in given.items() if value != usual[name])


def render_batch_html(
    tokens_BT: np.ndarray,
    loss_mask_BT: np.ndarray,
    tokenizer: Tokenizer,
    rows: Sequence[object],
    *,
    segments_BT: np.ndarray | None = None,
    lengths: Sequence[int] | None = None,
    token_values: Mapping[str, np.ndarray] = MappingProxyType({}),
    packed: PackedLines | None = None,
) -> str:
    """The exact arrays of a batch: each position, the token it predicts, whether that is trained, and the padding.

    `tokens_BT` and `loss_mask_BT` are (B, T); `rows` names each line of the batch; `segments_BT` numbers the
    packed rows. Without `lengths`, untrained zeros at the end of a line count as padding. Long runs of similar
    positions are shortened. A trained target across a segment boundary or in the padding is marked.
    `token_values` are constants (B, T) by name, shown with the trained targets. With `packed`, each line is a segment
    of one row, without padding. Raises DataError if the shapes do not agree.
    """
    tokens_BT, loss_mask_BT = np.asarray(tokens_BT), np.asarray(loss_mask_BT)
    segments = None if segments_BT is None else np.asarray(segments_BT)
    shapes = {tokens_BT.shape, loss_mask_BT.shape} | (set() if segments is None else {segments.shape})
    if len(shapes) > 1 or tokens_BT.ndim != 2 or len(rows) != len(tokens_BT):
        raise DataError(
            f"the batch cannot be shown: tokens {tokens_BT.shape}, loss mask {loss_mask_BT.shape}, "
            f"{len(rows)} row names. Tokens, mask and segments need the same shape (B, T), and each line a row name."
        )
    parts = []
    used = padding = 0
    for index, row in enumerate(rows):
        tokens_T, mask_T = tokens_BT[index], loss_mask_BT[index]
        length = _length(tokens_T, mask_T) if lengths is None else int(lengths[index])
        if packed is not None:
            tokens_T, mask_T = tokens_T[:length], mask_T[:length]
        used, padding = used + length, padding + len(tokens_T) - length
        name = f"row {row}" if isinstance(row, int | np.integer) else one_line(str(row))
        number = 0 if packed is None else index
        segments_T = [number] * len(tokens_T) if segments is None else segments[index].tolist()
        values = {what: value_BT[index].tolist() for what, value_BT in token_values.items()}
        body = _row_html(tokens_T.tolist(), mask_T.tolist(), segments_T, length, tokenizer, values)
        end = f"{len(tokens_T) - length:,} padding" if packed is None else _segment_words(packed, index)
        count = f"{length:,} tokens, {np.count_nonzero(mask_T):,} trained, {end}"
        parts.append(
            f'<details{" open" if index < _OPEN_ROWS else ""} style="margin:0 0 10px 0">'
            f'<summary><b>{escape(name, quote=True)}</b> <span style="{_QUIET}">{count}</span></summary>'
            f"{body}</details>"
        )
    share = f"{padding / max(used + padding, 1):.0%}"
    legend = (
        "each card: position, token, → the token predicted from there&emsp; "
        f"{span('counts', style=_TRAINED)}&emsp; {span('does not count', style=_DIM + ';white-space:nowrap')}"
    )
    if segments is not None:
        crossing = span("counts across a boundary", style=f"{_CROSSING};white-space:nowrap")
        legend += f"&emsp;a blue bar starts a segment&emsp; {crossing}"
    heading = f"<b>batch</b>&emsp;{_shape_words(tokens_BT.shape, packed)} · {share} padding"
    return (
        f'<div class="mlx-nb-batch" dir="ltr" style="max-width:60em;text-align:left"><div>{heading}</div>'
        f'<div style="font-size:.85em;line-height:1.7;margin:0 0 8px 0">{legend}</div>{"".join(parts)}</div>'
    )
