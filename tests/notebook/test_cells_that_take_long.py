"""Cells whose work takes a while, in a real kernel: each says at once what it does, and what came of it in the end."""

from __future__ import annotations

import threading
import time
from itertools import pairwise

import pytest

from kernels import SETUP, Kernel
from places import SUPPORT

pytestmark = pytest.mark.kernel

OPEN = "a.panel()._on_message(None, {'do': 'open'}, None)"  # as a page does that shows it
SLOW_TOKENS = """import time, mlx_nb.rollouts.sampling as sampling
draw = sampling.draw_tokens
def slow(*told):
    time.sleep(0.25)
    return draw(*told)
sampling.draw_tokens = slow"""


@pytest.fixture
def kernel(tmp_path, tiny_folder, request):
    kernel = Kernel(tmp_path)
    status, text = kernel.run(SETUP.format(tests=str(SUPPORT)))
    assert status == "ok", text
    settings = f"model: {tiny_folder}\ndata: rows\niters: 4000\nsteps_per_eval: -1\nloss_spike: null"
    kernel.run(f"%%finetune --name a -o a --paused\n{settings}")
    yield kernel
    kernel.close()


def pieces_of(kernel, code, after=lambda pieces: None):
    """(status, what the cell showed piece by piece, each with the seconds until it came)."""
    pieces, begun = [], time.monotonic()

    def take(piece):
        if piece:
            pieces.append((round(time.monotonic() - begun, 2), piece))
            after(pieces)

    status, text = kernel.run(code, on_output=take)
    return status, pieces, text


def test_an_answer_grows_in_its_cell_and_is_its_result(kernel):
    kernel.run("a.step()")
    kernel.run(SLOW_TOKENS)
    for base in ("", "--base "):
        status, pieces, _ = pieces_of(kernel, f"%finetune generate say red {base}--max-tokens 8")
        shown = [piece for _, piece in pieces]
        assert status == "ok"
        assert shown[0].endswith("generates …")
        assert pieces[0][0] < 0.5
        assert len(shown) > 3, shown
        grown = [piece.removesuffix("▍") for piece in shown[1:]]
        assert all(later.startswith(earlier) for earlier, later in pairwise(grown))
        assert kernel.value("repr(str(_))") == repr(grown[-1])
        asked = f"max_tokens=8, base={bool(base)}"
        assert repr(grown[-1]) == kernel.value(f"repr(a.generate('say red', {asked}))")


def test_an_interrupt_ends_an_answer_and_speaks_of_nothing_else(kernel):
    kernel.run("a.step()")
    kernel.run(SLOW_TOKENS)
    threading.Timer(1.5, kernel.manager.interrupt_kernel).start()
    status, pieces, text = pieces_of(kernel, "%finetune generate say red --max-tokens 200")
    assert status == "error"
    assert text.endswith("%finetune generate was interrupted; a is unchanged, paused at update 1.")
    assert "continues" not in text
    assert pieces[-1][0] < 5


@pytest.mark.parametrize("command", ["run 30 --wait", "step 30"])
def test_a_cell_whose_panel_is_elsewhere_says_how_far_the_run_is_and_what_came_of_it(kernel, command):
    kernel.run("%finetune panel")
    kernel.run(OPEN)
    status, pieces, _ = pieces_of(kernel, f"%finetune {command}")
    shown = [piece for _, piece in pieces]
    assert status == "ok"
    assert pieces[0][0] < 0.5
    assert shown[0].startswith("a  ·  loading")
    assert any("update 30: loss" in piece for piece in shown), shown
    kernel.run("import time; listener = a.listen(lambda event: time.sleep(0.1))")
    status, pieces, _ = pieces_of(kernel, f"%finetune {command}")
    assert any(" of 4000  ·  loss" in piece for _, piece in pieces), pieces


def test_a_run_in_the_background_says_in_its_cell_how_far_it_is(kernel):
    kernel.run("%finetune panel")
    kernel.run(OPEN)
    status, first = kernel.run("%finetune run 30 --background")
    assert (status, first) == ("ok", "a  ·  loading model and rows")
    later = []
    deadline = time.monotonic() + 60
    while not any("is paused at update 30" in text for text in later) and time.monotonic() < deadline:
        message = kernel.client.get_iopub_msg(timeout=60)
        if message["msg_type"] == "update_display_data":
            later.append(message["content"]["data"].get("text/plain", ""))
    assert any("is paused at update 30" in text for text in later), later
