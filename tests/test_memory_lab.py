"""A cell that is run again and again in a real JupyterLab, its panel open: memory and widgets are those of one run."""

from __future__ import annotations

import json
import time

import pytest

from test_lab import lab  # noqa: F401, the fixture
from test_panel_lab import TEXT_OF_CELL, cell_answers, wait_for_state
from tiny import tiny_rows

pytestmark = pytest.mark.browser
TIMES = 5
MEASURE = """
import gc, json, os, ipywidgets
assert run.finished, run.state
gc.collect()
pages = int(open('/proc/self/statm').read().split()[1])
print('measured', json.dumps([pages * os.sysconf('SC_PAGE_SIZE') / 1e6, len(ipywidgets.widget._instances)]), 'end')
"""
MODELS_IN_THE_BROWSER = """async () => {
    const notebook = window.jupyterapp.shell.currentWidget.content;
    const renderer = notebook.rendermime.createRenderer('application/vnd.jupyter.widget-view+json');
    const manager = await renderer._manager.promise;
    return Object.keys(manager._models).length;
}"""
COUNT = "(index) => window.jupyterapp.shell.currentWidget.content.widgets[index].model.executionCount"
PANELS = "() => document.querySelectorAll('[role=status]').length"


def run_again(page, lab, number):  # noqa: F811
    """Run the training cell and wait for its end. Returns [MB of the kernel, widgets there, widgets in the browser]."""
    lab.run_cell(page, 1)
    page.wait_for_function(f"() => ({COUNT})(1) === {2 * number + 2}", timeout=300_000)
    wait_for_state(page, "finished", timeout=300)
    page.wait_for_function(f"() => ({PANELS})() === 1", timeout=30_000)
    time.sleep(1)  # for what is closed to be closed in the browser too
    cell_answers(page, lab, 2, f"|{2 * number + 3}")
    text = page.evaluate(TEXT_OF_CELL, 2)
    return [*json.loads(text.split("measured")[1].split("end")[0]), page.evaluate(MODELS_IN_THE_BROWSER)]


def measure_runs(lab, body):  # noqa: F811
    page = lab.open(["%load_ext mlx_nb", f"%%finetune -o run\n{body}", MEASURE])
    lab.run_cell(page, 0)
    measured = [run_again(page, lab, number) for number in range(TIMES)]
    page.close()
    print(
        *(
            f"{rss:.0f} MB, {kernel} widgets in the kernel, {browser} in the browser"
            for rss, kernel, browser in measured
        )
    )
    return measured


def assert_one_run(measured):
    memory, kernel, browser = zip(*measured)
    assert memory[-1] < 1.1 * memory[0], memory
    assert len(set(kernel)) == 1, kernel
    assert len(set(browser)) == 1, browser


def test_a_cell_run_five_times_with_its_panel_open_takes_the_memory_and_the_widgets_of_one(lab, tiny_folder):  # noqa: F811
    rows = "".join(json.dumps(row) + "\n" for row in tiny_rows(40))
    (lab.folder / "rows.jsonl").write_text(rows)
    assert_one_run(measure_runs(lab, f"model: {tiny_folder}\ndata: rows.jsonl\niters: 20\nsteps_per_eval: 10"))
