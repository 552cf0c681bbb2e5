"""Fixtures of this room."""

from __future__ import annotations

from method_views import make_run
from row_pages import browser, opened, screenshot, tokenizer

__all__ = ["browser", "make_run", "opened", "screenshot", "tokenizer"]
