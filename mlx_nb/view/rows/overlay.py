"""Renders the tokens of a row with their loss mask, roles and losses.

`render_html` for notebooks, `render_text` for terminals, `render_batch_html` for the arrays of a batch. Every
character of a row is escaped, and hidden or reordering characters are shown by name.
"""

from __future__ import annotations

from collections.abc import Collection
from html import escape

import numpy as np

from mlx_nb.data.masks.conversation import TokenizedConversation
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.errors import DataError
from mlx_nb.view import theme
from mlx_nb.view.rows.batch import render_batch_html
from mlx_nb.view.rows.cells import row_cells, summary
from mlx_nb.view.rows.html import PAGE_TOKENS, RowStyle, notes_html, paged_html, samples_html, strip_html
from mlx_nb.view.rows.text import render_text
from mlx_nb.view.theme import one_line

__all__ = ["PAGE_TOKENS", "render_batch_html", "render_html", "render_text"]


def render_html(
    conversation: TokenizedConversation,
    tokenizer: Tokenizer,
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
    unknown. With the first, tokens are tinted by the loss; with both, by what training changed. Tokens that look
    alike are one element unless `per_token` is set or their loss is known; then the result has only page `page` of
    `page_tokens` tokens. Otherwise it has all pages, folded except this one, unless they exceed 600 KB. Without
    `show_mask` the text is plain. Messages of `hidden_roles` are reduced to one line. `dropped_tokens` is the number
    of tokens that were cut off. Raises DataError for a page that does not exist and for losses of the wrong length.
    """
    if token_loss is None and token_loss_base is not None:
        raise DataError("token_loss_base is given without token_loss. Pass both to compare, or token_loss alone.")
    cells = row_cells(conversation, tokenizer, token_loss, token_loss_base, show_ends=not dropped_tokens)
    losses = sum(loss is not None for loss in (token_loss, token_loss_base))
    look = RowStyle(per_token, show_mask, hidden_roles)
    body = paged_html(cells, conversation.tokens, look, page, page_tokens, alone=per_token or losses > 0)
    heading = f"<b>{escape(one_line(title), quote=True)}</b>&emsp;" if title else ""
    return (
        f'<div class="mlx-nb-tokens" dir="ltr" style="max-width:60em;text-align:left">'
        f"<div>{heading}{summary(conversation, dropped_tokens)}</div>{strip_html(conversation.loss_mask)}"
        f"{samples_html(conversation.loss_mask, cells, losses=losses)}"
        f"{notes_html(conversation, cells, token_loss, token_loss_base)}"
        f'<div style="margin:10px 0 0 0;{theme.WRAP}">{body}</div></div>'
    )
