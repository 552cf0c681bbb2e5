"""Runs made to evaluate a saved adapter: they train nothing, and leave the adapter's folder as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import CheckpointError, CommandError, DataError
from mlx_nb.files.places import run_folder, working_folder
from mlx_nb.files.written_files import ADAPTER_FILE, BEST_FOLDER, CHECKPOINTS
from mlx_nb.run.resume_checks import refuse_unusable, settings_of, working_folder_of
from mlx_nb.run.run import Run
from mlx_nb.run.saved_model import base_of

# Settings of the training run that have no effect on an evaluation, and may refuse what it needs.
_NOT_OF_EVALUATION = (
    "metrics",
    "metric_tokens",
    "best_by",
    "early_stopping_patience",
    "sample_prompts",
    "steps_per_eval",
)


def run_to_evaluate(
    named: str,
    scratch: Path,
    settings: Mapping[str, Any],
    namespace: Mapping[str, Any],
    *,
    best: bool = False,
    base: bool = False,
) -> Run:
    """A run with the adapter of the run `named` (a name, or its folder), or its `best` one, or without it (`base`).

    Its settings are those of the newest checkpoint, and `settings` take precedence; an adapter without checkpoints
    needs `data`. It would write to `scratch`. Raises CommandError if there is no such adapter, DataError without rows.
    """
    from mlx_nb.train.checkpoint_store import CheckpointStore

    folder = run_folder(named, working_folder())
    adapter = folder / BEST_FOLDER if best else folder
    if not (adapter / ADAPTER_FILE).is_file():
        raise CommandError(f"{adapter} has no {ADAPTER_FILE}. Give the name of a run, or the folder of its adapter.")
    values: dict[str, Any] = {}
    place = working_folder()
    try:
        checkpoint, _ = CheckpointStore(folder / CHECKPOINTS).load(None, refuse_unusable)
        values, place = dict(settings_of(checkpoint)), working_folder_of(checkpoint, folder) or place
    except CheckpointError:
        values["model"] = base_of(adapter)
    for name in _NOT_OF_EVALUATION:
        values.pop(name, None)
    start = {"fine_tune_type": "lora"} if base else {"resume_adapter_file": str(adapter)}
    values |= {"adapter_path": str(scratch / "run"), "resume_adapter_file": None, **start, **settings}
    if "data" not in values:
        raise DataError(
            f"the rows that {folder} was trained on were an object in memory. Give data=... to evaluate on."
        )
    return Run(RunConfig.from_dict(values).at(place), name=folder.name, namespace=namespace)
