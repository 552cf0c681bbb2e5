"""A process that ends while a run is alive says nothing about itself: what is to be saved is saved before."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mlx_nb.train.checkpoint_store import CheckpointStore
from places import SUPPORT

START = """
import sys, threading, asyncio, gc
sys.path.insert(0, {support!r})
from mlx_nb.model.backend import prepare_backend
prepare_backend()
from mlx_nb import Run, RunConfig
from tiny import tiny_rows
values = dict(model={model!r}, data=tiny_rows(), iters=100000, batch_size=2, val_set_size=0, save_every=-1,
              lora_parameters=dict(rank=2), adapter_path={folder!r}, autosave_minutes=None)
run = Run(RunConfig.from_dict(values))
"""
ENDS = {
    "sys.exit": "run.step(3)\nsys.exit(0)",
    "the end of the script": "run.step(3)",
    "an exception": "run.step(3)\nraise ValueError('mine')",
    "a generator that was not closed": "events = run.events()\nwhile run.step_count < 3: next(events)",
    "a generator in a circle": "class Node: pass\nnode = Node(); node.self = node; node.events = run.events()\n"
    "while run.step_count < 3: next(node.events)\ndel node",
    "a run in a circle": "run.step(3)\nrun.me = [run]\nrun.listen(lambda event: run)",
    "a run that only a module holds": "run.step(3)\nimport mlx_nb.errors as there\nthere.run = run\ndel run",
    "a daemon thread": "import time\nthread = threading.Thread(target=run.run, daemon=True)\nthread.start()\n"
    "while run.step_count < 3: time.sleep(0.01)",
    "a run in the background": "async def main():\n    run.start()\n"
    "    while run.step_count < 3: await asyncio.sleep(0.01)\nasyncio.run(main())",
    "a run that nothing was asked of": "run.splits",
    "a run that could not be saved": "import shutil\nrun.step(3)\nshutil.rmtree(run.folder)\nrun.folder.write_text('')",
    "updates after the last save of all": "import atexit\nfrom mlx_nb.process import exits\n"
    "atexit.unregister(exits.save_all)\nrun.step(3)",
}
SAVED = {end for end in ENDS if end not in ("a run that nothing was asked of", "a run that could not be saved")}
SAVED -= {"updates after the last save of all"}


@pytest.mark.long
@pytest.mark.parametrize("end", ENDS)
def test_the_end_of_a_process_is_quiet_and_what_was_done_is_saved(end, tmp_path, tiny_folder):
    code = START.format(support=str(SUPPORT), model=str(tiny_folder), folder=str(tmp_path / "a")) + ENDS[end]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    said = [line for line in done.stderr.splitlines() if "Warning" not in line]
    for word in ("NameError", "Exception ignored", "ImportError", "is not defined", "NoneType"):
        assert word not in done.stderr, done.stderr
    assert done.returncode == (1 if end == "an exception" else 0), done.stderr
    if end not in ("an exception", "a run that could not be saved"):
        assert not any("Traceback" in line for line in said), done.stderr
    if end in SAVED:
        assert CheckpointStore(tmp_path / "a" / "checkpoints").load()[0].step >= 3
