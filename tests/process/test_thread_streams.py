"""mlx's streams of a thread end with the thread, so that the process ends as it should."""

from __future__ import annotations

import subprocess
import sys
import threading

import mlx.core as mx
import pytest

from mlx_nb.process.pieces import finished, on_thread
from runs import rows_run


@pytest.fixture
def ended(monkeypatch):
    """The identifiers of the threads whose streams were destroyed."""
    threads = []
    destroy = mx.clear_streams

    def clear_streams():
        threads.append(threading.get_ident())
        destroy()

    monkeypatch.setattr(mx, "clear_streams", clear_streams)
    return threads


def test_the_streams_of_a_thread_that_uses_a_run_end_with_it_once(tmp_path, tiny_folder, ended):
    run = rows_run(tmp_path, tiny_folder)
    run.step()
    answer = run.generate("say red", max_tokens=2)
    answers = []
    ended.clear()
    thread = threading.Thread(target=lambda: answers.extend(run.generate("say red", max_tokens=2) for _ in range(3)))
    thread.start()
    thread.join()
    assert answers == [answer] * 3
    assert ended == [thread.ident]
    assert run.generate("say red", max_tokens=2) == answer  # those of this thread are there


def test_the_streams_of_work_on_a_thread_end_with_it(ended):
    finished(on_thread(lambda: mx.arange(3).sum().item()))
    assert len(ended) == 1


COMPUTED_ON_A_THREAD = """
import mlx.core as mx
from mlx_nb.process.pieces import finished, on_thread

def work():
    x = mx.random.normal((64, 64))
    for _ in range(20):
        x = x @ x / 8
        mx.eval(x)
    mx.synchronize()

work()
finished(on_thread(work))
"""


@pytest.mark.long
def test_a_process_whose_thread_has_computed_ends_with_status_0():
    """Without the end of its streams more than half of them abort: status 134."""
    command = [sys.executable, "-c", COMPUTED_ON_A_THREAD]
    assert [subprocess.run(command, capture_output=True).returncode for _ in range(8)] == [0] * 8
