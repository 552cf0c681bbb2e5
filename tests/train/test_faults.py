"""Interrupts and kills at random moments: what comes out is what an untouched run gives, to the bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from queue import Empty

import pytest

from fault_count import part_of
from kernels import SETUP, Kernel
from killed import AUTOSAVE_SECONDS, DIGEST, new_run, read_line
from lives import KINDS
from mlx_nb import Run
from mlx_nb.notebook.interrupt_display import LINE
from mlx_nb.run.resume_checks import history_of
from mlx_nb.train.checkpoint_store import CheckpointStore
from places import SUPPORT
from tiny import tiny_rows

pytestmark = pytest.mark.faults

KILLS = part_of(110)
UNCHANGED = re.compile(r"%finetune run was interrupted; \w+ is unchanged, paused at update (?P<update>\d+)\.")


# Slow enough that interrupts strike inside the reward too.
REWARD = """
import time
def e_share(completion):
    time.sleep(0.0005)
    return completion.count("e") / (1 + len(completion))
"""


def cell(tiny_folder, name, kind):
    return (
        f"%%finetune --name {name} -o {name} --paused\nmodel: {tiny_folder}\ndata: rows\n"
        f"iters: {KINDS[kind].iters}\n{KINDS[kind].settings}\n"
        "learning_rate: 5e-3\ngrad_accumulation_steps: 2\nsteps_per_eval: 7\nsave_every: 3\nloss_spike: null"
    )


class Interrupter:
    """Sends SIGINT to the kernel some time after a cell began, once or twice."""

    def __init__(self, kernel, chance):
        self.kernel, self.chance, self.sent = kernel, chance, 0

    def __call__(self, code, longest):
        """Run a cell under fire. Returns (status, text, whether a signal was sent while it ran)."""
        moments = [self.chance.uniform(0, longest)]
        if self.chance.random() < 0.3:
            moments.append(moments[0] + self.chance.uniform(0, 0.02))
        done, hit = threading.Event(), []
        started = threading.Event()

        def fire():
            started.wait(30)
            begin = time.monotonic()
            for moment in moments:
                if done.wait(max(0.0, begin + moment - time.monotonic())):
                    return
                self.kernel.manager.interrupt_kernel()
                hit.append(moment)

        thread = threading.Thread(target=fire)
        thread.start()
        message = self.kernel.client.execute(code)
        text, status = "", None
        while True:
            reply = self.kernel.client.get_iopub_msg(timeout=120)
            if reply["parent_header"].get("msg_id") != message:
                continue
            content = reply["content"]
            if reply["msg_type"] == "execute_input":
                started.set()
            text += content.get("text") or content.get("evalue", "") or "".join(content.get("traceback", []))
            if reply["msg_type"] == "status" and content["execution_state"] == "idle":
                break
        done.set()
        thread.join()
        try:
            reply = self.kernel.client.get_shell_msg(timeout=5)
            while reply["parent_header"].get("msg_id") != message:
                reply = self.kernel.client.get_shell_msg(timeout=5)
            status = reply["content"]["status"]
        except Empty:  # it struck ipykernel itself after the cell, which then sends no reply
            status = "no reply"
        self.sent += len(hit)
        if status == "no reply":
            self._settle()
        return status, text, bool(hit)

    def _settle(self):
        """Ask the kernel something whose answer may be spoiled.

        An interrupt that strikes ipykernel while it sends a reply leaves the first parts of it behind. ZeroMQ takes the
        next reply for the rest of that message, which then has a wrong signature.
        """
        try:
            self.kernel.value("0")
        except ValueError as torn:
            if "Invalid Signature" not in str(torn):
                raise
        assert self.kernel.value("0") == "0"


@pytest.mark.parametrize("kind", KINDS)
def test_interrupts_at_random_moments_change_nothing(tmp_path, tiny_folder, request, kind):
    chance = random.Random(kind)
    kernel = Kernel(tmp_path)
    try:
        kernel.run(SETUP.format(tests=str(SUPPORT)))
        kernel.run(DIGEST)
        kernel.run(f"from tiny import *\nrows = {KINDS[kind].rows}(40)")
        kernel.run(REWARD)
        kernel.run(cell(tiny_folder, "whole", kind))
        kernel.run("whole.run()")
        expected = kernel.value("digest(whole)")
        fire, wanted = Interrupter(kernel, chance), part_of(KINDS[kind].interrupts)
        number, outside, pauses, lines, given_up = 0, 0, 0, 0, 0
        while fire.sent - outside < wanted:
            name = f"{kind}{number}"
            kernel.run(cell(tiny_folder, name, kind))
            while kernel.value(f"{name}.finished") != "True":
                enough, before = fire.sent - outside >= wanted, fire.sent
                status, text, _ = fire("%finetune run --wait", 1e9 if enough else chance.choice([0.01, 0.05, 0.3]))
                pauses += "Pausing after" in text
                if "Nothing has changed; `%finetune run` loads again" in text:  # two while it was loading
                    given_up += 1
                elif LINE in text:  # before it moved, or after
                    lines += 1
                elif unchanged := UNCHANGED.search(text):  # before it moved
                    lines += 1
                    assert kernel.value(f"{name}.step_count") == unchanged["update"], text
                elif status != "ok":
                    # Before the magic is entered, or after it has ended, the signal is IPython's to answer. How many
                    # strike there is a matter of how busy the machine is, so others are sent in their place.
                    assert status == "no reply" or "KeyboardInterrupt" in text
                    assert "mlx_nb/" not in text, text
                    outside += fire.sent - before
            assert kernel.value(f"digest({name})") == expected, name
            kernel.run(f"del {name}")
            number += 1
        print(
            f"{kind}: {fire.sent} interrupts, {pauses} pauses, {number} runs; {given_up} gave up loading, {lines} were "
            f"answered by a line, {outside} by IPython itself"
        )
        assert fire.sent - outside >= wanted
        assert pauses >= wanted // 4
    finally:
        kernel.close()


# A server that has imported everything forks one child for each life of the run: its death is as real as any.
SERVER = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
from mlx_nb.model.backend import prepare_backend
prepare_backend()
import mlx_lm, transformers
import mlx_nb.model.shared_base, mlx_nb.train.trainer, mlx_nb.rollouts.generation
from mlx_lm.models import llama
from killed import killable_run
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        killable_run({folder!r}, {model!r})
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


def test_kills_at_random_moments_lose_at_most_the_autosave_interval(tmp_path, tiny_folder):
    chance = random.Random(0)
    code = SERVER.format(tests=str(SUPPORT), folder=str(tmp_path), model=str(tiny_folder))
    (tmp_path / "log").write_text("")
    server = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    lost, kills, torn, seen = [], 0, 0, 0
    try:
        while kills < KILLS:
            server.stdin.write("go\n")
            server.stdin.flush()
            child = int(read_line(server, 120))
            # One in four dies while it loads, however long that takes here, and the others while they train.
            awaited = "resumed" if chance.random() < 0.25 else "StepCompleted"
            while not any(line.startswith(awaited) for line in (tmp_path / "log").read_text().splitlines()[seen:]):
                time.sleep(0.01)
            time.sleep(chance.uniform(0.0, 0.4))
            killed_at = time.monotonic()
            os.kill(child, signal.SIGKILL)
            assert read_line(server, 30) == "dead"
            kills += 1
            log = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
            life, seen = log[seen:], len(log)
            store = CheckpointStore(tmp_path / "adapter" / "checkpoints")
            torn += any((tmp_path / "adapter" / "checkpoints").glob(".tmp-*"))
            if not store.list():
                continue
            checkpoint, messages = store.load()
            assert not messages, messages
            # What was done but is not in the checkpoint: from the first such update on, which follows the save at once,
            # all but the last are within the interval. The process may have died during the save that the last makes
            # due. However slow the machine is, that holds.
            after = [float(at) for kind, step, at in life if kind == "StepCompleted" and int(step) > checkpoint.step]
            if after:
                lost.append(killed_at - min(after))
                assert all(at < after[0] + AUTOSAVE_SECONDS for at in after[:-1]), (checkpoint.step, life[-8:])
    finally:
        server.kill()
        server.wait()
    last, _ = CheckpointStore(tmp_path / "adapter" / "checkpoints").load()
    whole = new_run(tmp_path / "whole", tiny_folder)
    whole.run(until=last.step)
    resumed = Run.resume(tmp_path / "adapter", data=tiny_rows(40))
    assert resumed.adapter_bytes() == whole.adapter_bytes()
    assert history_of(last)["loss"] == whole.history["loss"]
    digest = hashlib.sha256(json.dumps(whole.history["loss"]).encode()).hexdigest()[:12]
    print(
        f"{kills} kills, {torn} in the middle of a save, {last.step} updates, losses {digest}, lost {max(lost):.3f} s"
    )
