"""Fixtures of this room."""

from __future__ import annotations

from jupyter_lab import lab, notebook_7
from row_pages import browser, screenshot

__all__ = ["browser", "lab", "notebook_7", "screenshot"]
