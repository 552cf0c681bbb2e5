"""Finds what `%%finetune --from` names: a run of this notebook, or the folder of a saved adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_nb.errors import CommandError, MlxNbError, did_you_mean
from mlx_nb.files.places import run_folder, working_folder
from mlx_nb.notebook.session import Session
from mlx_nb.run.saved_model import settings_of_saved
from mlx_nb.run.stages import frozen_copy, refuse_other_start, settings_from


def start_settings(session: Session, source: str, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a run called `name` takes over from `source`, where `given` does not have them.

    Raises CommandError if there is no such run or adapter, and as `settings_from` does.
    """
    run = session.runs.get(source)
    if run is not None and run.prepared:
        return settings_from(run, name, given)
    refuse_other_start(given)
    try:
        found = settings_of_saved(frozen_copy(run.folder if run is not None else run_folder(source, working_folder())))
    except MlxNbError as error:
        known = f"{did_you_mean(source, session.runs)} Runs: {', '.join(session.runs) or 'none yet'}."
        raise CommandError(f"--from {source}: no run of this notebook is called that, and {error}{known}") from None
    return {setting: value for setting, value in found.items() if setting not in given}
