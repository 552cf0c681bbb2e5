"""Fixtures of this room."""

from __future__ import annotations

from model_files import gguf_file, packaged

__all__ = ["gguf_file", "packaged"]
