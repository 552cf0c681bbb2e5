"""Training in the background of a real ipykernel: cells, clicks and interrupts in between, and the same numbers."""

from __future__ import annotations

import time

import pytest

from kernels import SETUP, Kernel
from killed import DIGEST
from mlx_nb import Run
from mlx_nb.train.checkpoint_store import CheckpointStore
from places import SUPPORT
from tiny import tiny_rows

pytestmark = pytest.mark.kernel


class LiveKernel(Kernel):
    """A kernel with a front end that clicks."""

    def wait_for(self, expression, wanted, timeout=60.0):
        """Until the expression prints `wanted`; returns the seconds it took."""
        begun = time.monotonic()
        while (seen := self.value(expression)) != wanted:
            assert time.monotonic() - begun < timeout, f"{expression} is {seen}"
            time.sleep(0.01)
        return time.monotonic() - begun

    def click(self, message, channel=None):
        """Click in the panel, as a page does: a comm message on the shell channel, or on that of a subshell."""
        model = self.value(f"{PANEL}.model_id")
        content = {"comm_id": model, "data": {"method": "custom", "content": message}}
        message = self.client.session.msg("comm_msg", content)
        message["header"]["subshell_id"] = channel
        self.client.shell_channel.send(message)

    def wait_for_state(self, wanted, timeout=60.0):
        """Until the kernel tells a page that the run is `wanted`."""
        while True:
            message = self.client.get_iopub_msg(timeout=timeout)
            reported = message["content"].get("data", {}).get("state", {}).get("head", {})
            if message["msg_type"] == "comm_msg" and reported.get("state") == wanted:
                return

    def wait_until_idle(self, sent, timeout=60.0):
        """Until a request is done. An ipykernel that is interrupted between two steps of its own never answers it."""
        while True:
            message = self.client.get_iopub_msg(timeout=timeout)
            if message["parent_header"].get("msg_id") == sent and message["content"].get("execution_state") == "idle":
                return

    def new_subshell(self):
        """The id of a new subshell; None for a kernel that has none and says so."""
        self.client.kernel_info()
        info = self.client.get_shell_msg(timeout=30)["content"]
        if "kernel subshells" not in info.get("supported_features", []):
            return None
        self.client.control_channel.send(self.client.session.msg("create_subshell_request"))
        return self.client.get_control_msg(timeout=30)["content"]["subshell_id"]


@pytest.fixture
def kernel(tmp_path, request):
    kernel = LiveKernel(tmp_path)
    status, text = kernel.run(SETUP.format(tests=str(SUPPORT)))
    assert status == "ok", text
    kernel.run(DIGEST)
    yield kernel
    kernel.close()


def cell(tiny_folder, name, iters=300, options=""):
    return (
        f"%%finetune --name {name} -o {name} {options}\nmodel: {tiny_folder}\ndata: rows\niters: {iters}\n"
        "learning_rate: 5e-3\nlora_parameters: {rank: 4, dropout: 0.1}\nsteps_per_eval: 20\nloss_spike: null"
    )


PANEL = "get_ipython()._mlx_nb_magics.session._shown['a'][0]"


def whole_digest(kernel, tiny_folder, iters=300):
    kernel.run(cell(tiny_folder, "whole", iters, "--paused"))
    kernel.run("whole.run()")
    return kernel.value("digest(whole)")


def test_the_cell_returns_at_once_and_other_cells_use_the_live_model_in_between(kernel, tiny_folder):
    expected = whole_digest(kernel, tiny_folder)
    begun = time.monotonic()
    status, text = kernel.run(cell(tiny_folder, "a", options="--background"))
    returned = time.monotonic() - begun
    assert status == "ok", text
    assert kernel.value("a.state") == "running"
    answered = []
    while kernel.value("a.state") == "running":
        begun = time.monotonic()
        kernel.run(
            "import mlx.core as mx, numpy as np\n"
            "mx.random.normal((3,)); np.random.rand(3); a.model(mx.array([[1, 2, 3]])); a.generate('x', max_tokens=2)"
        )
        answered.append(time.monotonic() - begun)
    assert kernel.value("a.state") == "finished"
    assert len(answered) > 3
    assert kernel.value("digest(a)") == expected
    longest = float(kernel.value("sum(a.history['seconds'])"))
    assert returned < max(2.0, longest)


