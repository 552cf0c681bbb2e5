"""Run All in a real kernel: cells that are queued behind a run wait for it, and those of a hand act at once."""

from __future__ import annotations

import json
import threading
import time

import nbformat
import pytest
from nbclient import NotebookClient

from kernels import SETUP, Kernel
from killed import DIGEST
from places import SUPPORT

pytestmark = pytest.mark.kernel


@pytest.fixture
def kernel(tmp_path, request):
    kernel = Kernel(tmp_path)
    status, text = kernel.run(SETUP.format(tests=str(SUPPORT)))
    assert status == "ok", text
    kernel.run(DIGEST)
    yield kernel
    kernel.close()


def cell(tiny_folder, name, iters, options=""):
    return (
        f"%%finetune --name {name} -o {name} {options}\nmodel: {tiny_folder}\ndata: rows\niters: {iters}\n"
        "learning_rate: 1e-2\nlora_parameters: {rank: 4, dropout: 0.1}\nsteps_per_eval: -1\nloss_spike: null"
    )


ASKED = [
    "%finetune generate 'say red' --max-tokens 8",
    "%finetune eval train",
    "%finetune save out",
    "print(a.step_count, a.generate('say blue', max_tokens=8))",
]


def answers(outputs):
    """The last line of each cell's text: what a command answered, below what waiting shows."""
    return [text.strip().splitlines()[-1] for text in outputs]


def executed(tiny_folder, folder):
    """The same cells as nbconvert and papermill execute them."""
    sources = [SETUP.format(tests=str(SUPPORT)), cell(tiny_folder, "a", 150), *ASKED]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return [
        "".join(output.get("text") or output["data"]["text/plain"] for output in one.outputs)
        for one in notebook.cells[2:]
    ]


