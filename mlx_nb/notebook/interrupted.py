"""An interrupt that strikes our own code is one line in the notebook, wherever it strikes, and not a traceback."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from IPython.core.interactiveshell import InteractiveShell

from mlx_nb.notebook import bare_run

LINE = (
    "KeyboardInterrupt: interrupted. What was trained is kept; `%finetune status` says where the run is, and "
    "`%finetune run` goes on."
)
_PACKAGE = Path(__file__).parent.parent
_BARE_RUN = Path(bare_run.__file__)  # which hands over to what executes a file of the person's own


class InterruptsInOneLine:
    """Shows a KeyboardInterrupt that came out of mlx_nb as LINE, and every other as the shell would. `close` ends it.

    IPython asks a custom handler before it shows an exception; an earlier one is asked for everything else.
    """

    def __init__(self, shell: InteractiveShell) -> None:
        self._shell = shell
        self._before = (shell.custom_exceptions, shell.CustomTB)
        others = tuple(kind for kind in shell.custom_exceptions if kind is not KeyboardInterrupt)
        shell.set_custom_exc((KeyboardInterrupt, *others), self._show)
        self._ours = shell.CustomTB

    def close(self) -> None:
        """Give back the handler that was there, unless somebody took it since."""
        if self._shell.CustomTB == self._ours:
            self._shell.custom_exceptions, self._shell.CustomTB = self._before

    def _show(
        self, shell: Any, kind: type, value: Any, trace: TracebackType | None, tb_offset: int | None = None
    ) -> Any:
        main = threading.current_thread() is threading.main_thread()
        # A second interrupt, while the first is being shown, has nothing more to say.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
        try:
            if _passes_through_us(trace):
                value._render_traceback_ = lambda: [LINE]
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
        if _PACKAGE in file.parents and file != _BARE_RUN:
            return True
        trace = trace.tb_next
    return False
