"""Notebooks executed with nobody looking: nbconvert, papermill and `jupyter execute` give a complete, readable page."""

from __future__ import annotations

import html
import re
import subprocess
import sys

import nbformat
import pytest

from kernels import SETUP
from places import SUPPORT

pytestmark = pytest.mark.kernel


@pytest.fixture
def notebook(tmp_path, tiny_folder):
    """A notebook with a papermill parameter and a run of so many updates."""
    parameters = nbformat.v4.new_code_cell("iters = 3", metadata={"tags": ["parameters"]})
    body = f"%%finetune --name run -o run\nmodel: {tiny_folder}\ndata: rows\niters: {{iters}}\nsteps_per_eval: 2"
    cells = [
        parameters,
        nbformat.v4.new_code_cell(SETUP.format(tests=str(SUPPORT))),
        nbformat.v4.new_code_cell(body),
        nbformat.v4.new_code_cell("_ = await run"),
        nbformat.v4.new_code_cell("%finetune row 0"),
        nbformat.v4.new_code_cell("%finetune panel"),
        nbformat.v4.new_code_cell("run.history.tail(2)"),
        nbformat.v4.new_code_cell("print('updates', run.step_count)"),
    ]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    path = tmp_path / "run.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


def execute(notebook, *command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=notebook.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def kinds_of(cell):
    return {kind for output in cell.outputs for kind in output.get("data", {})}


def check(path, updates):
    cells = nbformat.read(path, 4).cells
    training = next(cell for cell in cells if cell.source.startswith("%%finetune"))
    assert {"image/png", "text/html"} <= kinds_of(training)
    text = str(list(training.outputs))
    assert f"run: finished after update {updates}" in text
    assert f"updates {updates}" in str(cells[-1].outputs)
    # What a page without a kernel shows of the panel is the run's state in words.
    panel = next(cell for cell in cells if cell.source == "%finetune panel")
    assert "finished" in str([output.get("data", {}).get("text/plain", "") for output in panel.outputs])


def test_jupyter_execute(notebook):
    execute(notebook, "jupyter", "execute", "--inplace", notebook.name)
    check(notebook, 3)


def test_papermill_with_parameters(notebook):
    execute(notebook, "papermill", notebook.name, "out.ipynb", "-p", "iters", "5")
    check(notebook.parent / "out.ipynb", 5)


def test_nbconvert_to_html(notebook):
    execute(notebook, "jupyter", "nbconvert", "--execute", "--to", "html", notebook.name)
    page = (notebook.parent / "run.html").read_text()
    text = html.unescape(re.sub(r"<[^>]*>", " ", page))
    assert "run: finished after update 3" in text
    assert "training loss" in text
    assert page.count("data:image/png;base64") >= 1
    assert "trained" in text
    assert "Traceback" not in text
