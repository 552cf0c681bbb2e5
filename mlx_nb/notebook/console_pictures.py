"""Shows a figure in a console as a chart in characters alone: a console would open each picture in another program."""

from __future__ import annotations

from typing import Any

from IPython.core.interactiveshell import InteractiveShell

from mlx_nb.notebook.front_end import is_console

# By name, because importing matplotlib takes a second.
_FIGURE = ("mlx_nb.view.curves.shown_figure", "ShownFigure")
_PNG = "image/png"


class ConsolePictures:
    """The formatters of figures in one shell. `close` removes them."""

    def __init__(self, shell: InteractiveShell) -> None:
        display: Any = shell.display_formatter
        self._formatters: Any = (display.mimebundle_formatter, display.formatters[_PNG])
        for formatter, form in zip(self._formatters, (_bundle, _picture), strict=True):
            formatter.for_type_by_name(*_FIGURE, form)

    def close(self) -> None:
        """Remove the formatters."""
        for formatter in self._formatters:
            formatter.pop(".".join(_FIGURE), None)


def _bundle(figure: Any) -> dict[str, Any]:
    bundle: dict[str, Any] = figure._repr_mimebundle_()
    return {kind: data for kind, data in bundle.items() if kind != _PNG or not is_console()}


def _picture(figure: Any) -> bytes | None:
    return None if is_console() else figure._repr_png_()
