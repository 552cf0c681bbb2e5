"""The tokens of a row on screen: which are trained, who says them, what they cost the model.

`render_html` for notebooks, `render_text` for terminals, `render_batch_html` for the arrays of a batch. Every
character of a row is data: it is escaped, and one that hides or reorders others is named instead of printed.
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
from mlx_nb.view.rows.html import PAGE_TOKENS, Look, notes_html, paged_html, samples_html, strip_html
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
    losses = sum(loss is not None for loss in (token_loss, token_loss_base))
    look = Look(per_token, show_mask, hidden_roles)
    body = paged_html(cells, conversation.tokens, look, page, page_tokens, alone=per_token or losses > 0)
    heading = f"<b>{escape(one_line(title), quote=True)}</b>&emsp;" if title else ""
    return (
        f'<div class="mlx-nb-tokens" dir="ltr" style="max-width:60em;text-align:left">'
        f"<div>{heading}{summary(conversation, dropped_tokens)}</div>{strip_html(conversation.loss_mask)}"
        f"{samples_html(conversation.loss_mask, cells, losses=losses)}"
        f"{notes_html(conversation, cells, token_loss, token_loss_base)}"
        f'<div style="margin:10px 0 0 0;{theme.WRAP}">{body}</div></div>'
    )
