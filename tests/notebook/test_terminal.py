"""IPython in a terminal, and a console on a kernel: a line of progress, the result at its end, curves in characters."""

from __future__ import annotations

import os
import re
import sys

import pexpect
import pytest

from kernels import SETUP, Kernel
from mlx_nb.notebook.driver import _fitting
from places import SUPPORT

pytestmark = pytest.mark.kernel
CLEAR = "\r\x1b[K"


def test_a_terminal_shows_one_line_of_progress_the_result_and_the_curve(tmp_path, tiny_folder):
    home = tmp_path / "home"
    home.mkdir()
    shell = pexpect.spawn(
        sys.executable,
        ["-m", "IPython", "--simple-prompt", "--no-banner", "--no-confirm-exit"],
        env={**os.environ, "IPYTHONDIR": str(home)},
        cwd=str(tmp_path),
        encoding="utf-8",
        timeout=180,
        dimensions=(40, 80),
    )

    def answer(number, line):
        shell.expect_exact(f"In [{number}]: ")
        shell.sendline(line)
        shell.expect_exact(f"In [{number + 1}]: ")
        shown, shell.buffer = shell.before, f"In [{number + 1}]: "
        return shown

    answer(1, f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); from tiny import tiny_rows; bees = tiny_rows()")
    answer(2, "%load_ext mlx_nb")
    body = f"model: {tiny_folder}\\ndata: bees\\niters: 12\\nsteps_per_eval: 6\\nlearning_rate: 1e-2"
    trained = answer(3, f"get_ipython().run_cell_magic('finetune', '-o run', '{body}')")
    moving = [one.split("\r\n")[0] for one in trained.split(CLEAR)]
    assert any(re.search(r"update \d+ of 12  ·  loss .* (left|s)$", one) for one in moving), trained
    assert all(len(one) < 80 for one in moving if one.startswith("run  ·  ")), trained
    stays = "\n".join(one.split(CLEAR)[-1] for one in trained.split("\r\n"))
    assert "update 6: valid loss" in stays
    assert "run  ·  " not in stays
    assert "best validation" in stays[stays.index("run: finished after update 12") :]
    plot = answer(4, "%finetune plot")
    assert "o validation" in plot
    assert re.search("[\u2801-\u28ff]", plot)
    panel = answer(5, "%finetune panel")
    assert panel.count("run: finished") == 1
    assert "run: finished" not in answer(6, "%finetune eval")
    assert "│ <|user|>" in answer(7, "%finetune browse")
    assert answer(8, "%finetune report").strip().endswith("report.html")
    shell.sendline("exit")
    shell.close()


def test_a_console_on_a_kernel_trains_in_the_foreground_and_shows_the_answer(tmp_path, tiny_folder):
    kernel = Kernel(tmp_path)
    try:
        kernel.client.session.metadata = {}  # of a console: its requests are of no cell
        kernel.run(SETUP.format(tests=str(SUPPORT)))
        body = f"%%finetune -o run\nmodel: {tiny_folder}\ndata: rows\niters: 6\nlearning_rate: 1e-2"
        status, text = kernel.run(body)
        assert status == "ok", text
        assert "run: finished after update 6" in text
        assert "the result appears here" not in text
        answered = kernel.run("%finetune generate --max-tokens 3 say red")[1]
        assert "answers" not in answered
        assert answered == kernel.value("run.generate('say red', max_tokens=3)") or answered.strip()
        for plot in ("%finetune plot", "run.plot()"):
            (bundle,) = kernel.bundles(plot)
            assert set(bundle) == {"text/plain"}, plot
            assert "o validation" in bundle["text/plain"]
        kernel.client.session.metadata = {"cellId": "cell"}
        assert set(kernel.bundles("run.plot()")[0]) == {"text/plain", "image/png"}
        kernel.client.session.metadata = {}
        begun = kernel.run(body.replace("%%finetune", "%%finetune --background --name later"))[1]
        assert "later trains in the background" in begun
        assert "no update done yet" not in begun
        kernel.run("await run")
        assert kernel.value("run.finished") == "True"
    finally:
        kernel.close()


def test_a_cell_waits_for_its_run_where_config_finetune_says_so(tmp_path, tiny_folder):
    kernel = Kernel(tmp_path)
    try:
        kernel.run(SETUP.format(tests=str(SUPPORT)))
        body = f"%%finetune -o run\nmodel: {tiny_folder}\ndata: rows\niters: 200"
        kernel.run(body)
        assert kernel.value("run.finished") == "False"
        kernel.run("%finetune stop")
        kernel.run("%config Finetune.wait = True")
        kernel.run(body.replace("200", "6"))
        assert kernel.value("run.finished") == "True"
    finally:
        kernel.close()


def test_a_line_that_is_too_long_loses_its_middle_and_keeps_the_time_left():
    line = "run  ·  update 3 of 9  ·  loss 1.234  ·  812 tokens/s  ·  memory 1.2 GB  ·  0:12 left"
    assert _fitting(line, 100) == line
    assert _fitting(line, 60) == "run  ·  update 3 of 9  ·  loss 1.234  ·  0:12 left"
    assert _fitting("x" * 30, 10) == f"{'x' * 9}…"