def test_run_all_gives_what_nbconvert_gives(kernel, tiny_folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    expected = answers(executed(tiny_folder, elsewhere))
    expected[2] = expected[2].replace(str(elsewhere), str(tmp_path))
    done = kernel.run_all([cell(tiny_folder, "a", 150), *ASKED])
    assert [status for status, _ in done] == ["ok"] * 5
    assert answers([text for _, text in done[1:]]) == expected
    first = done[1][1]
    assert "waited for a, which has finished  ·  update 150 of 150" in first
    for folder in (tmp_path, elsewhere):
        assert json.loads((folder / "out" / "adapter_config.json").read_text())["mlx_nb"]["update"] == 150
    saved = [(folder / "out" / "adapters.safetensors").read_bytes() for folder in (tmp_path, elsewhere)]
    assert saved[0] == saved[1]


def test_a_cell_sent_after_the_reply_is_not_queued_even_if_the_kernel_is_busy_between_the_two(kernel, tiny_folder):
    assert kernel.run(cell(tiny_folder, "a", 3000, "--paused"))[0] == "ok"
    busy = "import asyncio, time\nasyncio.get_running_loop().call_soon(time.sleep, 1)"
    assert kernel.run(f"{busy}\n%finetune run")[0] == "ok"
    status, text = kernel.run("print(a.finished)")
    assert (status, text.strip()) == ("ok", "False")


@pytest.mark.parametrize("clock", [-3600.0, 3600.0])
def test_the_clock_of_the_browser_may_be_another_one(tmp_path, tiny_folder, clock):
    kernel = Kernel(tmp_path)
    try:
        cells = [SETUP.format(tests=str(SUPPORT)), cell(tiny_folder, "a", 100), "print(a.step_count)"]
        *_, (status, text) = kernel.run_all(cells, clock=clock)
        assert (status, answers([text])) == ("ok", ["100"])
        kernel.run_all([cell(tiny_folder, "b", 5000)], clock=clock)
        time.sleep(0.2)
        ((_, text),) = kernel.run_all(["print(b.state)"], clock=clock)
        assert text.strip() == "running"
    finally:
        kernel.close()


def test_an_interrupt_of_a_cell_that_waits_pauses_the_run_and_executes_nothing_behind_it(kernel, tiny_folder, tmp_path):
    kernel.run(cell(tiny_folder, "whole", 400, "--wait"))
    kernel.run(cell(tiny_folder, "a", 400, "--paused"))
    kernel.run("a.listen(lambda event: event.step == 3 and open('moving', 'w').close())")

    def interrupt():
        while not (tmp_path / "moving").exists():
            time.sleep(0.005)
        kernel.manager.interrupt_kernel()

    interrupter = threading.Thread(target=interrupt, daemon=True)
    interrupter.start()
    done = kernel.run_all(["%finetune run", "print('not yet')", "print('nor this')"])
    assert [status for status, _ in done] == ["ok", "error", "aborted"]
    paused = int(kernel.value("a.step_count"))
    assert 0 < paused < 400
    assert kernel.value("a.state") == "paused"
    said = done[1][1].splitlines()[-1]
    assert said.startswith(f"a is paused after update {paused}; nothing is lost. `%finetune run` continues.")
    assert not any(word in done[1][1] for word in ("not yet\n", "Traceback"))
    # A cell that does nothing of ours can be interrupted as ever.
    assert kernel.value("__import__('signal').getsignal(2).__name__") == "default_int_handler"
    kernel.run("%finetune run --wait")
    assert kernel.value("digest(a)") == kernel.value("digest(whole)")


def test_a_run_that_fails_fails_the_cell_that_waits_for_it_in_one_line(kernel, tiny_folder):
    # That nothing of the rows is left to train is found out when they are tokenized.
    rows = "%%finetune --name a -o a\nmodel: {0}\ndata: rows\niters: 5\nmax_seq_length: 2"
    done = kernel.run_all([rows.format(tiny_folder), "print('not reached')"])
    assert [status for status, _ in done] == ["ok", "error"]
    assert "a has failed after update 0: " in done[1][1].splitlines()[-1]
    assert "not reached" not in done[1][1]


def test_now_and_a_hand_act_at_once_and_the_answer_names_the_update(kernel, tiny_folder, tmp_path):
    ask = "%finetune generate 'say red' --max-tokens 3"
    done = kernel.run_all([cell(tiny_folder, "a", 9000), f"{ask} --now"])
    assert "(update 0 of 9000, running)" in done[1][1]
    while int(kernel.value("a.step_count")) < 5:
        time.sleep(0.05)
    status, text = kernel.run(ask)
    update = int(text.split("(update ")[1].split()[0])
    assert (status, text.splitlines()[-1]) == ("ok", f"(update {update} of 9000, running)")
    assert update >= 5
    kernel.run(f"answer = {ask}")
    assert "update" not in kernel.value("repr(str(answer))")
    _, text = kernel.run("%finetune save out")
    update = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["mlx_nb"]["update"]
    assert f"(update {update} of 9000, running)" in text
    for move in ("%finetune step 2", "list(a.events(1))"):
        status, text = kernel.run(move)
        assert (status, "a is running, so it cannot train here now" in text) == ("error", True)
    assert kernel.value("a.state") == "running"


def test_nothing_waits_for_a_run_that_is_to_train_in_the_background_whoever_looks(kernel, tiny_folder):
    done = kernel.run_all([cell(tiny_folder, "a", 9000, "--background"), "print(a.state)"])
    assert done[1] == ("ok", "running\n")


def test_a_command_in_the_cell_that_starts_the_run_waits_too(kernel, tiny_folder):
    kernel.run(cell(tiny_folder, "a", 60, "--paused"))
    ((status, text),) = kernel.run_all(["%finetune run\n%finetune eval train"])
    answered = [line.split(":")[0] for line in text.splitlines() if line.startswith("update ") and "perplexity" in line]
    assert (status, answered) == ("ok", ["update 60"])