@pytest.mark.parametrize("where", ["main", "subshell"])
def test_clicks_pause_step_and_run_on(kernel, tiny_folder, where):
    """JupyterLab sends clicks to a subshell where the kernel has them, which may be another thread."""
    channel = kernel.new_subshell() if where == "subshell" else None
    expected = whole_digest(kernel, tiny_folder)
    kernel.run(cell(tiny_folder, "a"))
    assert kernel.value("a.state") == "running"
    kernel.wait_for("a.step_count > 3", "True")
    kernel.click({"do": "pause"}, channel)
    kernel.wait_for("a.state", "paused")
    paused_at = int(kernel.value("a.step_count"))
    assert 3 < paused_at < 300
    assert kernel.value(f"('run' in {PANEL}.clicks, 'pause' in {PANEL}.clicks)") == "(True, False)"
    kernel.click({"do": "step", "updates": 1}, channel)
    kernel.wait_for("a.step_count", str(paused_at + 1))
    kernel.wait_for("a.state", "paused")
    kernel.click({"do": "step", "updates": 10}, channel)
    kernel.wait_for("a.step_count", str(paused_at + 11))
    kernel.wait_for("a.state", "paused")
    kernel.click({"do": "rewind", "to": paused_at + 1}, channel)
    kernel.wait_for("a.step_count", str(paused_at + 1))
    kernel.wait_for("a.state", "paused")
    kernel.click({"do": "evaluate"}, channel)
    kernel.wait_for(f"a.history.evaluations()[-1]['step'] == {paused_at + 1}", "True")
    kernel.click({"do": "run"}, channel)
    kernel.wait_for("a.state", "finished")
    assert kernel.value("a.adapter_bytes() == whole.adapter_bytes()") == "True"
    assert kernel.value("a.history['loss'] == whole.history['loss']") == "True"
    assert expected.split()[0] == kernel.value("digest(a)").split()[0]


def test_an_interrupt_between_cells_pauses_and_the_handler_is_given_back(kernel, tiny_folder):
    expected = whole_digest(kernel, tiny_folder)
    before = kernel.value("__import__('signal').getsignal(2)")
    kernel.run(cell(tiny_folder, "a"))
    for _ in range(5):
        kernel.run("import time; time.sleep(0.05)")
        kernel.manager.interrupt_kernel()
        kernel.wait_for("a.state", "paused")
        kernel.run("%finetune run")
        assert kernel.value("a.state") == "running"
    kernel.wait_for("a.state", "finished")
    assert kernel.value("digest(a)") == expected
    assert kernel.value("__import__('signal').getsignal(2)") == before


def test_an_interrupt_at_any_moment_of_the_cell_that_starts_a_run_is_not_lost(kernel, tiny_folder):
    expected = whole_digest(kernel, tiny_folder, 60)
    for milliseconds in (0, 1, 2, 4, 6, 8, 10, 12, 14, 16, 20, 25, 30, 40, 60, 100, 200):
        kernel.run("a = None")
        sent = kernel.client.execute(cell(tiny_folder, "a", 60), stop_on_error=False)
        while kernel.client.get_iopub_msg(timeout=30)["msg_type"] != "execute_input":
            pass  # until then there is nothing to interrupt
        time.sleep(milliseconds / 1000)
        kernel.manager.interrupt_kernel()
        kernel.wait_until_idle(sent)
        while (state := kernel.value("a and a.state")) == "running":
            time.sleep(0.01)
        # Either the cell was ended before there was a run, or the run has heard it.
        assert state in ("None", "built", "paused"), (milliseconds, state)
        status, text = kernel.run("if a is not None: print(a.run().step)")
        assert status == "ok", text
        assert kernel.value("a is None or digest(a)") in ("True", expected), milliseconds


INTERRUPTED_IN_A_FINALIZER = """
import os
from mlx_nb.notebook.session import Session

class Garbage:
    def __del__(self):
        os.kill(os.getpid(), 2)
        sum(range(1000))

def added(session, run, output, add=Session.add):
    notes = add(session, run, output)
    Garbage()
    return notes

Session.add = added
"""


