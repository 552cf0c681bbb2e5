"""Notes printed before training: warnings about the model, the rows and the adapters of a run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from mlx_nb.config.checks import warnings_about
from mlx_nb.data.examples.examples import longest
from mlx_nb.data.examples.settings import ExampleSettings
from mlx_nb.data.masks.prompt_format import has_chat_template
from mlx_nb.errors import counted
from mlx_nb.run.inputs import RunInputs
from mlx_nb.run.planning import plan_notes


def start_notes(inputs: RunInputs) -> list[str]:
    """Notes about model and rows.

    Raises ModelError for a model that cannot be trained with these settings.
    """
    from mlx_nb.model.backend import prepare_backend

    warning = prepare_backend().warning
    of_model = (*inputs.loaded.notes, *inputs.training_notes)
    notes = [*([warning] if warning else []), *warnings_about(inputs.config), *of_model, *inputs.splits.notes]
    if (
        inputs.config.prompt_format is None
        and inputs.prompt_rendering.is_raw(inputs.tokenizer)
        and has_chat_template(inputs.tokenizer)
    ):
        notes.append(
            "The training rows are plain text, so prompts are raw text too. "
            "`prompt_format: chat` applies the chat template to prompts."
        )
    examples = inputs.examples
    for split, left_out in inputs.left_out.items():
        if left_out:
            first = "; ".join(row.reason for row in left_out[:3])
            notes.append(f"Left out of {split}: {counted(len(left_out), 'row')}. {first}")
        if split == "train":
            cut = sum(1 for example in examples.train if example.dropped_tokens)
            if cut:
                were = "was" if cut == 1 else "were"
                notes.append(
                    f"{counted(cut, 'training row')} {were} cut to max_seq_length={inputs.config.max_seq_length}."
                )
            notes += _context_notes(inputs, examples.train)
    return notes + plan_notes(inputs)


def adapter_notes(inputs: RunInputs, allow_changed: Collection[str]) -> list[str]:
    """Notes about the start adapter and the reference adapter.

    Raises ModelError for an adapter of another base, unless `allow_changed` has "model".
    """
    from mlx_nb.model.adapter_files import REFERENCE, START, check_base, open_adapter
    from mlx_nb.model.model_source import model_folder, model_named
    from mlx_nb.model.reference_model import BARE

    config, notes = inputs.config, list[str]()
    for setting in (START, REFERENCE):
        source = config.located(setting)
        if source is None or getattr(config, setting) == BARE:
            continue
        other = config.reference_model if setting == REFERENCE else None
        folder = model_folder(model_named(config, "reference_model")) if other else inputs.loaded.folder
        adapter = open_adapter(source, setting)
        notes += check_base(adapter, other or config.model, folder, config.load_in_bits, allow_changed)
    return notes


def _context_notes(inputs: RunInputs, examples: Sequence[Any]) -> list[str]:
    """A note if training rows exceed the context length of the model."""
    context = inputs.limits.context
    more = ExampleSettings.of(inputs.config).completion
    beyond = [example for example in examples if context is not None and longest([example]) + more > context]
    if not beyond:
        return []
    first = inputs.splits.train.named(beyond[0].row)
    return [
        f"{counted(len(beyond), 'training row')} {'is' if len(beyond) == 1 else 'are'} longer than the model's "
        f"context length of {context} tokens. First: {first}; longest: {longest(beyond) + more} tokens. Lower "
        "max_seq_length."
    ]
