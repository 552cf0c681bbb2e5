"""Tab in a real JupyterLab: what the completer lists."""

from __future__ import annotations

import pytest

from mlx_nb.config.methods import METHODS

pytestmark = pytest.mark.browser

OPTIONS = ["--name", "--output", "--paused", "--wait", "--background", "--from", "--resume", "--allow-changed"]


def listed(page, index: int, screenshot) -> list[str]:
    """What Tab lists at the end of a cell."""
    page.evaluate(
        """async (index) => {
            const notebook = window.jupyterapp.shell.currentWidget.content;
            notebook.activeCellIndex = index;
            notebook.mode = 'edit';
            const editor = notebook.widgets[index].editor, last = editor.lineCount - 1;
            editor.focus();
            editor.setCursorPosition({ line: last, column: editor.getLine(last).length });
        }""",
        index,
    )
    page.keyboard.press("Tab")
    page.wait_for_selector(".jp-Completer:not(.lm-mod-hidden) .jp-Completer-match")
    found = [one.inner_text() for one in page.locator(".jp-Completer-match").all()]
    screenshot(page, f"completion_{index}")
    page.keyboard.press("Escape")
    return found


def test_tab_lists_exactly_what_may_stand_there(lab, screenshot):
    cells = [
        "%load_ext mlx_nb\nbees = [{'prompt': 'a', 'completion': 'b'}] * 30\nmethodology = 1",
        "%%finetune\ndata: bees\nmethod: ",
        "%%finetune --",
        "%%finetune\ndata: ",
        "%finetune s",
    ]
    page = lab.open(cells)
    lab.run_cell(page, 0)
    page.wait_for_function("() => window.jupyterapp.shell.currentWidget.content.widgets[0].model.executionCount")
    assert listed(page, 1, screenshot) == list(METHODS)
    options = listed(page, 2, screenshot)
    assert set(OPTIONS) <= set(options)
    assert all(one.startswith("--") for one in options)
    assert listed(page, 3, screenshot)[0] == "bees"
    assert {"step", "set", "stop"} <= set(listed(page, 4, screenshot))
    page.close()