@pytest.mark.parametrize("how", ["--background", "--wait"])
def test_an_interrupt_that_a_finalizer_drops_before_the_run_starts_is_not_lost(kernel, tiny_folder, how):
    expected = whole_digest(kernel, tiny_folder, 60)
    kernel.run(INTERRUPTED_IN_A_FINALIZER)
    status, text = kernel.run(cell(tiny_folder, "a", 60, how))
    assert status == "error"
    assert "KeyboardInterrupt" in text
    assert kernel.value("a.state") == "built"
    kernel.run("a.run()")
    assert kernel.value("digest(a)") == expected


def test_an_interrupt_as_soon_as_a_click_on_run_shows_is_not_lost(kernel, tiny_folder):
    expected = whole_digest(kernel, tiny_folder, 60)
    kernel.run(cell(tiny_folder, "a", 60, "--paused"))
    kernel.run("import mlx_nb; panel = a.panel(); panel")
    for _ in range(8):
        kernel.click({"do": "run"})
        kernel.wait_for_state("running")
        kernel.manager.interrupt_kernel()
        kernel.wait_for("a.state", "paused")
    kernel.run("a.run()")
    assert kernel.value("digest(a)") == expected


def test_await_waits_without_cancelling_and_two_runs_go_side_by_side(kernel, tiny_folder):
    expected = whole_digest(kernel, tiny_folder)
    kernel.run(cell(tiny_folder, "a"))
    kernel.run(cell(tiny_folder, "b", options="--now"))
    assert kernel.value("(a.state, b.state)") == "('running', 'running')"
    status, text = kernel.run("_ = await a; _ = await b")
    assert status == "ok", text
    assert kernel.value("digest(a)") == expected
    assert kernel.value("digest(b)") == expected


def test_a_run_that_moves_refuses_what_would_collide_in_one_line(kernel, tiny_folder):
    kernel.run(cell(tiny_folder, "a", 5000))
    for code in ("a.step()", "%finetune rewind 1", "a.run()", "%finetune run"):
        status, text = kernel.run(code)
        assert status == "error", code
        assert "pause" in text, text
    status, text = kernel.run("%finetune pause")
    assert "pauses after this update" in text
    kernel.wait_for("a.state", "paused")
    status, text = kernel.run("%finetune pause")
    assert "nothing to pause" in text
    kernel.run("%finetune set learning_rate=1e-3")
    kernel.run("%finetune step")
    assert kernel.value("a.history['learning_rate'][-1] <= 1e-3") == "True"
    status, text = kernel.run("%finetune stop")
    assert status == "ok", text
    assert kernel.value("a.state") == "stopped"
    status, text = kernel.run("%reload_ext mlx_nb")
    assert status == "ok", text


def test_a_question_and_kept_prompts_are_answered_between_updates(kernel, tiny_folder):
    kernel.run(cell(tiny_folder, "a", 100, "--paused"))
    kernel.run("plain = a.fork(name='plain'); _ = plain.run()")
    kernel.run("a.set(sample_prompts=['say red'], sample_every=20, sample_tokens=4); said = []")
    kernel.run("from mlx_nb.events import Question")
    kernel.run("%finetune run")
    kernel.run("a.ask(Question('say blue', lambda text, done: said.append((text, done)), max_tokens=5))")
    kernel.wait_for("a.state", "finished")
    assert kernel.value("said[-1][1]") == "True"
    steps = kernel.value("[e.step for e in a.history.events if type(e).__name__ == 'SampleGenerated']")
    assert steps == "[0, 20, 40, 60, 80, 100]"
    assert kernel.value("a.history['loss'] == plain.history['loss']") == "True"
    assert kernel.value("a.adapter_bytes() == plain.adapter_bytes()") == "True"


def test_what_goes_wrong_in_the_background_is_shown_and_the_run_can_continue(kernel, tiny_folder):
    kernel.run(cell(tiny_folder, "a", 5000))
    kernel.run("def bad(*_, **__): raise ValueError('broken on purpose')")
    kernel.run("good = a.trainer.stepper.update; a.trainer.stepper.update = bad")
    kernel.wait_for("a.state", "failed")
    kernel.wait_for(f"'broken on purpose' in {PANEL}.head['failure']", "True")
    assert kernel.value(f"'broken on purpose' in repr({PANEL}.event_log)") == "True"
    kernel.run("a.trainer.stepper.update = good")
    kernel.run("%finetune run")
    assert kernel.value("a.state") == "running"


