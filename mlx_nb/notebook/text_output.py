"""Text outputs of a cell: plain text, a line that is updated in place, an answer that streams in."""

from __future__ import annotations

import html
import sys
import time
from textwrap import wrap
from typing import Any

from mlx_nb.view.theme import WRAP

SECONDS_BETWEEN_CHANGES = 0.4
WIDTH = 66  # characters that fit in a notebook 700 px wide
_CARET = "▍"
# A notebook breaks plain text anywhere, even within words.
_STYLE = f"margin:0;font-family:var(--jp-code-font-family,monospace);{WRAP};word-break:normal"


def has_rich_display() -> bool:
    """Whether outputs can be updated in place here, as in a notebook."""
    from IPython.core.getipython import get_ipython

    from mlx_nb.notebook.front_end import is_console

    shell = get_ipython()
    return shell is not None and hasattr(shell, "kernel") and not is_console()


def bundle_of(text: str, *, quiet: bool = False) -> dict[str, str]:
    """The MIME bundle of plain text, with line breaks between words; `quiet` for progress, which is dimmed."""
    style = "opacity:0.8;white-space:pre-wrap" if quiet else _STYLE
    tag = "div" if quiet else "pre"
    return {"text/html": f'<{tag} style="{style}">{html.escape(text)}</{tag}>', "text/plain": text}


def broken_line(line: str) -> list[str]:
    """A line of an error, in pieces that fit a notebook 700 px wide, which would break it within words."""
    if len(line) <= WIDTH or not has_rich_display():
        return [line]
    return wrap(line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def say(text: str) -> None:
    """Show a permanent line. In a notebook it breaks between words, where printed text breaks anywhere."""
    if not has_rich_display():
        print(text)
        return
    from IPython.display import display

    display(bundle_of(text), raw=True)


class Text(str):
    """Text that displays without quotes, with an optional stamp below that is not part of the string."""

    stamp = ""

    def __repr__(self) -> str:
        return f"{self}\n({self.stamp})" if self.stamp else str(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return bundle_of(repr(self))

    def stamped(self, stamp: str) -> Text:
        """The same text with a line below."""
        self.stamp = stamp
        return self


class Line:
    """A text output that is updated in place. Errors of the display affect nothing else."""

    def __init__(self, text: str, *, quiet: bool = True) -> None:
        from IPython.display import display

        self._quiet = quiet
        self._shown_at = time.monotonic()
        self._text = text
        self._handle: Any = display(bundle_of(text, quiet=quiet), raw=True, display_id=True)

    @property
    def is_due(self) -> bool:
        """Whether enough time has passed to update it again."""
        return time.monotonic() - self._shown_at >= SECONDS_BETWEEN_CHANGES

    def put(self, text: str) -> None:
        """Replace the text."""
        self._shown_at = time.monotonic()
        if self._handle is None or text == self._text:
            return
        self._text = text
        try:
            self._handle.update(bundle_of(text, quiet=self._quiet), raw=True)
        except Exception as error:
            self._handle = None
            print(f"the progress could not be shown ({error}); nothing else is affected.", file=sys.stderr)


class GrowingAnswer:
    """An answer of the model that streams into a cell. `waiting` is shown until the first word."""

    def __init__(self, waiting: str) -> None:
        self._line = Line(waiting, quiet=False)
        self.text = ""

    def wait(self, words: str) -> None:
        """Show the activity before the first word."""
        if self._line.is_due:
            self._line.put(words)

    def grow(self, text: str) -> None:
        """Show all of the answer so far."""
        if text and (self._line.is_due or not self.text):
            self._line.put(f"{text}{_CARET}")
        self.text = text

    def interrupted(self) -> None:
        """Mark the answer as incomplete."""
        self._line.put(f"{self.text} …" if self.text else "(no answer)")

    def ended(self, text: str) -> Text:
        """The whole answer, as the result of the cell: it is displayed in the same place."""
        return _Grown(text, self._line)


class _Grown(Text):
    """An answer that is already displayed in its cell."""

    def __new__(cls, text: str, line: Line) -> _Grown:
        return super().__new__(cls, text)

    def __init__(self, text: str, line: Line) -> None:
        self._line: Line | None = line
        line.put(text)

    def stamped(self, stamp: str) -> Text:
        """The same text with a line below."""
        self.stamp = stamp
        if self._line is not None:
            self._line.put(repr(self))
        return self

    def _ipython_display_(self) -> None:
        from IPython.display import display

        if self._line is None:
            display(bundle_of(repr(self)), raw=True)
        self._line = None  # if it is displayed again, that is another output
