"""Colors, inline styles and visible characters shared by the HTML and terminal views.

Untrusted notebooks drop style sheets, variables, `ch` lengths and newer property values, so every style here is an
inline style that survives. Text keeps the inherited color, on half-transparent tints only, so that one output is
readable on light and dark pages.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from html import escape

Color = tuple[int, int, int]

BLUE: Color = (0, 114, 178)
ORANGE: Color = (213, 94, 0)
GREEN: Color = (0, 158, 115)
GREY: Color = (128, 128, 128)
# For text in pictures, which inherits no color: 4.3:1 or more on white and on the #111 of dark notebooks.
INK = "#7A7A7A"
ROLE_COLORS = {"system": GREY, "user": ORANGE, "assistant": BLUE, "tool": GREEN}

# The strongest tint on which inherited text keeps a contrast of 4.5:1 in the usual light and dark themes.
STRONGEST_TINT = 0.55
DIM = 0.68

MONOSPACE = "font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace"
WRAP = "white-space:pre-wrap;overflow-wrap:break-word;overflow-wrap:anywhere"

_MARKS = "\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f"
_ATOMS = {
    edges: re.compile(
        rf"[\n\t]|{boundary}|(?<=\n) +| +(?=\n)| {{2,}}|^ +$|[{_MARKS}]{{4,}}|[^\x20-\x7e]",
    )
    for edges, boundary in ((True, r"^ +| +$"), (False, r"^ +$"))
}
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]")
# Letters and marks that are invisible, though not by their Unicode category.
_UNASSIGNED_BLANK = re.compile("[\u2065\ufdd0-\ufdef\ufff0-\uffff\U000e0000-\U000e0fff]")
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0")


def tint(color: Color, alpha: float) -> str:
    """The color at this opacity, for an inline style."""
    return f"rgba({color[0]},{color[1]},{color[2]},{alpha:.2g})"


def loss_tint(loss: float) -> str:
    """Background for a loss in nats: none at 0, strongest at 6 and above."""
    return tint(ORANGE, STRONGEST_TINT * min(max(loss, 0.0) / 6, 1.0))


def change_tint(improvement: float) -> str:
    """Background for a decrease of the loss in nats: blue for better, orange for worse, strongest at 3."""
    return tint(BLUE if improvement > 0 else ORANGE, STRONGEST_TINT * min(abs(improvement) / 3, 1.0))


@lru_cache(maxsize=4096)
def _prints_nothing(character: str) -> bool:
    category = unicodedata.category(character)
    return (
        category in {"Cc", "Cf", "Cs", "Co", "Zs", "Zl", "Zp"}
        or (category == "Cn" and bool(_UNASSIGNED_BLANK.match(character)))
        or character in _BLANK
        or "VARIATION SELECTOR" in unicodedata.name(character, "")
    )


def _joins_previous_text(text: str) -> bool:
    """Whether it starts with a mark or half a flag, which is drawn into the previous text."""
    half_flag = "\U0001f1e6" <= text[0] <= "\U0001f1ff" and not "\U0001f1e6" <= text[1:2] <= "\U0001f1ff"
    return half_flag or unicodedata.category(text[0]).startswith("M")


def _joins_emoji(text: str, at: int) -> bool:
    """Whether the joiner or emoji selector at this position only modifies the previous emoji."""
    before = text[at - 1 : at] if at else ""
    if not before or (unicodedata.category(before) not in {"So", "Sk"} and before not in "\ufe0f#*0123456789"):
        return False
    after = text[at + 1 : at + 2]
    return text[at] == "\ufe0f" or (text[at] == "\u200d" and bool(after) and unicodedata.category(after) == "So")


def visible_parts(text: str, *, edges: bool = True) -> Iterator[tuple[str, str]]:
    """The text in pieces `(characters, kind)`, without hidden, reordering or control characters.

    kind is "text"; "glyph" for ⏎ (its line break follows as text), ⇥ and ·, which represent a newline, a
    tab, and a space at the start or end of a line or in a run of spaces; or "escape" for names such as ‹U+202E›,
    which represent an invisible character. With `edges`, spaces at the start and end of the text are
    also shown.
    """
    done = 0
    for match in _ATOMS[edges].finditer(text):
        found, at = match[0], match.start()
        pieces: tuple[tuple[str, str], ...]
        if found[0] == " ":
            pieces = (("·" * len(found), "glyph"),)
        elif found == "\n":
            pieces = (("⏎", "glyph"), ("\n", "text"))
        elif found == "\t":
            pieces = (("⇥", "glyph"), ("\t", "text"))
        elif len(found) > 1:
            pieces = ((f"‹{len(found)} combining marks›", "escape"),)
        elif _prints_nothing(found) or (at == 0 and "\U0001f3fb" <= found <= "\U0001f3ff"):
            if found in "\u200d\ufe0f" and _joins_emoji(text, at):
                continue
            # A skin tone at the start would color the emoji before it.
            pieces = ((f"‹U+{ord(found):04X}›", "escape"),)
        elif at == 0 and _joins_previous_text(text):
            pieces = (("◌", "glyph"), (found, "text"))
        else:
            continue
        if at > done:
            yield text[done:at], "text"
        yield from pieces
        done = match.end()
    if done < len(text):
        yield text[done:], "text"


_PART_STYLES = {
    "glyph": "opacity:.75",
    "escape": "border:1px dotted;border-radius:3px;padding:0 1px;font-size:.85em;white-space:nowrap",
}


def visible_html(text: str, *, edges: bool = True) -> str:
    """The text as escaped HTML in which every character is visible; see `visible_parts`."""
    return "".join(
        escape(piece, quote=True) if kind == "text" else f'<span style="{_PART_STYLES[kind]}">{piece}</span>'
        for piece, kind in visible_parts(text, edges=edges)
    )


def one_line(text: str, *, edges: bool = False) -> str:
    """The text as one visible line, for titles, labels and table cells. Not escaped for HTML."""
    return "".join(part for part, _ in visible_parts(text, edges=edges)).replace("\n", "").replace("\t", "")


def span(content: str, *, style: str = "", title: str = "", isolate: str = "") -> str:
    """One inline element around `content`, which is already HTML; `title` is escaped here.

    If `isolate`, the raw text inside, has right-to-left letters, the element keeps them from reordering neighbors.
    """
    tag = "bdi" if isolate and _RIGHT_TO_LEFT.search(isolate) else "span"
    title_attribute = f' title="{escape(title, quote=True)}"' if title else ""
    style_attribute = f' style="{style}"' if style else ""
    return f"<{tag}{title_attribute}{style_attribute}>{content}</{tag}>"
