"""Prepares a run: loads model and rows, locks the run's folder and creates the trainer."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_nb.config.run_config import RunConfig
from mlx_nb.config.templates import file_problem, is_template_text
from mlx_nb.errors import ConfigError, ModelError
from mlx_nb.events import Progress
from mlx_nb.files.places import working_folder
from mlx_nb.files.run_folder import RunFolder
from mlx_nb.process.pieces import finished
from mlx_nb.run.inputs import RunInputs
from mlx_nb.run.live_model import SampleAnswers
from mlx_nb.run.notes import adapter_notes, start_notes
from mlx_nb.run.planning import description_if_known, refusing_what_cannot_fit, tokenizing
from mlx_nb.train.inbox import Inbox

if TYPE_CHECKING:
    from mlx_nb.train.trainer import Trainer


def check_template_file(config: RunConfig) -> None:
    """Raise ConfigError if `chat_template` names a file that cannot be used."""
    value = config.chat_template
    if value is None or is_template_text(value):
        return
    if (problem := file_problem(value, config.working_folder or working_folder())) is not None:
        raise ConfigError(problem)


def with_start_adapter(config: RunConfig) -> RunConfig:
    """`config` with the settings of the adapter in `resume_adapter_file`, if that is set."""
    if config.resume_adapter_file is None:
        return config
    from mlx_nb.model.adapter_files import with_adapter_settings

    return with_adapter_settings(config)


def loading(inputs: RunInputs) -> Iterator[Progress]:
    """Load model and rows, yielding Progress. Raises as soon as it is known that something cannot be trained."""
    with inputs.reading:
        inputs.check()
    yield from refusing_what_cannot_fit(inputs)
    yield from inputs.loading()
    yield Progress(0, "loading a pass over a few tokens", 0, 0)
    refuse_model(inputs)
    yield Progress(0, "loading the head, tried on a few tokens", 0, 0)
    _ = inputs.loaded.notes
    yield from tokenizing(inputs)
    yield from inputs.trying()


def refuse_model(inputs: RunInputs) -> None:
    """Raise ModelError for a model that cannot be trained with these settings."""
    from mlx_nb.model.passes import refuse_cache_mismatch

    config, loaded = inputs.config, inputs.loaded
    if config.fine_tune_type == "full" and loaded.quantized_bits:
        raise ModelError(
            f"`fine_tune_type: full` needs float weights, and {config.model} is quantized to "
            f"{loaded.quantized_bits} bits. Use lora or dora, or a float version of the model."
        )
    refuse_cache_mismatch(loaded.model)


def refuse_own_folder(config: RunConfig, folder: Path) -> None:
    """Raise ConfigError for an adapter inside the run's own folder, whose contents are moved when the run starts."""
    from mlx_nb.model.adapter_files import REFERENCE, START
    from mlx_nb.model.reference_model import BARE

    for setting in (START, REFERENCE):
        path = config.located(setting)
        if path in (None, BARE):
            continue
        named = Path(os.path.realpath(os.path.expanduser(str(path))))
        if named.is_relative_to(os.path.realpath(folder)):
            raise ConfigError(
                f"{setting}: {getattr(config, setting)} is inside {folder}, which this run would overwrite. Give "
                "the run another `--name` or another adapter_path."
            )


@contextmanager
def folder_taken(config: RunConfig, home: RunFolder, *, resumed: bool) -> Iterator[None]:
    """A context that locks the run's folder before anything is loaded, and releases it if loading fails.

    A `resumed` run has locked its folder already.
    """
    refuse_own_folder(config, home.path)
    try:
        if not resumed:
            home.refuse_misplaced()
            if not home.held:
                home.share()
            home.refuse_foreign()
        yield
    except BaseException:
        if not resumed:
            home.release()
        raise


def make_trainer(
    inputs: RunInputs,
    home: RunFolder,
    inbox: Inbox,
    *,
    from_checkpoint: bool,
    resumed: bool,
    allow_changed: Collection[str],
) -> Trainer:
    """Load model and rows, attach the adapter, start the folder, and return the trainer. The folder is locked already.

    `from_checkpoint` is true for a fork too, which starts a new folder; a `resumed` run continues in its own.
    """
    # Import what a save needs now. Importing it during a save at the end of an interrupted process would change the
    # exit status: Python forgets the pending status once it compiles anything.
    import mlx_nb.train.checkpoint_store
    import mlx_nb.train.record  # noqa: F401
    from mlx_nb.model.backend import is_cpu, memory_limit
    from mlx_nb.model.fingerprint import base_identity
    from mlx_nb.model.loading import loaded_as
    from mlx_nb.train.memory_guard import MemoryGuard
    from mlx_nb.train.trainer import Trainer

    inputs.check()
    finished(refusing_what_cannot_fit(inputs))
    refuse_model(inputs)
    config, loaded = inputs.config, inputs.loaded
    notes = start_notes(inputs)
    if not from_checkpoint:
        notes += adapter_notes(inputs, allow_changed)
    reference = inputs.reference
    trainer = Trainer(
        config,
        loaded.model,
        inputs.examples,
        name=home.name,
        folder=home.path,
        notes=notes,
        compiled=not is_cpu(),
        memory_limit=memory_limit(),
        guard=MemoryGuard(description_if_known(inputs)),
        sampler=SampleAnswers(inputs),
        reference=reference,
        tokenizer=loaded.tokenizer,
        rewards=inputs.rewards,
        metrics=inputs.metrics,
        base=base_identity(loaded.weights, config.load_in_bits),
        loading_info={"model": loaded_as(config, loaded), "prompt_format": inputs.prompt_rendering.prompt_format or ""},
        from_checkpoint=from_checkpoint,
        inbox=inbox,
        write=home.write,
        places_of=inputs.places_of,
    )
    try:
        _ = inputs.fingerprints  # computed now, from what was just read, not at the first checkpoint
        # Last, because nothing else in the preparation can fail after it.
        set_aside = None if resumed else home.begin(config.keep_previous)
        trainer.notes += home.notes
        if reference is not None:  # reuse what an earlier run in this folder measured
            reference.load(set_aside or home.path)
    except BaseException:
        trainer.close()
        raise
    return trainer
