"""Displays a rollout as one table per prompt: the completions, their rewards and advantages."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.errors import counted
from mlx_nb.events import RolloutCompleted
from mlx_nb.events.history import History
from mlx_nb.view import theme
from mlx_nb.view.event_text import rollout_words
from mlx_nb.view.metric_text import number
from mlx_nb.view.rows.batch import token_groups
from mlx_nb.view.theme import BLUE, GREY, ORANGE, one_line, span, tint, visible_html

_MOST_GROUPS, _OPEN_GROUPS = 16, 3
_FOLDED_AT = 320  # characters of a text before the fold
_FOLDED_LINES = 6
_LONGEST_TEXT = 20_000
_COLORED_TOKENS = 2400  # in all completions together; more would make a notebook slow
_SMALLEST_SCALE = 0.01
_BAR = 18  # pixels for the largest advantage

_QUIET = "font-size:.85em;opacity:.8"
_CELL = "border:none;padding:4px 8px 4px 0;vertical-align:top;line-height:1.45;font-size:13px"
_NUMBER = f"{_CELL};text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums"
_TEXT = f"{_CELL};text-align:left;{theme.WRAP}"
_BADGE = f"border:1px solid {tint(ORANGE, 0.9)};border-radius:3px;padding:0 3px;font-size:.9em"

# Zero width with a minimum of 100%, so that the table scrolls and does not widen the panel.
_SCROLLS = "overflow-x:auto;width:0;min-width:100%"

# (row, tokens (T,), log(current policy / sampling policy) (T,)) for each completion
Ratios = Sequence[tuple[int, np.ndarray, np.ndarray]]


class CompletionsDisplay:
    """The display of `%finetune rollouts`. `ratios` color the tokens by the change in their probability."""

    def __init__(self, rollout: RolloutCompleted, tokenizer: Tokenizer | None = None, ratios: Ratios = ()) -> None:
        self.rollout = rollout
        self._tokenizer = tokenizer
        self._ratios = ratios

    def _repr_html_(self) -> str:
        return completions_html(self.rollout, self._tokenizer, self._ratios)

    def __repr__(self) -> str:
        return completions_text(self.rollout)


class _Colors(NamedTuple):
    """The log-ratios of completions in the order of the rollout, and the value with the strongest color."""

    tokenizer: Tokenizer
    ratios: Ratios
    strongest: float
    tokens: int


def fits(rollout: RolloutCompleted, ratios: Ratios) -> bool:
    """Whether the log-ratios belong to the completions of this rollout."""
    sampled = [(group["row"], completion["tokens"]) for group in rollout.groups for completion in group["completions"]]
    return sampled == [(row, len(tokens)) for row, tokens, _ in ratios]


def completions_html(rollout: RolloutCompleted, tokenizer: Tokenizer | None = None, ratios: Ratios = ()) -> str:
    """The rollout as HTML for a saved notebook. Long texts are folded, and so are all but the first few prompts.

    `ratios` color the tokens, which `tokenizer` decodes. Ratios of another rollout are ignored.
    """
    colors = _colors(tokenizer, ratios) if tokenizer is not None and ratios and fits(rollout, ratios) else None
    parts, start = [], 0
    largest = _largest_advantage(rollout)
    for index, group in enumerate(rollout.groups[:_MOST_GROUPS]):
        parts.append(_group_html(group, start, largest, colors, is_open=index < _OPEN_GROUPS))
        start += len(group["completions"])
    left_out = len(rollout.groups) - _MOST_GROUPS
    if left_out > 0:
        parts.append(f'<div style="{_QUIET}">… and {counted(left_out, "more prompt")}</div>')
    parts += [f'<div style="{theme.WRAP}">⚠ {visible_html(problem, edges=False)}</div>' for problem in rollout.problems]
    legend = _scale_html(colors.strongest) if colors else ""
    return (
        f'<div class="mlx-nb-completions" dir="ltr" style="max-width:90em;text-align:left">'
        f"<div><b>after update {rollout.step}</b>&ensp;{escape(rollout_words(rollout))}</div>"
        f"{legend}{''.join(parts)}</div>"
    )


def last_rollout_html(history: History) -> str:
    """The newest completions of a run, folded into one line; empty if there are none."""
    return "".join(
        f"<details><summary>completions of the last rollout</summary>{completions_html(rollout)}</details>"
        for rollout in history.last_rollouts(1)
    )


def _largest_advantage(rollout: RolloutCompleted) -> float:
    return max(
        (abs(completion["advantage"]) for group in rollout.groups for completion in group["completions"]), default=0.0
    )


def _group_words(group: Mapping[str, Any]) -> str:
    """Mean and spread of the rewards of one prompt, and a note if all advantages are 0."""
    completions = group["completions"]
    rewards = [completion["reward"] for completion in completions if completion["reward"] is not None]
    if not rewards:
        return "no reward"
    spread = f" ± {number(statistics.stdev(rewards))}" if len(rewards) > 1 else ""
    words = f"reward {number(statistics.fmean(rewards))}{spread}"
    teaches = any(completion["advantage"] for completion in completions)
    return words if teaches else f"{words}, all advantages are 0: this prompt teaches nothing now"


def _group_html(group: Mapping[str, Any], start: int, largest: float, colors: _Colors | None, *, is_open: bool) -> str:
    names = list(dict.fromkeys(name for completion in group["completions"] for name in completion["rewards"]))
    heads = [_head_html(name, _NUMBER) for name in ("advantage", "reward", *names, "tokens")]
    lines = [
        _line_html(k, completion, names, largest, _completion_html(completion, start + k, colors))
        for k, completion in enumerate(group["completions"])
    ]
    prompt = (
        f'<div style="border-left:3px solid {tint(ORANGE, 0.85)};padding:0 0 0 8px;margin:4px 0;{theme.WRAP}">'
        f"{_folded_html(group['prompt'])}</div>"
    )
    return (
        f'<details{" open" if is_open else ""} style="margin:8px 0 12px 0"><summary><b>row {group["row"]}</b> '
        f'<span style="{_QUIET}">{escape(_group_words(group))}</span></summary>{prompt}'
        f'<div style="{_SCROLLS}"><table style="border:none;border-collapse:collapse;table-layout:auto;width:100%;'
        f'margin:0"><tr style="background:none">{_head_html("", _NUMBER)}{_head_html("completion", _TEXT)}'
        f"{''.join(heads)}</tr>{''.join(lines)}</table></div></details>"
    )


def _head_html(name: str, style: str) -> str:
    # A long name breaks only after underscores, whatever the styles of the page.
    words = escape(one_line(name), quote=True).replace("_", "_<wbr>")
    rule = f"border-bottom:1px solid {tint(GREY, 0.6)}"
    return (
        f'<th scope="col" style="{style};white-space:normal;overflow-wrap:normal;font-weight:600;{rule}">{words}</th>'
    )


def _line_html(k: int, completion: Mapping[str, Any], names: Sequence[str], largest: float, text: str) -> str:
    cells = [_advantage_html(completion["advantage"], largest), _number_html(completion["reward"], bold=True)]
    cells += [_number_html(completion["rewards"].get(name)) for name in names]
    cut = "" if completion["finished"] else f' <span style="{_BADGE}" title="cut at max_completion_length">cut</span>'
    rule = f"border-bottom:1px solid {tint(GREY, 0.25)}"
    return (
        f'<tr style="background:none;{rule}"><td style="{_NUMBER};opacity:.75">{k}</td>'
        f'<td style="{_TEXT};width:99%"><div style="min-width:10em">{text}</div></td>{"".join(cells)}'
        f'<td style="{_NUMBER}">{completion["tokens"]:,}{cut}</td></tr>'
    )


def _number_html(value: float | None, *, bold: bool = False) -> str:
    if value is None:
        return f'<td style="{_NUMBER};white-space:normal;opacity:.75;font-style:italic">no number</td>'
    return f'<td style="{_NUMBER}{";font-weight:600" if bold else ""}">{number(value)}</td>'


def _advantage_html(value: float, largest: float) -> str:
    """The number with its sign, and a bar to the right if positive, to the left if negative."""
    length = _BAR * abs(value) / largest if largest else 0.0
    color = tint(BLUE if value > 0 else ORANGE, 0.9)
    bar = f'<span style="display:inline-block;width:{length:.1f}px;height:9px;background:{color}"></span>'
    half = f"display:inline-block;width:{_BAR}px;height:9px;line-height:9px"
    middle = f"border-left:1px solid {tint(GREY, 0.9)}"
    return (
        f'<td style="{_NUMBER}">{_signed(value)} <span style="white-space:nowrap" aria-hidden="true">'
        f'<span style="{half};text-align:right">{bar if value < 0 else ""}</span>'
        f'<span style="{half};{middle};text-align:left">{bar if value > 0 else ""}</span></span></td>'
    )


def _signed(value: float) -> str:
    return f"{value:+.2f}" if value else "0"


def _folded_html(text: str) -> str:
    """The text, with its end folded if it is long."""
    if not text:
        return f'<span style="{_QUIET}">nothing</span>'
    lines = text.split("\n")
    at = min(len("\n".join(lines[:_FOLDED_LINES])), _FOLDED_AT)
    if len(text) <= at + 40:
        return visible_html(text, edges=False)
    rest = text[at:_LONGEST_TEXT]
    left_out = f" … {counted(len(text) - _LONGEST_TEXT, 'more character')}" if len(text) > _LONGEST_TEXT else ""
    return (
        f"<details><summary>{visible_html(text[:at], edges=False)} "
        f'<span style="{_QUIET}">… {len(text) - at:,} more</span></summary>'
        f"{visible_html(rest, edges=False)}{left_out}</details>"
    )


def _completion_html(completion: Mapping[str, Any], index: int, colors: _Colors | None) -> str:
    """A completion: its text, or its tokens colored by their log-ratio."""
    if colors is None:
        return _folded_html(completion["text"])
    _, tokens, ratio_T = colors.ratios[index]
    shown = tokens[: colors.tokens].tolist()
    spans, first = [], 0
    for count, text in token_groups(shown, colors.tokenizer):
        ids, ratio = shown[first : first + count], float(ratio_T[first : first + count].sum())
        title = f"token {first} · id {', '.join(map(str, ids))} · log-ratio {ratio:+.3f}"
        title += f" · probability × {math.exp(min(ratio, 50)):.3g}"
        style = _ratio_style(ratio, colors.strongest)
        spans.append(span(visible_html(text, edges=False), style=style, title=title, isolate=text))
        first += count
    more = len(tokens) - len(shown)
    ending = f' <span style="{_QUIET}">… {counted(more, "more token")}</span>' if more else ""
    return f'<div style="{theme.MONOSPACE};font-size:.95em;line-height:1.6;{theme.WRAP}">{"".join(spans)}{ending}</div>'


def _colors(tokenizer: Tokenizer, ratios: Ratios) -> _Colors:
    sizes = np.abs(np.concatenate([ratio_T for _, _, ratio_T in ratios]))
    usual = float(np.quantile(sizes, 0.95)) if len(sizes) else 0.0
    return _Colors(tokenizer, ratios, _round(max(usual, _SMALLEST_SCALE)), max(40, _COLORED_TOKENS // len(ratios)))


def _round(size: float) -> float:
    """The next of 1, 2, 5, 10, ..."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= size * (1 - 1e-9))


