"""A real ipykernel: cells, a real interrupt, and notebooks executed as papermill and nbconvert do."""

from __future__ import annotations

import threading

import nbformat
import pytest
from nbclient import NotebookClient

from kernels import SETUP, Kernel
from places import SUPPORT

pytestmark = pytest.mark.kernel


@pytest.fixture
def kernel(tmp_path, request):
    kernel = Kernel(tmp_path)
    status, text = kernel.run(SETUP.format(tests=str(SUPPORT)))
    assert status == "ok", text
    yield kernel
    kernel.close()


def cell(tiny_folder, name, iters=400, options="--wait"):
    return (
        f"%%finetune --name {name} -o {name} {options}\nmodel: {tiny_folder}\ndata: rows\niters: {iters}\n"
        "learning_rate: 1e-2\nlora_parameters: {rank: 4, dropout: 0.1}\nsteps_per_eval: -1"
    )


def test_an_interrupt_pauses_at_a_step_boundary_and_the_run_continues_as_if_nothing_had_happened(kernel, tiny_folder):
    kernel.run(cell(tiny_folder, "a", options="--paused"))
    kernel.run("%finetune step")
    timer = threading.Timer(0.3, kernel.manager.interrupt_kernel)
    timer.start()
    status, text = kernel.run("%finetune run --wait")
    timer.join()
    assert status == "ok", text
    assert "Pausing after this update" in text
    done = int(kernel.value("a.step_count"))
    assert 1 < done < 400
    status, text = kernel.run("%finetune run --wait")
    assert status == "ok", text
    kernel.run(cell(tiny_folder, "b"))
    assert kernel.value("a.history['loss'] == b.history['loss']") == "True"
    assert kernel.value("a.adapter_bytes() == b.adapter_bytes()") == "True"


def test_the_signal_handler_is_given_back(kernel, tiny_folder):
    before = kernel.value("__import__('signal').getsignal(2)")
    kernel.run(cell(tiny_folder, "a", iters=3))
    assert kernel.value("__import__('signal').getsignal(2)") == before


def test_a_bad_cell_fails_in_one_line(kernel):
    status, text = kernel.run("%%finetune\nmodle: x")
    assert status == "error"
    assert "Did you mean 'model'" in text
    assert "\n" not in text.strip()


def test_an_executed_notebook_keeps_a_static_figure_and_summary(tiny_folder, tmp_path, request):
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(SETUP.format(tests=str(SUPPORT))),
            nbformat.v4.new_code_cell(cell(tiny_folder, "a", iters=5)),
            nbformat.v4.new_code_cell("%finetune row 0"),
        ]
    )
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = notebook.cells[1].outputs
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"image/png", "text/html", "text/plain"} <= kinds
    summary = next(output.data["text/plain"] for output in outputs if "text/html" in output.get("data", {}))
    assert "finished after update 5" in summary
    shown = notebook.cells[2].outputs[0].data["text/html"]
    assert "<script" not in shown
    assert "trained" in shown