def test_a_broken_panel_never_touches_training(kernel, tiny_folder):
    expected = whole_digest(kernel, tiny_folder, 100)
    kernel.run(cell(tiny_folder, "a", 100, "--paused"))
    kernel.click({"do": "open"})
    kernel.run(f"def broken(): raise RuntimeError('the tab is gone')\n{PANEL}.refresh = broken")
    kernel.run("%finetune run")
    kernel.wait_for("a.state", "finished")
    assert kernel.value("digest(a)") == expected


SAMPLED = """%%finetune --name {name} -o {name} --paused
model: {model}
data: prompts
method: grpo
rewards: [short]
group_size: 3
max_completion_length: 8
updates_per_rollout: 2
batch_size: 2
iters: 30
steps_per_eval: 10"""
REWARD = """from tiny import tiny_prompts
prompts = tiny_prompts()
def short(completions): return [1.0 / (1 + len(text)) for text in completions]"""


def test_watching_completions_with_their_ratios_changes_no_bit_of_a_run(kernel, tiny_folder):
    kernel.run(REWARD)
    kernel.run(SAMPLED.format(name="whole", model=tiny_folder))
    status, text = kernel.run("whole.run()")
    assert status == "ok", text
    kernel.run(SAMPLED.format(name="a", model=tiny_folder))
    kernel.click({"do": "open"})
    kernel.run(f"{PANEL}.tab = 'Completions'\n{PANEL}.coloring = True")
    kernel.run("%finetune run --background")
    kernel.wait_for("a.state", "finished")
    kernel.wait_for(f"'log(current policy' in {PANEL}.completions['html']", "True")
    assert kernel.value("digest(a)") == kernel.value("digest(whole)")
    assert kernel.value(f"len({PANEL}.completions['updates'])") == "15"


def test_a_page_receives_heartbeats_while_a_cell_blocks_the_kernel(kernel, tiny_folder):
    kernel.run(cell(tiny_folder, "a", 100, "--paused"))
    blocking = kernel.client.execute("import time; time.sleep(8); print('slept')")
    beats = 0
    while True:
        message = kernel.client.get_iopub_msg(timeout=30)
        content = message["content"]
        if message["msg_type"] == "stream" and message["parent_header"].get("msg_id") == blocking:
            break
        beats += message["msg_type"] == "comm_msg" and content["data"].get("content", {}).get("kind") == "beat"
    assert beats >= 2


def test_a_kernel_that_is_shut_down_leaves_an_exact_checkpoint(kernel, tiny_folder, tmp_path):
    body = cell(tiny_folder, "a", 5000).replace("steps_per_eval: 20", "steps_per_eval: -1\nsave_every: -1")
    kernel.run(body)
    kernel.wait_for("a.step_count > 10", "True")
    seen = int(kernel.value("a.step_count"))
    kernel.manager.shutdown_kernel(now=False)
    (info,) = CheckpointStore(tmp_path / "adapters" / "a" / "checkpoints").list()
    assert info.kind in ("exit", "pause")  # jupyter interrupts a kernel before it asks it to end
    assert info.step >= seen
    resumed = Run.resume(tmp_path / "adapters" / "a", data=tiny_rows(40))
    whole = Run(resumed.config.replace(adapter_path=str(tmp_path / "whole"), data=tiny_rows(40)))
    whole.run(until=info.step)
    assert resumed.adapter_bytes() == whole.adapter_bytes()
    assert resumed.history["loss"] == whole.history["loss"]


@pytest.mark.parametrize(
    "code", ["from transformers import AutoTokenizer", "import mlx_lm", "a.tokenizer.eos_token", "%finetune row 1"]
)
def test_another_cell_may_use_what_a_run_is_just_importing(tmp_path, tiny_folder, code):
    kernel = Kernel(tmp_path)
    try:
        rows = f"rows = {tiny_rows(12)!r}\nimport sys; print('transformers' in sys.modules)"
        assert kernel.run(f"%load_ext mlx_nb\n{rows}") == ("ok", "False\n")
        kernel.run(cell(tiny_folder, "a", 20, "--background"))
        for _ in range(10):  # at some moments of its loading
            status, text = kernel.run(code)
            assert status == "ok", text
            time.sleep(0.05)
        assert kernel.run("_ = await a")[0] == "ok"
        assert kernel.value("a.state") == "finished"
    finally:
        kernel.close()