def _ratio_style(ratio: float, strongest: float) -> str:
    """Blue with a solid line if it became more likely, orange with a dashed line if less likely."""
    share = min(abs(ratio) / strongest, 1.0)
    if share < 0.1:
        return ""
    color = BLUE if ratio > 0 else ORANGE
    line = "solid" if ratio > 0 else "dashed"
    return f"background:{tint(color, theme.STRONGEST_TINT * share)};border-bottom:2px {line} {tint(color, 1)}"


def _scale_html(strongest: float) -> str:
    steps = "".join(
        span(f"{factor * strongest:+.2g}", style=f"{_ratio_style(factor * strongest, strongest)};padding:0 6px")
        for factor in (-1.0, -0.5, 0.5, 1.0)
    )
    return (
        f'<div style="font-size:.85em;line-height:1.8">log(current policy / sampling policy), nats:&ensp;'
        f'<span style="white-space:nowrap">less likely {steps} more likely</span></div>'
    )


def completions_text(rollout: RolloutCompleted, width: int = 100) -> str:
    """The rollout for a terminal of `width` columns: the numbers and the text of each completion."""
    lines = [f"after update {rollout.step}: {rollout_words(rollout)}"]
    for group in rollout.groups[:_MOST_GROUPS]:
        names = list(dict.fromkeys(name for completion in group["completions"] for name in completion["rewards"]))
        lines += ["", f"row {group['row']}  {_group_words(group)}", _shortened(f"prompt: {group['prompt']}", width)]
        table = [["", "advantage", "reward", *map(one_line, names), "tokens"]]
        table += [_numbers(k, completion, names) for k, completion in enumerate(group["completions"])]
        widths = [max(map(len, column)) for column in zip(*table)]
        aligned = ["  ".join(cell.rjust(size) for cell, size in zip(cells, widths)) for cells in table]
        texts = [_shortened(completion["text"] or "nothing", width - 4) for completion in group["completions"]]
        lines += [aligned[0], *(line for pair in zip(aligned[1:], texts) for line in (pair[0], f"    {pair[1]}"))]
    left_out = len(rollout.groups) - _MOST_GROUPS
    lines += ["", f"… and {counted(left_out, 'more prompt')}"] if left_out > 0 else []
    lines += ["", *(f"⚠ {one_line(problem)}" for problem in rollout.problems)] if rollout.problems else []
    return "\n".join(line.rstrip() for line in lines)


def _numbers(k: int, completion: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    values = [completion["reward"], *(completion["rewards"].get(name) for name in names)]
    shown = ["no number" if value is None else number(value) for value in values]
    return [
        str(k),
        _signed(completion["advantage"]),
        *shown,
        f"{completion['tokens']:,}{'' if completion['finished'] else ' cut'}",
    ]


def _shortened(text: str, width: int) -> str:
    line = one_line(text)
    more = f" … {len(line) - width + 14:,} more"
    return line if len(line) <= width else line[: width - len(more)] + more
