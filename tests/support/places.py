"""Folders for tests and the processes that they start."""

from __future__ import annotations

from pathlib import Path

SUPPORT = Path(__file__).parent
PROJECT = SUPPORT.parent.parent
NOTEBOOKS = PROJECT / "example_notebooks"
DOCS = PROJECT / "docs"
