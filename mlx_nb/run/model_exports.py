"""Exports the model of a run with its adapter, to the folders that a person names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mlx_nb.files.places import folder_of, refuse_among_files, working_folder
from mlx_nb.files.run_folder import RunFolder
from mlx_nb.run.inputs import RunInputs

if TYPE_CHECKING:
    from mlx_nb.export.fuse import FuseInputs
    from mlx_nb.export.fuse_report import FuseReport
    from mlx_nb.train.trainer import Trainer


class ExportedRun(Protocol):
    """The interface of a run that exports need."""

    name: str
    inputs: RunInputs

    @property
    def folder(self) -> Path:
        """Where its adapters are saved."""

    @property
    def home(self) -> RunFolder:
        """Its folder, with the lock and the list of written files."""

    @property
    def trainer(self) -> Trainer:
        """Its trainer."""


def fuse(run: ExportedRun, path: str | Path | None, precision: str | None) -> FuseReport:
    """Fuse the adapter of a run with its base, and write the model to `path`, if given."""
    from mlx_nb.export.fuse import fuse as fuse_model

    return fuse_model(_inputs(run), None if path is None else _place(run, path), precision)


def _inputs(run: ExportedRun) -> FuseInputs:
    from mlx_nb.export.fuse import FuseInputs

    trainer = run.trainer
    trainer.stepper.trainable()  # undoes the user's freezing, or raises ModelChanged
    return FuseInputs(trainer, run.inputs.loaded, run.inputs.reference, run.home.run_id, run.name)


def _place(run: ExportedRun, path: str | Path) -> Path:
    place = folder_of(str(path), working_folder())
    refuse_among_files(place, run.folder)
    return place
