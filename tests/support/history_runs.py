"""Runs for tests of the history file."""

from __future__ import annotations

from mlx_nb import Run, RunConfig
from tiny import tiny_rows

SETTINGS = {"iters": 12, "batch_size": 2, "val_set_size": 0, "save_every": -1, "keep": 3}


def new_run(folder, tiny_folder, **settings):
    values = {**SETTINGS, "model": str(tiny_folder), "data": tiny_rows(), "adapter_path": str(folder), **settings}
    return Run(RunConfig.from_dict(values))


def resume(folder, **options):
    return Run.resume(folder, data=tiny_rows(), **options)
