"""A real ipykernel: cells, a real interrupt, and notebooks executed as papermill and nbconvert do."""

from __future__ import annotations

import threading
import time

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

pytestmark = pytest.mark.kernel

SETUP = """%load_ext mlx_nb
import sys; sys.path.insert(0, {tests!r})
from tiny import tiny_rows
rows = tiny_rows(40)"""


class Kernel:
    """One kernel and what its cells print."""

    def __init__(self, folder):
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(folder))
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(self, code, timeout=120, on_output=lambda text: None):
        """Execute; returns (status, text of all streams and results). `on_output` sees each piece as it comes."""
        message_id = self.client.execute(code)
        text = ""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            message = self.client.get_iopub_msg(timeout=timeout)
            if message["parent_header"].get("msg_id") != message_id:
                continue
            kind, content = message["msg_type"], message["content"]
            piece = content.get("text") or content.get("data", {}).get("text/plain", "") or content.get("evalue", "")
            text += piece
            on_output(piece)
            if kind == "status" and content["execution_state"] == "idle":
                break
        reply = self.client.get_shell_msg(timeout=30)
        while reply["parent_header"].get("msg_id") != message_id:
            reply = self.client.get_shell_msg(timeout=30)
        return reply["content"]["status"], text

    def value(self, expression):
        status, text = self.run(f"print({expression})")
        assert status == "ok", text
        return text.strip()

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(tmp_path, request):
    kernel = Kernel(tmp_path)
    status, text = kernel.run(SETUP.format(tests=str(request.path.parent)))
    assert status == "ok", text
    yield kernel
    kernel.close()


def cell(tiny_folder, name, iters=400, options="--wait"):
    return (
        f"%%finetune --name {name} -o {name} {options}\nmodel: {tiny_folder}\ndata: rows\niters: {iters}\n"
        "learning_rate: 1e-2\nlora_parameters: {rank: 4, dropout: 0.1}\nsteps_per_eval: -1"
    )


def test_an_interrupt_pauses_at_a_step_boundary_and_the_run_goes_on_as_if_nothing_had_happened(kernel, tiny_folder):
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
            nbformat.v4.new_code_cell(SETUP.format(tests=str(request.path.parent))),
            nbformat.v4.new_code_cell(cell(tiny_folder, "a", iters=5)),
            nbformat.v4.new_code_cell("%finetune row 0"),
        ]
    )
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = notebook.cells[1].outputs
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"image/png", "text/html", "text/plain"} <= kinds
    summary = next(output.data["text/plain"] for output in outputs if "text/html" in output.get("data", {}))
    assert "finished after update 5" in summary
    shown = notebook.cells[2].outputs[0].data["text/html"]
    assert "<script" not in shown
    assert "trained" in shown
