"""The panel in Notebook 7, where it is installed: it trains, answers clicks and is read from Python."""

from __future__ import annotations

import pytest

from lab_pages import TEXT_OF_CELL, assert_the_panel_is_worked, write_rows

pytestmark = pytest.mark.browser


def test_the_panel_works_in_notebook_7(notebook_7, tiny_folder, screenshot):
    write_rows(notebook_7.folder)
    body = f"%%finetune --paused --name bees -o run\nmodel: {tiny_folder}\ndata: rows.jsonl\niters: 400\n"
    cells = ["%load_ext mlx_nb", f"{body}steps_per_eval: -1", "print(run.panel().tab, run.panel().selection['rows'])"]
    page = notebook_7.open(cells)
    for cell in range(2):
        notebook_7.run_cell(page, cell)
    page.wait_for_selector(".mlx-nb-panel")
    assert_the_panel_is_worked(page)
    screenshot(page, "notebook_7")
    notebook_7.run_cell(page, 2)
    page.wait_for_function(f"() => ({TEXT_OF_CELL})(2).includes('Rows all')")
    page.close()
