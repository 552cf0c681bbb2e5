"""Fixtures of this room."""

from __future__ import annotations

from jupyter_lab import lab

__all__ = ["lab"]
