"""Writes the adapter of a run into its own folder, or into another one that nothing else uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlx_nb.errors import CheckpointError, CommandError, FolderError, did_you_mean, shown
from mlx_nb.files.run_folder import RunFolder
from mlx_nb.files.written_files import EXPORT

if TYPE_CHECKING:
    import mlx.nn as nn

    from mlx_nb.config.run_config import RunConfig
    from mlx_nb.train.trainer import Trainer


MLX_LM, PEFT, PEFT_RSLORA = "mlx-lm", "peft", "peft-rslora"
FORMATS = (MLX_LM, PEFT, PEFT_RSLORA)


class ExportingRun(Protocol):
    """The interface of a run that writing its adapter needs."""

    name: str

    @property
    def home(self) -> RunFolder:
        """Its folder, with the lock and the list of written files."""

    @property
    def trainer(self) -> Trainer:
        """Its trainer."""

    def release(self, reason: str = "") -> None:
        """Save the run and end it."""


def can_write(folder: RunFolder) -> bool:
    """Whether the run still holds its folder and can write there."""
    try:
        with folder.writing():
            return True
    except FolderError:
        return False


def check_format(name: str) -> None:
    """Raise CommandError for a format that no adapter is saved in."""
    if name not in FORMATS:
        hint = did_you_mean(name, FORMATS) if isinstance(name, str) else ""
        raise CommandError(f"no adapter format is called {shown(name)}.{hint} There are {', '.join(FORMATS)}.")


def export_adapter(
    run: ExportingRun, path: Path, kind: str, at_rest: Callable[[], bool], name: str = MLX_LM
) -> RunFolder:
    """Lock the folder at `path`, write the adapter there in the format `name`, and return the folder.

    Raises FolderError if the folder belongs to another run or has files that mlx_nb did not write, CheckpointError if
    it cannot be written.
    """
    trainer = run.trainer
    trainer.stepper.trainable()
    _refuse_unheld(trainer.model, trainer.config, name)
    folder = RunFolder(path, run.name, run.home.run_id, kind=kind, at_rest=at_rest, let_go=run.release)
    try:
        folder.take_for_adapter()
        write_adapter(run, folder, name)
    except BaseException:
        folder.release()
        raise
    return folder


def write_adapter(run: ExportingRun, folder: RunFolder, name: str = MLX_LM) -> None:
    """Write the adapter to a folder that the run holds. Raises CheckpointError if it cannot be written."""
    trainer = run.trainer
    trainer.stepper.trainable()
    description = trainer.saves.description(trainer.config, trainer.state.step)
    _write(folder, trainer.model, trainer.config, description, name)


def export_files(path: Path, model: nn.Module, config: RunConfig, description: Mapping[str, Any], name: str) -> None:
    """Write the adapter attached to `model` to the folder at `path`, in the format `name`.

    Raises FolderError if the folder belongs to a run or has files that mlx_nb did not write, CheckpointError if it
    cannot be written.
    """
    _refuse_unheld(model, config, name)
    folder = RunFolder(path, path.name, kind=EXPORT)
    folder.take_for_adapter()
    try:
        _write(folder, model, config, description, name)
    finally:
        folder.release()


def _refuse_unheld(model: nn.Module, config: RunConfig, name: str) -> None:
    """Raise CommandError for an adapter that the format cannot hold, before anything is written."""
    from mlx_nb.export.peft import check_for_peft

    if name != MLX_LM:
        check_for_peft(model, config)


def _write(folder: RunFolder, model: nn.Module, config: RunConfig, description: Mapping[str, Any], name: str) -> None:
    from mlx_nb.export.peft import write_peft
    from mlx_nb.model.adapters import save_adapter

    try:
        if name == MLX_LM:
            save_adapter(model, description, folder.path, write=folder.write)
            return
        write_peft(
            model,
            config,
            folder.path,
            base_name=description["model"],
            record=description["mlx_nb"],
            use_rslora=name == PEFT_RSLORA,
            write=folder.write,
        )
    except OSError as error:
        raise CheckpointError(f"{folder.path} cannot be written: {error.strerror}. Give another folder.") from None
