"""Displays of any kind of row, in a notebook and in a terminal: its tokens with their loss mask.

A pair shows both answers, a labeled answer its label, and a prompt the columns that its rewards receive.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from html import escape
from typing import Any, Protocol

import numpy as np

from mlx_nb.data.examples.examples import RowView
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.errors import shown
from mlx_nb.view.rows import overlay
from mlx_nb.view.rows.pair import Answer, pages_of_pair, pair_cells, render_pair_html, render_pair_text
from mlx_nb.view.theme import BLUE, ORANGE, WRAP, one_line, tint, visible_html

_LONGEST_COLUMN = 2000


@dataclass(frozen=True, eq=False)
class ShownRow(RowView):
    """A row of a run that displays itself in a cell."""

    tokenizer: Tokenizer = field(kw_only=True, repr=False)
    split: str = "train"

    @classmethod
    def of(cls, view: RowView, tokenizer: Tokenizer, split: str) -> ShownRow:
        """The row with its tokenizer and split."""
        values = {declared.name: getattr(view, declared.name) for declared in fields(RowView)}
        return cls(**values, tokenizer=tokenizer, split=split)

    def _repr_html_(self) -> str:
        return RowDisplay(self, self.tokenizer, self.split)._repr_html_()

    def __repr__(self) -> str:
        return repr(RowDisplay(self, self.tokenizer, self.split))


class TokenLoss(Protocol):
    """A function that returns token losses of the base or the current model, for either answer of a pair."""

    def __call__(self, row: RowView, *, base: bool, rejected: bool) -> np.ndarray:
        """(T,) the loss in nats of each token of an answer; NaN for the first."""


def measured_losses(view: RowView, token_loss: TokenLoss, *, compare: bool = False) -> dict[str, Any]:
    """The token losses for `RowDisplay`: of both answers of a pair, and with `compare` also of the base."""
    names = [("token_loss", "token_loss_base")]
    if view.rejected is not None:
        names.append(("rejected_loss", "rejected_loss_base"))
    return {
        name: token_loss(view, base=of_base, rejected=of_rejected)
        for of_rejected, (now, base) in zip((False, True), names)
        for of_base, name in ((False, now), (True, base))
        if compare or not of_base
    }


class RowDisplay:
    """The display of `%finetune row 12`. `token_loss` (T,) colors the tokens; with that of the base, by the change.

    For a pair these are the losses of the chosen answer, and `rejected_loss` is that of the rejected one.
    """

    def __init__(
        self,
        view: RowView,
        tokenizer: Tokenizer,
        split: str,
        *,
        per_token: bool = False,
        page: int = 0,
        show_mask: bool = True,
        hidden_roles: Collection[str] = (),
        token_loss: np.ndarray | None = None,
        token_loss_base: np.ndarray | None = None,
        rejected_loss: np.ndarray | None = None,
        rejected_loss_base: np.ndarray | None = None,
    ) -> None:
        self.view = view
        self._tokenizer = tokenizer
        self._title = " · ".join([f"{split} row {view.row} ({view.location})", *filter(None, [view.format])])
        self._per_token = per_token
        self._page = page
        self._show_mask = show_mask
        self._hidden_roles = hidden_roles
        self._token_loss = token_loss
        self._token_loss_base = token_loss_base
        self._rejected_loss = rejected_loss
        self._rejected_loss_base = rejected_loss_base

    @property
    def pages(self) -> int:
        """How many pages a long row has."""
        conversation = self.view.conversation
        if conversation is None:
            return 1
        if pair := self._pair():
            return pages_of_pair(pair_cells(*pair, self._tokenizer))
        return max(1, -(-len(conversation.tokens) // overlay.PAGE_TOKENS))

    def _pair(self) -> tuple[Answer, Answer] | None:
        view = self.view
        if view.conversation is None or view.rejected is None:
            return None
        of_chosen = view.example.dropped_tokens if view.example else 0
        return (
            Answer(view.conversation, self._token_loss, self._token_loss_base, of_chosen),
            Answer(view.rejected, self._rejected_loss, self._rejected_loss_base, view.dropped_tokens - of_chosen),
        )

    def _repr_html_(self) -> str:
        if self.view.conversation is None:
            return f'<div style="font-weight:600;{WRAP}">{visible_html(self._title)}</div>{self._left_out_html()}'
        look: dict[str, Any] = {
            "title": self._title,
            "per_token": self._per_token,
            "page": self._page,
            "show_mask": self._show_mask,
            "hidden_roles": self._hidden_roles,
        }
        if pair := self._pair():
            shown = render_pair_html(*pair, self._tokenizer, **look)
        else:
            shown = overlay.render_html(
                self.view.conversation,
                self._tokenizer,
                token_loss=self._token_loss,
                token_loss_base=self._token_loss_base,
                dropped_tokens=self.view.dropped_tokens,
                **look,
            )
        left_out = self._left_out_html() if self.view.error else ""
        remarks = "".join(f'<div dir="ltr" style="{WRAP}">⚠ {visible_html(one)}.</div>' for one in self.view.remarks)
        return f"{_badges_html(_badges(self.view))}{shown}{remarks}{_columns_html(_columns(self.view))}{left_out}"

    def _left_out_html(self) -> str:
        # The color is next to the text, so that the text keeps the contrast of the page.
        style = f"border-left:3px solid {tint(ORANGE, 1)};padding:0 0 0 10px;{WRAP}"
        return f'<div dir="ltr" style="{style}">left out: {visible_html(self.view.error or "")}</div>'

    def __repr__(self) -> str:
        if self.view.conversation is None:
            return f"{one_line(self._title)}\nleft out: {one_line(self.view.error or '')}"
        title = " · ".join([self._title, *(text for text, _ in _badges(self.view))])
        if pair := self._pair():
            shown = render_pair_text(*pair, self._tokenizer, title=title, color=False)
        else:
            shown = overlay.render_text(
                self.view.conversation,
                self._tokenizer,
                title=title,
                color=False,
                token_loss=self._token_loss,
                dropped_tokens=self.view.dropped_tokens,
            )
        remarks = (f"⚠ {one_line(remark)}." for remark in self.view.remarks)
        lines = [shown, *remarks, *(f"{name}: {one_line(value)}" for name, value in _columns(self.view))]
        return "\n".join([*lines, f"left out: {one_line(self.view.error)}"] if self.view.error else lines)


def _badges(view: RowView) -> list[tuple[str, bool]]:
    """The ratings of the row, such as its label or weight, as (text, whether it favors the answer)."""
    marks = view.content.ratings() if view.content else {}
    return [
        (f"{'✓' if value else '✗'} {name}: {'good' if value else 'bad'}", value)
        if isinstance(value, bool)
        else (f"{name}: {value:g}", True)
        for name, value in marks.items()
    ]


def _badges_html(badges: list[tuple[str, bool]]) -> str:
    shown = "".join(
        f'<span style="border:1px solid {tint(color, 0.9)};background:{tint(color, 0.18)};border-radius:9px;'
        f'padding:0 8px;margin:0 6px 0 0;font-size:.9em;white-space:nowrap">{escape(text)}</span>'
        for text, good in badges
        for color in [BLUE if good else ORANGE]
    )
    return f'<div style="margin:0 0 4px 0">{shown}</div>' if shown else ""


def _columns(view: RowView) -> list[tuple[str, str]]:
    """The columns that the rewards of a prompt receive: the answer, then the others."""
    given = view.content.reward_columns() if view.content else {}
    texts = {name: value if isinstance(value, str) else _written(value) for name, value in given.items()}
    return [
        (
            name,
            text if len(text) <= _LONGEST_COLUMN else f"{text[:_LONGEST_COLUMN]} … {len(text):,} characters in total",
        )
        for name, text in texts.items()
    ]


def _written(value: Any) -> str:
    """The repr of a value, or the name of its type if repr fails."""
    try:
        return repr(value)
    except Exception:
        return shown(value)


def _columns_html(columns: list[tuple[str, str]]) -> str:
    cell = f"padding:2px 12px 2px 0;border:none;text-align:left;vertical-align:top;{WRAP}"
    rows = "".join(
        f'<tr style="background:none"><td style="{cell};opacity:.75">{visible_html(name)}</td>'
        f'<td style="{cell}">{visible_html(value, edges=False)}</td></tr>'
        for name, value in columns
    )
    if not rows:
        return ""
    words = "The model writes the answer itself. The reward functions receive:"
    return (
        f'<div dir="ltr" style="max-width:60em;text-align:left"><div style="font-size:.85em;opacity:.8">{words}</div>'
        f'<table style="border:none;margin:4px 0 8px 0">{rows}</table></div>'
    )
