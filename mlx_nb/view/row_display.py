"""A row that displays itself: tokens with the loss mask over them, in a notebook and in a terminal."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from mlx_nb.data.examples import RowView
from mlx_nb.view import mask_overlay
from mlx_nb.view.theme import ORANGE, WRAP, one_line, tint, visible_html


@dataclass(frozen=True, eq=False)
class ShownRow(RowView):
    """A row of a run, with what it takes to display itself in a cell."""

    tokenizer: Any = field(default=None, repr=False)
    split: str = "train"

    @classmethod
    def of(cls, view: RowView, tokenizer: Any, split: str) -> ShownRow:
        values = {declared.name: getattr(view, declared.name) for declared in fields(RowView)}
        return cls(**values, tokenizer=tokenizer, split=split)

    def _repr_html_(self) -> str:
        return RowDisplay(self, self.tokenizer, self.split)._repr_html_()

    def __repr__(self) -> str:
        return repr(RowDisplay(self, self.tokenizer, self.split))


class RowDisplay:
    """What `%finetune row 12` shows. `token_loss` (T,) colours the tokens by it; with the base's, by the change."""

    def __init__(
        self,
        view: RowView,
        tokenizer: Any,
        split: str,
        *,
        per_token: bool = False,
        page: int = 0,
        show_mask: bool = True,
        hidden_roles: Collection[str] = (),
        token_loss: np.ndarray | None = None,
        token_loss_base: np.ndarray | None = None,
    ) -> None:
        self.view = view
        self._tokenizer = tokenizer
        self._title = f"{split} row {view.row} ({view.location})"
        self._per_token = per_token
        self._page = page
        self._show_mask = show_mask
        self._hidden_roles = hidden_roles
        self._token_loss = token_loss
        self._token_loss_base = token_loss_base

    @property
    def pages(self) -> int:
        """How many pages a long row has."""
        conversation = self.view.conversation
        return 1 if conversation is None else max(1, -(-len(conversation.tokens) // mask_overlay.PAGE_TOKENS))

    def _repr_html_(self) -> str:
        if self.view.conversation is None:
            return f'<div style="font-weight:600;{WRAP}">{visible_html(self._title)}</div>{self._left_out_html()}'
        dropped = self.view.example.dropped_tokens if self.view.example else 0
        shown = mask_overlay.render_html(
            self.view.conversation,
            self._tokenizer,
            title=self._title,
            per_token=self._per_token,
            page=self._page,
            show_mask=self._show_mask,
            hidden_roles=self._hidden_roles,
            token_loss=self._token_loss,
            token_loss_base=self._token_loss_base,
            dropped_tokens=dropped,
        )
        if self.view.error:
            shown += self._left_out_html()
        return shown

    def _left_out_html(self) -> str:
        # The colour stands beside the text, which keeps the contrast of the page.
        style = f"border-left:3px solid {tint(ORANGE, 1)};padding:0 0 0 10px;{WRAP}"
        return f'<div dir="ltr" style="{style}">left out: {visible_html(self.view.error or "")}</div>'

    def __repr__(self) -> str:
        if self.view.conversation is None:
            return f"{one_line(self._title)}\nleft out: {one_line(self.view.error or '')}"
        dropped = self.view.example.dropped_tokens if self.view.example else 0
        shown = mask_overlay.render_text(
            self.view.conversation,
            self._tokenizer,
            title=self._title,
            color=False,
            token_loss=self._token_loss,
            dropped_tokens=dropped,
        )
        return f"{shown}\nleft out: {one_line(self.view.error)}" if self.view.error else shown
