"""A matplotlib figure that displays itself on light and dark pages, with fonts for any script."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from io import BytesIO
from typing import Any

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from mlx_nb.view.theme import INK

MISSING = "□"
_FAMILY = "DejaVu Sans"  # included in matplotlib
# Fonts of common systems for characters that it lacks.
_FURTHER_FAMILIES = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Noto Sans JP",
    "Noto Sans SC",
    "Noto Sans KR",
    "Hiragino Sans",
    "PingFang HK",
    "Hiragino Sans GB",
    "Apple SD Gothic Neo",
    "Arial Unicode MS",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "WenQuanYi Zen Hei",
    "IPAexGothic",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Noto Emoji",
    "Symbola",
    "Segoe UI Symbol",
    "Apple Symbols",
)


class ShownFigure(Figure):
    """A Figure that a notebook shows as a picture without a pyplot backend; `savefig` writes it to a file.

    `words` and `chart` are its plain-text form.
    """

    def __init__(self, words: str, size: tuple[float, float], chart: str = "") -> None:
        super().__init__(figsize=size, dpi=110, layout="constrained", facecolor="none", edgecolor="none")
        FigureCanvasAgg(self)
        self.words, self.chart = words, chart

    def finish(self) -> None:
        """Make everything readable: one text color, integer ticks, available characters, and a literal `$`."""
        for axes in self.axes:
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
            _dye(axes)
        for text in self.findobj(Text):
            assert isinstance(text, Text)
            text.set_parse_math(False)
            if text.get_text().isascii():
                text.set_fontfamily(_FAMILY)
            else:
                text.set_fontfamily([_FAMILY, *(name for name, _ in _further_fonts())])
                text.set_text(drawable(text.get_text()))

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        plain = "\n".join(filter(None, [repr(self), self.chart]))
        return {"image/png": self._repr_png_(), "text/plain": plain}

    def __repr__(self) -> str:
        return f'{self.words} (a figure: `.savefig("curves.png")` writes it to a file)'


def drawable(text: str) -> str:
    """The text with a box for every character that no installed font has."""
    known = [font_manager.get_font(font_manager.findfont(_FAMILY)), *(font for _, font in _further_fonts())]
    return "".join(
        one if one in "\n" or any(font.get_char_index(ord(one)) for font in known) else MISSING for one in text
    )


@lru_cache(maxsize=1)
def _further_fonts() -> tuple[tuple[str, Any], ...]:
    """(family, font) of the installed fonts."""
    return tuple(_installed())


def _installed() -> Iterator[tuple[str, Any]]:
    there = {entry.name: entry.fname for entry in font_manager.fontManager.ttflist}
    for name in _FURTHER_FAMILIES:
        if name in there:
            yield name, font_manager.get_font(there[name])


def _dye(axes: Axes) -> None:
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK)
    axes.grid(visible=True, color=INK, alpha=0.25)
    axes.yaxis.get_offset_text().set_color(INK)
    for label in (axes.xaxis.label, axes.yaxis.label, *(_title(axes, side) for side in ("left", "center", "right"))):
        label.set_color(INK)
    legend = axes.get_legend()
    for text in legend.get_texts() if legend else ():
        text.set_color(INK)


def _title(axes: Axes, side: str) -> Text:
    title: Text = {"left": axes._left_title, "center": axes.title, "right": axes._right_title}[side]  # type: ignore[attr-defined]
    return title
