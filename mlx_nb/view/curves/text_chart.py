"""The curve of a run in braille characters (two by four dots), for terminals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from mlx_nb.events.history import History, smoothed
from mlx_nb.view.curves.main_quantity import curve_legend, live_quantity, validations_of
from mlx_nb.view.curves.points import SHORT_RUN

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bits of a braille character, by row and column
_EMPTY = 0x2800
_VALIDATION = "o"


def text_chart(history: History, width: int = 60, height: int = 10) -> str:
    """Loss or reward against updates: a line of dots for training, an `o` for each validation, and a legend.

    `width` and `height` are the size inside the axes, in characters. Empty with fewer than two numbers.
    """
    name = live_quantity(history)
    values = history[name] if len(history) < SHORT_RUN else smoothed(history[name])
    points = [(step, value) for step, value in zip(history["step"], values) if math.isfinite(value)]
    valid = validations_of(history, name)
    if len(points) < 2:
        return ""
    heights = [value for _, value in (*points, *valid)]
    low, high = min(heights), max(heights)
    last = max(step for step, _ in (*points, *valid))

    def place(step: float, value: float, columns: int, rows: int) -> tuple[int, int]:
        share = (value - low) / (high - low) if high > low else 0.5
        return round((columns - 1) * step / max(1, last)), round((rows - 1) * (1 - share))

    cells = [[_EMPTY] * width for _ in range(height)]
    for column, row in _line([place(*point, 2 * width, 4 * height) for point in points]):
        cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
    drawn = [[" " if cell == _EMPTY else chr(cell) for cell in line] for line in cells]
    for point in valid:
        column, row = place(*point, width, height)
        drawn[row][column] = _VALIDATION
    labels = [f"{high:.3g}", *[""] * (height - 2), f"{low:.3g}"]
    margin = max(map(len, labels))
    lines = [f"{label:>{margin}} │{''.join(line).rstrip()}" for label, line in zip(labels, drawn)]
    lines.append(f"{'':{margin}} └{'─' * width}")
    lines.append(f"{'':{margin}}  0{f'update {last}':>{width - 1}}")
    legend = f"⠒ {curve_legend(history)}" + (f"   {_VALIDATION} validation" if valid else "")
    return "\n".join([*lines, f"{'':{margin}}  {legend}"])


def _line(corners: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """All dots of a line through these corners."""
    dots = list(corners[:1])
    for (column, row), (to_column, to_row) in pairwise(corners):
        steps = max(abs(to_column - column), abs(to_row - row), 1)
        dots += [
            (column + round((to_column - column) * step / steps), row + round((to_row - row) * step / steps))
            for step in range(1, steps + 1)
        ]
    return dots
