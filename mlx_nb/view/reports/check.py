"""Displays a data check in terminals and notebooks: the findings, then the statistics of the rows.

The HTML has only inline styles, so it survives in an untrusted or exported notebook. Text from rows is escaped, and
hidden or reordering characters are shown by name.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from mlx_nb.data.check.check import DataCheck, SplitCheck
from mlx_nb.data.check.findings import ERROR, NOTE, SEVERITIES, WARNING, Finding
from mlx_nb.data.check.template_report import WRITTEN, TemplateCheck
from mlx_nb.data.check.token_pass import LengthSummary
from mlx_nb.data.examples.kinds import ROW_KINDS
from mlx_nb.view import theme
from mlx_nb.view.event_text import count
from mlx_nb.view.theme import BLUE, GREEN, GREY, ORANGE, one_line, tint

AMBER: theme.Color = (230, 159, 0)
_COLORS = {ERROR: ORANGE, WARNING: AMBER, NOTE: BLUE}
_SIGNS = {ERROR: "✕", WARNING: "!", NOTE: "i"}
_QUIET = "font-size:12px;opacity:.72"
_HEADING = "font-size:13px;font-weight:600;margin:22px 0 8px 0"
_LONGEST_EXAMPLE = 300
_BLOCKS = " ▁▂▃▄▅▆▇█"


class CheckDisplay:
    """The display of `%finetune check`: HTML in a notebook, text in a terminal."""

    def __init__(self, check: DataCheck) -> None:
        self.check = check

    def _repr_html_(self) -> str:
        return render_html(self.check)

    def __repr__(self) -> str:
        return render_text(self.check)


class ShownCheck(DataCheck):
    """A DataCheck that displays itself as its report."""

    @classmethod
    def of(cls, check: DataCheck) -> ShownCheck:
        """The same check, as a ShownCheck."""
        return cls(**{field.name: getattr(check, field.name) for field in dataclasses.fields(check)})

    def __str__(self) -> str:
        """The report as text."""
        return render_text(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": render_text(self), "text/html": render_html(self)}


# --- words that both forms use ----------------------------------------------------------------------------------------


def verdict(check: DataCheck) -> str:
    """The result in one line."""
    if not check.findings:
        return "nothing to report"
    counts = [(check.count(severity), severity) for severity in SEVERITIES]
    return ", ".join(f"{number} {severity}{'s' * (number != 1)}" for number, severity in counts if number)


def where(found: Finding) -> str:
    """`train: 3 of 24 rows (0, 7, 12)`; findings about the template have no rows."""
    if not found.count:
        return found.split or "chat template"
    rows = ", ".join(str(row) for row in found.rows[:8])
    more = ", …" if found.count > len(found.rows[:8]) else ""
    return f"{found.split}: {found.count:,} of {found.looked_at:,} {_rows_word(found.looked_at)} ({rows}{more})"


def examples(found: Finding) -> list[str]:
    """Example rows, each as one visible line."""
    return [
        f"row {row}: {one_line(textwrap.shorten(text, _LONGEST_EXAMPLE, placeholder=' …'))}"
        for row, text in found.examples
    ]


def checked_words(split: SplitCheck) -> str:
    """`24 rows, all tokenized`, or how many were tokenized."""
    if split.checked == split.rows:
        return f"{split.rows:,} {_rows_word(split.rows)}, all tokenized"
    return f"checked {split.checked:,} of {split.rows:,} rows for tokens; read all rows"


def length_rows(split: SplitCheck, check: DataCheck) -> list[tuple[str, str]]:
    """The statistics of a split, as (label, value)."""
    rows = [("shapes", ", ".join(f"{number:,} {shape}" for shape, number in split.shapes.items()) or "none")]
    rows.append(("written in", ", ".join(f"{number:,} {form}" for form, number in split.formats.items()) or "none"))
    lengths = split.lengths
    if lengths:
        measured = sum(lengths.histogram_counts)
        unit = ROW_KINDS[check.kind].unit
        over = f"{lengths.over_max_seq_length:,} ({_percent(lengths.over_max_seq_length, measured)})"
        rows += [
            (
                f"tokens per {unit}",
                f"{lengths.shortest:,} to {lengths.longest:,}, median {lengths.median:,.0f}, mean {lengths.mean:,.0f}, "
                f"95% up to {lengths.p95:,.0f}",
            ),
            (f"over max_seq_length={check.max_seq_length}", over),
            (f"99% of {unit}s stay whole at", f"max_seq_length: {lengths.keeps_99}"),
        ]
    if split.trained_tokens:
        rows.append(
            ("trained tokens", f"{split.trained_tokens:,} of {split.tokens:,} ({100 * split.trained_share:.1f}%)")
        )
    if split.longer_chosen is not None:
        rows.append(("chosen is the longer", f"{100 * split.longer_chosen:.1f}% of the pairs that differ in length"))
    if split.labels:
        rows.append(("labels", ", ".join(f"{number:,} {label}" for label, number in split.labels.items())))
    for label, listed in (("refused", split.refused), ("left out", split.left_out), ("cut", split.truncated)):
        if listed.count:
            rows.append((label, f"{listed.count:,} {_rows_word(listed.count)}"))
    if split.exact_duplicates or split.near_duplicates:
        rows.append(("duplicates", f"{split.exact_duplicates:,} exact, {split.near_duplicates:,} near"))
    return rows


def epoch_rows(check: DataCheck) -> list[tuple[str, str]]:
    """The statistics of an epoch and the run, as (label, value)."""
    epoch = check.epoch
    if epoch is None:
        return []
    about = "about " if epoch.estimated else ""
    trained = f"{count(epoch.trained_tokens)} of them trained" if ROW_KINDS[check.kind].answered else "of prompts"
    passes = f"{epoch.run_epochs:.3g} epoch{'s' * (epoch.run_epochs != 1)}"
    unit, amount = "rows", f"{epoch.rows:,} rows"
    if check.truncate == "split":
        unit, amount = "pieces", f"{epoch.examples:,} pieces of {amount}"
    return [
        ("one epoch", f"{about}{epoch.updates:,} updates of {epoch.batch_rows} {unit} ({about}{amount})"),
        ("its tokens", f"{about}{count(epoch.tokens)}, {trained}"),
        ("the run", f"{epoch.run_updates:,} updates, {passes}"),
    ]


def template_rows(template: TemplateCheck | None) -> list[tuple[str, str, bool | None]]:
    """The behavior of the chat template, as (label, value, good); good is None if neutral."""
    if template is None:
        return [("chat template", "none", None)]
    rows: list[tuple[str, str, bool | None]] = []
    if template.end_of_turn is None:
        rows.append(("end of turn", f"unknown: {template.problem}", False))
    else:
        token = one_line("".join(template.end_of_turn))
        stops = "generation stops there" if template.ends_generation else "generation does not stop there"
        words = f"{token} is trained; {stops}" if token else "none is trained"
        rows.append(("end of turn", words, bool(token) and template.ends_generation))
    writers = [
        ("the template", template.writes_bos),
        ("the tokenizer, for plain text", template.tokenizer_adds_bos),
    ]
    rows.append(("BOS written by", " and ".join(name for name, writes in writers if writes) or "neither", None))
    for label, fate in (
        ("system message", template.system),
        ("tools", template.tools),
        ("tool calls", template.tool_calls),
        ("tool results", template.tool_results),
    ):
        rows.append((label, fate, fate == WRITTEN))
    if template.reasoning:
        kept = "kept in all turns" if template.reasoning_kept else "only after the last user message"
        rows.append(("thinking", f"`{template.reasoning}` is written, {kept}", True))
    else:
        rows.append(("thinking", "no separate field", False))
    if template.thinking_switch:
        rows.append(("thinking switch", template.thinking_switch, True))
    return rows


def _rows_word(number: int) -> str:
    return "row" if number == 1 else "rows"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.1f}%"


# --- text -------------------------------------------------------------------------------------------------------------


def render_text(check: DataCheck, width: int = 100) -> str:
    """The check as plain text of `width` columns."""
    lines = [f"Data check: {verdict(check)}", f"{one_line(check.data)} for {one_line(check.model)}", ""]
    for found in check.findings:
        lines += _wrapped(f"{found.severity}: {one_line(found.what)}", width, "")
        lines += _wrapped(one_line(where(found)), width, "    ")
        lines += _wrapped(one_line(found.next), width, "    → ")
        lines += [line for text in examples(found) for line in _wrapped(text, width, "      ")]
        lines.append("")
    for split in check.splits:
        lines += [f"{split.split}: {checked_words(split)}", *_aligned(length_rows(split, check))]
        if split.lengths:
            lines += _text_histogram(split.lengths)
        lines.append("")
    if check.epoch:
        lines += ["Epoch", *_aligned(epoch_rows(check)), ""]
    lines += ["Chat template", *_aligned([(label, value) for label, value, _ in template_rows(check.template)])]
    lines += ["", *(f"note: {one_line(note)}" for note in check.notes)] if check.notes else []
    return "\n".join(lines)


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=" " * len(indent) or "  ")


def _aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(label) for label, _ in rows)
    return [f"  {label.ljust(width)}  {one_line(value)}" for label, value in rows]


def _text_histogram(lengths: LengthSummary) -> list[str]:
    tallest = max(lengths.histogram_counts)
    bars = "".join(_BLOCKS[-(-8 * number // tallest)] * 2 for number in lengths.histogram_counts)
    left, right = str(lengths.histogram_edges[0]), f"{lengths.histogram_edges[-1] - 1:,} tokens"
    return [f"  {bars}", f"  {left}{right.rjust(max(len(right) + 1, len(bars) - len(left)))}"]


# --- HTML -------------------------------------------------------------------------------------------------------------


def render_html(check: DataCheck) -> str:
    """The check as HTML that survives an untrusted or exported notebook."""
    parts = [
        '<div style="max-width:920px;line-height:1.45;font-size:14px">',
        _header(check),
        *(_finding_html(found) for found in check.findings),
        *(_split_html(split, check) for split in check.splits),
        '<div style="display:flex;flex-wrap:wrap;gap:0px 48px">',
        _panel("One epoch and the run", _table((label, escape(value)) for label, value in epoch_rows(check)))
        if check.epoch
        else "",
        _panel("Chat template, determined by rendering", _template_html(check.template)),
        "</div>",
        *(f'<div style="{_QUIET};margin:8px 0 0 0">{theme.visible_html(note)}</div>' for note in check.notes),
        "</div>",
    ]
    return "".join(parts)


def _header(check: DataCheck) -> str:
    chips = "".join(
        _chip(f"{check.count(severity)} {severity}{'s' * (check.count(severity) != 1)}", _COLORS[severity])
        for severity in SEVERITIES
        if check.count(severity)
    )
    chips = chips or _chip("✓ nothing to report", GREEN)
    subject = f"{escape(one_line(check.data))} for {escape(one_line(check.model))}"
    return (
        '<div style="display:flex;flex-wrap:wrap;align-items:center;gap:4px 8px;margin:0 0 12px 0">'
        f'<span style="font-size:17px;font-weight:600;margin:0 6px 0 0">Data check</span>{chips}'
        f'<span style="{_QUIET};{theme.WRAP}">{subject}</span></div>'
    )


def _chip(text: str, color: theme.Color) -> str:
    style = f"background:{tint(color, 0.18)};border:1px solid {tint(color, 0.7)};border-radius:10px;padding:1px 9px"
    return f'<span style="{style};font-size:12px;font-weight:600;white-space:nowrap">{escape(text)}</span>'


def _finding_html(found: Finding) -> str:
    color = _COLORS[found.severity]
    sign = (
        f'<span title="{found.severity}" style="background:{tint(color, 0.3)};border:1px solid {tint(color, 0.9)};'
        "border-radius:9px;width:16px;height:16px;line-height:16px;text-align:center;font-size:11px;font-weight:700;"
        f'display:inline-block;flex-shrink:0;margin:2px 0 0 0">{_SIGNS[found.severity]}</span>'
    )
    shown = "".join(
        f'<div style="margin:3px 0 0 0;{theme.MONOSPACE};font-size:12px;{theme.WRAP}">{escape(text)}</div>'
        for text in examples(found)
    )
    summary = f'<summary style="{_QUIET};cursor:pointer">examples</summary>'
    details = f'<details style="margin:3px 0 0 0">{summary}{shown}</details>' if shown else ""
    return (
        f'<div style="display:flex;gap:10px;background:{tint(color, 0.07)};border-left:3px solid {tint(color, 0.9)};'
        f'border-radius:3px;padding:8px 12px;margin:0 0 6px 0">{sign}<div style="min-width:0;{theme.WRAP}">'
        f'<div><span style="font-weight:600">{_sentence(found.what)}</span> '
        f'<span style="{_QUIET}">{escape(where(found))}</span></div>'
        f"<div>{theme.visible_html(found.next)}</div>{details}</div></div>"
    )


def _sentence(text: str) -> str:
    return theme.visible_html(text[:1].upper() + text[1:])


def _split_html(split: SplitCheck, check: DataCheck) -> str:
    title = f'{escape(split.split)} <span style="{_QUIET};font-weight:400">{escape(checked_words(split))}</span>'
    chart = _histogram_html(split.lengths, check.max_seq_length) if split.lengths else ""
    table = _table((label, escape(value)) for label, value in length_rows(split, check) if label != "trained tokens")
    return (
        f'<div style="{_HEADING}">{title}</div><div style="display:flex;flex-wrap:wrap;gap:14px 40px">'
        f'<div style="flex:1 1 340px;min-width:0">{table}{_trained_bar(split)}</div>'
        f'<div style="flex:1 1 340px;min-width:0">{chart}</div></div>'
    )


def _trained_bar(split: SplitCheck) -> str:
    """A bar with the share of trained tokens."""
    if not split.trained_tokens:
        return ""
    share = 100 * split.trained_share
    words = f"{split.trained_tokens:,} of {split.tokens:,} tokens are trained ({share:.1f}%)"
    return (
        f'<div title="{words}" style="background:{tint(GREY, 0.25)};height:8px;border-radius:4px;margin:6px 0 0 0">'
        f'<div style="width:{share:.2f}%;background:{tint(BLUE, 0.85)};height:8px;border-radius:4px"></div></div>'
        f'<div style="{_QUIET};margin:2px 0 0 0">{words}</div>'
    )


def _histogram_html(lengths: LengthSummary, max_seq_length: int) -> str:
    """A histogram of row lengths; the longest rows are in a separate last bar."""
    edges, tallest = lengths.histogram_edges, max(lengths.histogram_counts)
    bars = [
        _bar(start, end, rows, 96 * rows / tallest, end - 1 > max_seq_length)
        for start, end, rows in zip(edges, edges[1:], lengths.histogram_counts)
    ]
    regular = len(bars) - lengths.last_bar_is_wider
    apart = ""
    if lengths.last_bar_is_wider:
        label = f"{edges[-2]:,} to {edges[-1] - 1:,}"
        apart = f'<div style="flex:0 0 96px">{_bars(bars[-1:])}{_scale("", label)}</div>'
    return (
        f'<div style="{_QUIET};margin:0 0 4px 0">rows by length in tokens; the tallest bar has {tallest:,} rows</div>'
        f'<div style="display:flex;gap:14px"><div style="flex:1 1 0%;min-width:0">{_bars(bars[:regular])}'
        f"{_scale('0', f'{edges[regular // 2]:,}' if regular > 2 else '', f'{edges[regular]:,}')}</div>{apart}</div>"
        f"{_over_legend(lengths, max_seq_length)}"
    )


def _bar(start: int, end: int, rows: int, height: float, over: bool) -> str:
    color = tint(ORANGE, 0.85) if over else tint(BLUE, 0.75)
    shown = f'<div style="width:100%;height:{max(2.0, height):.1f}px;background:{color}"></div>' if rows else ""
    title = f"{start:,} to {end - 1:,} tokens: {rows:,} {_rows_word(rows)}"
    return f'<div title="{title}" style="flex:1 1 0%;height:96px;display:flex;align-items:flex-end">{shown}</div>'


def _bars(bars: Sequence[str]) -> str:
    return f'<div style="display:flex;gap:1px;border-bottom:1px solid {tint(GREY, 0.7)}">{"".join(bars)}</div>'


def _scale(*labels: str) -> str:
    marks = "".join(f'<span style="white-space:nowrap">{label}</span>' for label in labels)
    return f'<div style="display:flex;justify-content:space-between;{_QUIET}">{marks}</div>'


def _over_legend(lengths: LengthSummary, max_seq_length: int) -> str:
    if not lengths.over_max_seq_length:
        return ""
    swatch = f'<span style="background:{tint(ORANGE, 0.85)};display:inline-block;width:10px;height:10px"></span>'
    return f'<div style="{_QUIET};margin:2px 0 0 0">{swatch} bars that exceed max_seq_length={max_seq_length}</div>'


def _panel(title: str, content: str) -> str:
    return f'<div style="flex:1 1 340px;min-width:0"><div style="{_HEADING}">{escape(title)}</div>{content}</div>'


def _template_html(template: TemplateCheck | None) -> str:
    marks = {True: "✓ ", False: "– ", None: ""}
    return _table(
        (label, f"{marks[good]}{theme.visible_html(value)}") for label, value, good in template_rows(template)
    )


def _table(rows: Iterable[tuple[str, str]]) -> str:
    """A table with two columns; the values are already HTML."""
    lines = "".join(
        f'<div style="display:flex;gap:12px;padding:2px 0;border-bottom:1px solid {tint(GREY, 0.18)}">'
        f'<div style="{_QUIET};flex:0 0 38%">{escape(label)}</div>'
        f'<div style="flex:1 1 0%;min-width:0;font-size:13px;{theme.WRAP}">{value}</div></div>'
        for label, value in rows
    )
    return f"<div>{lines}</div>"
