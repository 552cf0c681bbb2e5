"""Reads pages of JupyterLab."""

from __future__ import annotations

import time

STATE = "(state) => document.querySelector('[role=status]')?.textContent.includes(state)"

TEXT_OF_CELL = """(index) => {
    const cell = window.jupyterapp.shell.currentWidget.content.widgets[index];
    return cell.outputArea.node.innerText + '|' + (cell.model.executionCount ?? '');
}"""


def wait_for_state(page, state, timeout=180):
    """Wait until the panel shows it. Returns the seconds."""
    begun = time.monotonic()
    page.wait_for_function(STATE, arg=state, timeout=1000 * timeout)
    return time.monotonic() - begun


def cell_answers(page, lab, index, text, timeout=180):
    """Run a cell, and return the seconds until its output contains `text`."""
    begun = time.monotonic()
    lab.run_cell(page, index)
    while text not in page.evaluate(TEXT_OF_CELL, index):
        assert time.monotonic() - begun < timeout
        time.sleep(0.02)
    return time.monotonic() - begun
