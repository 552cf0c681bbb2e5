"""Ends of the process at random moments, SIGTERM and restarts of real kernels: they lose the update in hand at most."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from fault_count import part_of
from kernels import SETUP, Kernel
from killed import read_line
from lives import KINDS, NAP_SECONDS, namespace_of, register_napping, settings_of
from mlx_nb import Run
from mlx_nb.config.methods import METHODS
from mlx_nb.run.resume_checks import history_of
from mlx_nb.train.checkpoint_store import CheckpointStore
from places import SUPPORT

pytestmark = pytest.mark.faults

SIGTERMS_OF_A_KIND = part_of(13)  # 104 in all


def updates_noted(log):
    """(update, when) of the life that ended last, in order."""
    lines = [line.split() for line in Path(log).read_text().splitlines()]
    begun = max(index for index, line in enumerate(lines) if line[0] == "resumed")
    return [(int(step), float(at)) for _, step, at in lines[begun + 1 :]]


def saved_of(folder):
    """The checkpoint that a resume would take, which has to be the newest."""
    checkpoint, messages = CheckpointStore(Path(folder) / "checkpoints").load()
    assert messages == []
    return checkpoint


def assert_as_if_never_ended(folder, kind, model, whole):
    saved = saved_of(folder)
    untouched = Run.from_yaml(f"{settings_of(kind, model)}\nadapter_path: {whole}", namespace=namespace_of(kind))
    untouched.run(until=saved.step)
    data = namespace_of(kind)["rows"]
    resumed = Run.resume(folder, data=data, namespace=namespace_of(kind))
    assert resumed.step_count == saved.step
    assert resumed.adapter_bytes() == untouched.adapter_bytes()
    assert history_of(saved)["loss"] == untouched.history["loss"]
    for run in (resumed, untouched):
        run.step(2)
    assert resumed.adapter_bytes() == untouched.adapter_bytes()


# Scripts: a server that has imported everything forks one child for each life of a run.
SERVER = """
import atexit, os, sys
sys.path.insert(0, {tests!r})
from mlx_nb.model.backend import prepare_backend
prepare_backend()
import mlx_lm, transformers
import mlx_nb.model.shared_base, mlx_nb.train.trainer, mlx_nb.rollouts.generation
from mlx_lm.models import llama
from lives import live
for kind in sys.stdin:
    child = os.fork()
    if child == 0:
        code = 0
        try:
            live(kind.strip(), {folder!r}, {model!r})
        except SystemExit as ended:
            code = ended.code
        atexit._run_exitfuncs()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_sigterms_at_random_moments_lose_no_finished_update(tmp_path, tiny_folder):
    chance = random.Random(0)
    code = SERVER.format(tests=str(SUPPORT), folder=str(tmp_path), model=str(tiny_folder))
    server = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    sent = 0
    try:
        for kind in KINDS:
            log = tmp_path / f"{kind}.log"
            log.touch()
            for _ in range(SIGTERMS_OF_A_KIND):
                lives = log.read_text().count("resumed")
                server.stdin.write(f"{kind}\n")
                server.stdin.flush()
                child = int(read_line(server, 120))
                while log.read_text().count("resumed") == lives:
                    time.sleep(0.005)
                time.sleep(chance.uniform(0.0, 0.3))
                os.kill(child, signal.SIGTERM)
                assert read_line(server, 60) == str(128 + signal.SIGTERM)
                sent += 1
                if done := updates_noted(log):
                    assert saved_of(tmp_path / kind).step == done[-1][0], kind
    finally:
        server.kill()
        server.wait()
    for kind in KINDS:
        assert_as_if_never_ended(tmp_path / kind, kind, tiny_folder, tmp_path / f"{kind}-whole")
    print(f"{sent} SIGTERMs, {sum(saved_of(tmp_path / kind).step for kind in KINDS)} updates, none lost")


# Real kernels


class Track(NamedTuple):
    """What one kernel trains, how it is moved, and how its lives end."""

    kind: str
    move: str
    ends: tuple[str, ...]


RESTART, KILL, SIGTERM = "restart", "restart now", "SIGTERM"  # with 5 s to end, with none, and without a restart
QUICK = (RESTART, KILL, SIGTERM, RESTART, RESTART, KILL, SIGTERM)
TRACKS = (
    Track("lora", "--background", QUICK),
    Track("full", "--wait", QUICK),
    Track("kto", "--background", QUICK),
    Track("grpo", "--wait", QUICK),
    Track("napping", "--background", (RESTART, KILL, RESTART)),
    Track("napping", "--wait", (RESTART, KILL, SIGTERM)),
    Track("napping", "--wait", (KILL, RESTART, RESTART)),
    Track("napping", "--background", (RESTART, KILL, SIGTERM)),
)
AUTOSAVE_SECONDS = 0.3  # of quick updates; those that nap are saved by what a save costs


