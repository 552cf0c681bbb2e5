"""Reads pages of JupyterLab."""

from __future__ import annotations

import json
import re
import time

from tiny import tiny_rows

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


def write_rows(folder):
    """Write `rows.jsonl`."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(40)))


def assert_the_panel_is_worked(page):
    """Run, pause, step and the list of all rows, in the panel of a run of 400 updates that is loaded or not."""
    panel = page.locator(".mlx-nb-panel")  # which may be in a shadow root
    paused = panel.locator("[role=status]", has_text="paused")
    panel.get_by_role("button", name="▶ Run").click()
    panel.get_by_text(re.compile(r"^update [1-9]\d* of 400")).wait_for()
    panel.get_by_role("button", name="Pause").click()
    paused.wait_for()
    done = panel.get_by_text(re.compile(r"^update \d+ of 400"))
    at = int(done.inner_text().split()[1])
    panel.get_by_role("button", name="Step", exact=True).click()
    panel.get_by_text(f"update {at + 1} of 400", exact=True).wait_for()
    paused.wait_for()
    panel.get_by_role("tab", name="Rows").click()
    panel.get_by_role("button", name="All rows").click()
    panel.locator(".mlx-nb-entry", has_text="row 0").click()
    panel.locator(".mlx-nb-tokens").first.wait_for()
