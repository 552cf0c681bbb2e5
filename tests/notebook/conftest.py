"""Fixtures of this room."""

from __future__ import annotations

from jupyter_lab import lab
from row_pages import screenshot

__all__ = ["lab", "screenshot"]
