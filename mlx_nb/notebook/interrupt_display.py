"""Shows an interrupt inside mlx_nb as one line in the notebook instead of a traceback."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from IPython.core.interactiveshell import InteractiveShell

from mlx_nb.errors import error_lines
from mlx_nb.notebook import bare_run
from mlx_nb.notebook.lost_interrupts import NotingHandler

LINE = (
    "KeyboardInterrupt: interrupted. No completed update is lost; `%finetune status` shows the progress, and "
    "`%finetune run` continues."
)
_PACKAGE = Path(__file__).parent.parent
_BARE_RUN = Path(bare_run.__file__)  # in the traceback of user code that %run executes


class InterruptsInOneLine:
    """Shows a KeyboardInterrupt from mlx_nb as LINE, and any other as the shell does, until `close`.

    IPython calls a custom handler before it shows an exception. Other exceptions go to the previous custom handler.
    """

    def __init__(self, shell: InteractiveShell) -> None:
        self._shell = shell
        self._before = (shell.custom_exceptions, shell.CustomTB)
        others = tuple(kind for kind in shell.custom_exceptions if kind is not KeyboardInterrupt)
        shell.set_custom_exc((KeyboardInterrupt, *others), self._show)
        self._ours = shell.CustomTB

    def close(self) -> None:
        """Restore the previous handler, unless another one was installed since."""
        if self._shell.CustomTB == self._ours:
            self._shell.custom_exceptions, self._shell.CustomTB = self._before

    def _show(
        self, shell: Any, kind: type, value: Any, trace: TracebackType | None, tb_offset: int | None = None
    ) -> Any:
        main = threading.current_thread() is threading.main_thread()
        # Ignore a second interrupt while the first is being shown.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
        try:
            if _passes_through_us(trace):
                value._render_traceback_ = lambda: error_lines(LINE)
            elif isinstance(value, self._before[0]):
                return self._before[1](kind, value, trace, tb_offset)
            shell.showtraceback((kind, value, trace), tb_offset=tb_offset)
        finally:
            if main:
                signal.signal(signal.SIGINT, before)
        return None


def _passes_through_us(trace: TracebackType | None) -> bool:
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if (
            _PACKAGE in file.parents
            and file != _BARE_RUN
            and trace.tb_frame.f_code is not NotingHandler.__call__.__code__
        ):
            return True
        trace = trace.tb_next
    return False