class Lives(threading.Thread):
    """The lives of one kernel. `lost` holds, for each end, what was done and is not saved: updates and seconds."""

    def __init__(self, number, track, folder, model):
        super().__init__()
        self.track, self.folder, self.model = track, folder, model
        self.chance = random.Random(number)
        self.napping = track.kind == "napping"
        self.lost, self.error = [], None
        self.log = str(folder / "log")

    def run(self):
        try:
            kernel, ends = Kernel(self.folder), self.track.ends[: part_of(len(self.track.ends))]
            try:
                for number, end in enumerate(ends, start=1):
                    self.live(kernel)
                    at = self.end(kernel, end, last=number == len(ends))
                    self.lost.append((end, *self.missing(at)))
            finally:
                kernel.close()
        except BaseException as error:
            self.error = error

    def live(self, kernel):
        """Load, resume or begin, train, and come to a random moment of an update."""
        autosave = "" if self.napping else f"\nautosave_minutes: {AUTOSAVE_SECONDS / 60}"
        cells = [
            SETUP.format(tests=str(SUPPORT)),
            f"from lives import *\nos.environ['NAP'] = '{NAP_SECONDS if self.napping else 0}'\nregister_napping()\n"
            f"globals().update(namespace_of({self.track.kind!r}))",
            f"%%finetune -o run --paused --resume\n{settings_of(self.track.kind, self.model)}{autosave}",
            f"_ = run.trainer\nnoted(run, {self.log!r})",
        ]
        for cell in cells:
            status, text = kernel.run(cell)
            assert status == "ok", text
        kernel.client.execute(f"%finetune run {self.track.move}")
        deadline = time.monotonic() + 180
        while not updates_noted(self.log):
            assert time.monotonic() < deadline, "no update"
            time.sleep(0.02)
        # A kill waits for the save after an update, which takes a moment on a busy machine.
        time.sleep(self.chance.uniform(1.0, NAP_SECONDS - 1.0) if self.napping else self.chance.uniform(0.0, 1.0))

    def end(self, kernel, end, last):
        """End the process, and have another kernel for the next life. Returns when the end began."""
        at = time.time()
        kernel.client.stop_channels()
        if end == SIGTERM:
            kernel.manager.signal_kernel(signal.SIGTERM)
            while kernel.manager.is_alive():
                assert time.time() - at < 2 * NAP_SECONDS + 10, "it goes on"
                time.sleep(0.02)
            if last:
                return at
        kernel.manager.restart_kernel(now=end != RESTART)
        if last:
            return at
        kernel.client = kernel.manager.client()
        kernel.client.start_channels()
        kernel.client.wait_for_ready(timeout=180)
        return at

    def missing(self, at):
        """Updates that were done and are not saved, and for how many seconds that had been so when the end began."""
        store = CheckpointStore(self.folder / "adapters" / "run" / "checkpoints")
        saved = saved_of(store.folder.parent).step if store.list() else 0
        missing = [when for step, when in updates_noted(self.log) if step > saved]
        return len(missing), max(0.0, at - missing[0]) if missing else 0.0


def test_the_end_of_a_real_kernel_loses_at_most_the_current_update(tmp_path, tiny_folder, request):
    kernels = []
    for number, track in enumerate(TRACKS):
        (tmp_path / str(number)).mkdir()
        kernels.append(Lives(number, track, tmp_path / str(number), tiny_folder))
    for kernel in kernels:
        kernel.start()
    for kernel in kernels:
        kernel.join()
    ends = [(kernel.track.kind, *lost) for kernel in kernels for lost in kernel.lost]
    print(*ends, sep="\n")
    assert [kernel.error for kernel in kernels] == [None] * len(TRACKS)
    for kind, end, updates, seconds in ends:
        if end == KILL and kind != "napping":
            assert seconds < AUTOSAVE_SECONDS + 1.0  # which a save and an update take on a busy machine
        else:
            assert updates == 0, (kind, end)
    register_napping()
    request.addfinalizer(lambda: METHODS.pop("napping"))
    for number, track in enumerate(TRACKS):
        folder = tmp_path / str(number) / "adapters" / "run"
        assert_as_if_never_ended(folder, track.kind, tiny_folder, tmp_path / f"whole-{number}")
