"""A process that trains a run in a folder and may be killed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mlx_nb import Run, RunConfig
from mlx_nb.errors import CheckpointError, FolderTaken
from mlx_nb.events import RunFinished
from mlx_nb.train.checkpoint_store import CheckpointStore
from tiny import tiny_rows


def make(tiny_folder, name="run", **settings):
    values = {"model": str(tiny_folder), "data": tiny_rows(), "iters": 4, "batch_size": 4, "val_set_size": 4}
    return Run(RunConfig.from_dict({**values, "steps_per_eval": 2, "save_every": 2, **settings}), name=name)


def note(words):
    with open("log", "a") as log:
        log.write(f"{words}\n")


def seeds_in(folder):
    """The seeds of the runs whose checkpoints are in a folder."""
    saved = CheckpointStore(folder / "checkpoints").list()
    return {json.loads((info.path / "state.json").read_text())["config"]["seed"] for info in saved}


def life(model, seed):
    """Resume the unfinished run of this seed, or start one with the default name; record how it ended."""
    try:
        mine = [folder for folder in sorted(Path("adapters").glob("run*")) if seeds_in(folder) == {seed}]
        runs = [Run.resume(folder, data=tiny_rows()) for folder in mine]
        run = next((run for run in runs if not run.finished), None)
        if run is None:
            run = make(model, seed=seed, iters=25, autosave_minutes=1e-9, keep_previous=None)
        else:
            note(f"{'resumed' if run.config.seed == seed else 'foreign'} {seed} {run.step_count}")
        if isinstance(run.run(), RunFinished):
            note(f"finished {seed} {hashlib.sha256((run.folder / 'adapters.safetensors').read_bytes()).hexdigest()}")
    except FolderTaken as error:
        note(f"refused {seed} {error}")
    except (FileNotFoundError, CheckpointError) as error:  # the run was being moved aside just then
        note(f"later {seed} {error}")
