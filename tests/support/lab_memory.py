"""Measures the memory of a kernel after a cell was run repeatedly in JupyterLab."""

from __future__ import annotations

import json
import time

from lab_pages import TEXT_OF_CELL, cell_answers, wait_for_state

TIMES = 5


# What is freed and not yet given back says nothing about what is held: it varies by 5% from run to run.
MEASURE = """
import ctypes, gc, json, os, ipywidgets
import mlx.core as mx
assert run.finished, run.state
gc.collect()
mx.clear_cache()
ctypes.CDLL(None).malloc_trim(0)
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


def run_again(page, lab, number):
    """Run the training cell and wait for its end. Returns [MB and widgets of the kernel, widgets in the browser]."""
    lab.run_cell(page, 1)
    page.wait_for_function(f"() => ({COUNT})(1) === {2 * number + 2}", timeout=300_000)
    wait_for_state(page, "finished", timeout=300)
    page.wait_for_function(f"() => ({PANELS})() === 1")
    time.sleep(1)  # for what is closed to be closed in the browser too
    cell_answers(page, lab, 2, f"|{2 * number + 3}")
    text = page.evaluate(TEXT_OF_CELL, 2)
    return [*json.loads(text.split("measured")[1].split("end")[0]), page.evaluate(MODELS_IN_THE_BROWSER)]


def measure_runs(lab, body):
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
