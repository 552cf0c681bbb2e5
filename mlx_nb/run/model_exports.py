"""Exports the model of a run with its adapter, to the folders that the user names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import CommandError, FolderTaken
from mlx_nb.files.places import folder_of, refuse_among_files, same_folder, working_folder
from mlx_nb.files.run_folder import RunFolder
from mlx_nb.run.inputs import RunInputs

if TYPE_CHECKING:
    from mlx_nb.export.fuse import FuseInputs
    from mlx_nb.export.fuse_report import FuseReport
    from mlx_nb.export.gguf import GgufExport
    from mlx_nb.model.loading import LoadedModel
    from mlx_nb.train.trainer import Trainer


class ExportedRun(Protocol):
    """The interface of a run that exports need."""

    name: str
    inputs: RunInputs

    @property
    def home(self) -> RunFolder:
        """Its folder, with the lock and the list of written files."""

    @property
    def trainer(self) -> Trainer:
        """Its trainer."""


def inputs_of_run(run: ExportedRun) -> FuseInputs:
    """What is exported of a run: its live model."""
    from mlx_nb.export.fuse import FuseInputs

    trainer = run.trainer
    trainer.stepper.trainable()  # undoes the user's freezing, or raises ModelChanged
    valid, reference = trainer.examples.valid, run.inputs.reference
    return FuseInputs(
        trainer.model, trainer.config, run.inputs.loaded, run.home.run_id, run.name, valid=valid, reference=reference
    )


def inputs_of_saved(config: RunConfig, loaded: LoadedModel, name: str) -> FuseInputs:
    """What is exported of a model with a saved adapter, which has no rows."""
    from mlx_nb.export.fuse import FuseInputs

    return FuseInputs(loaded.model, config, loaded, name, name)


def fuse(inputs: FuseInputs, own: Path | None, path: str | Path | None, precision: str | None) -> FuseReport:
    """Fuse an adapter with its base, and write the model to `path`, if given, which is not `own`, its own folder."""
    from mlx_nb.export.fuse import fuse as fuse_model

    return fuse_model(inputs, None if path is None else _place(inputs.name, own, path), precision)


def _place(name: str, own: Path | None, path: str | Path) -> Path:
    place = folder_of(str(path), working_folder())
    if own is not None:
        refuse_among_files(place, own)
        if same_folder(place, own):
            raise FolderTaken(
                f"{place} is the folder of the run {name!r}, whose adapter is exported. Give another folder."
            )
    return place


def gguf(
    inputs: FuseInputs,
    own: Path | None,
    path: str | Path | None,
    *,
    type: str,
    adapter: bool,
    base: str | Path | None,
    lm_studio_name: str | None,
) -> GgufExport:
    """Write a model with its adapter, or the adapter alone, as GGUF to `path`, or to LM Studio's folder.

    `own` is the folder of the adapter, which is left as it is.
    """
    from mlx_nb.export.gguf import lm_studio_folder, write_adapter, write_gguf

    if (path is None) == (lm_studio_name is None):
        raise CommandError("give a folder to write to, or lm_studio_name for a folder that LM Studio finds.")
    if adapter and lm_studio_name is not None:
        raise CommandError("LM Studio has no place for an adapter alone. Write the whole model for it.")
    if path is not None and str(path).endswith(".gguf"):
        raise CommandError(f"{path} would be a folder: name the folder, such as {str(path).removesuffix('.gguf')}.")
    target: str | Path = path if path is not None else lm_studio_folder(str(lm_studio_name))
    place = _place(inputs.name, own, target)
    if not adapter:
        return write_gguf(inputs, place, type.lower())
    return write_adapter(inputs, place, None if base is None else _base_file(base))


def _base_file(path: str | Path) -> Path:
    file = working_folder() / Path(path).expanduser()
    if not file.is_file():
        raise CommandError(f"there is no base model {str(path)!r}. Give the GGUF file of the base.")
    return file
