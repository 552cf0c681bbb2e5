"""A run gets ready: model and rows are loaded, the folder is taken, and the trainer is made."""

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
from mlx_nb.run.inputs import RunInputs
from mlx_nb.run.notes import adapter_notes, start_notes
from mlx_nb.train.inbox import Inbox

if TYPE_CHECKING:
    from mlx_nb.train.trainer import Trainer


def check_template_file(config: RunConfig) -> None:
    """Raise ConfigError where `chat_template` names a file that cannot be used."""
    value = config.chat_template
    if value is None or is_template_text(value):
        return
    if (problem := file_problem(value, config.working_folder or working_folder())) is not None:
        raise ConfigError(problem)


def with_start_adapter(config: RunConfig) -> RunConfig:
    """The settings with those of the adapter in `resume_adapter_file`, if there is one."""
    if config.resume_adapter_file is None:
        return config
    from mlx_nb.model.adapter_files import with_adapter_settings

    return with_adapter_settings(config)


def loading(inputs: RunInputs) -> Iterator[Progress]:
    """Load model and rows, refusing what cannot be trained as soon as it is known."""
    with inputs.reading:
        inputs.check()
    yield from inputs.loading()
    yield Progress(0, "loading a pass over a few tokens", 0, 0)
    refuse_model(inputs)
    tokenizing = inputs.tokenizing()
    while True:
        with inputs.reading:
            progress = next(tokenizing, None)
        if progress is None:
            break
        yield progress
    yield Progress(0, "loading a gradient, tried on a few tokens", 0, 0)


def refuse_model(inputs: RunInputs) -> None:
    """Raise ModelError for a model that cannot be trained at all with these settings."""
    from mlx_nb.model.passes import refuse_cache_doubt

    config, loaded = inputs.config, inputs.loaded
    if config.fine_tune_type == "full" and loaded.quantized_bits:
        raise ModelError(
            f"`fine_tune_type: full` needs float weights, and {config.model} is quantized to "
            f"{loaded.quantized_bits} bits. Use lora or dora, or a float version of the model."
        )
    refuse_cache_doubt(loaded.model)


def refuse_own_folder(config: RunConfig, folder: Path) -> None:
    """Raise ConfigError for a setting that names something in the run's own folder, which is moved when it starts."""
    from mlx_nb.model.adapter_files import REFERENCE, START
    from mlx_nb.model.reference_model import BARE

    for setting in (START, REFERENCE):
        path = config.located(setting)
        if path in (None, BARE):
            continue
        named = Path(os.path.realpath(os.path.expanduser(str(path))))
        if named.is_relative_to(os.path.realpath(folder)):
            raise ConfigError(
                f"{setting}: {getattr(config, setting)} lies in {folder}, which this run would write over. Give the "
                "run another `--name`, or another adapter_path."
            )


@contextmanager
def folder_taken(config: RunConfig, home: RunFolder, *, resumed: bool) -> Iterator[None]:
    """Nobody else writes to the folder: made sure of before anything is loaded. It is let go if loading fails.

    A run that is `resumed` has its folder already.
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
    """The trainer of a run whose folder is taken: model and rows loaded, adapter attached, the folder begun.

    `from_checkpoint` holds for a fork too, which begins a folder of its own; a `resumed` run goes on in its own.
    """
    # What a save needs is imported by now: one at the end of an interrupted process would change its exit status,
    # which Python forgets once it compiles anything more.
    import mlx_nb.train.record  # noqa: F401
    from mlx_nb.model.backend import is_cpu, memory_limit
    from mlx_nb.model.fingerprint import base_identity
    from mlx_nb.model.loading import loaded_as
    from mlx_nb.train.trainer import Trainer

    inputs.check()
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
        sampler=inputs.answers,
        reference=reference,
        tokenizer=loaded.tokenizer,
        rewards=inputs.rewards,
        base=base_identity(loaded.weights, config.load_in_bits),
        use={"model": loaded_as(config, loaded), "prompt_format": inputs.asking.prompt_format or ""},
        from_checkpoint=from_checkpoint,
        inbox=inbox,
        write=home.write,
        places_of=inputs.places_of,
    )
    try:
        _ = inputs.fingerprints  # of what was just read, and not of what will be there at the first checkpoint
        # Last, when nothing of the run itself can go wrong any more.
        set_aside = None if resumed else home.begin(config.keep_previous)
        trainer.notes += home.notes
        if reference is not None:  # an earlier run here may have measured the same one
            reference.load(set_aside or home.path)
    except BaseException:
        trainer.close()
        raise
    return trainer
