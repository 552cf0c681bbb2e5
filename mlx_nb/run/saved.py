"""A model with an adapter that was saved, to ask it without a run and without its rows."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import CommandError, ConfigError, MlxNbError, ModelError
from mlx_nb.files.places import folder_of, working_folder
from mlx_nb.files.typed_json import json_object
from mlx_nb.files.written_files import ADAPTER_FILE, CONFIG_FILE
from mlx_nb.run.asking import answers, check_asking
from mlx_nb.run.inputs import RunInputs

if TYPE_CHECKING:
    from mlx_nb.model.loading import LoadedModel
    from mlx_nb.rollouts.generation import Prompt

# Of the settings of its run, those that say how a prompt is written for the model.
_OF_PROMPTS = ("load_in_bits", "chat_template", "prompt_format", "special_tokens_in_text", "roles")


class SavedModel:
    """What `mlx_nb.load(folder)` gives: `generate` asks the model with the adapter, or its base.

    model      the mlx model, adapter included
    tokenizer  the tokenizer, with its chat template
    config     the settings that say what it is: `model`, the shape of the adapter, how a prompt is written
    """

    def __init__(self, folder: Path, config: RunConfig, update: int | None, *, any_base: bool = False) -> None:
        from mlx_nb.model import adapters
        from mlx_nb.model.adapter_files import START, check_base, open_adapter, with_adapter_settings
        from mlx_nb.model.randomness import random_stream

        self.folder = folder
        self.config = with_adapter_settings(config)
        self.update = update
        self._inputs = RunInputs(self.config)
        loaded = self._inputs.loaded
        adapter = open_adapter(str(folder), START)
        # Where it does not say which weights it was made on, the person's word counts.
        allowed = ("model",) if any_base and adapter.base is None else ()
        check_base(adapter, config.model, loaded.folder, config.load_in_bits, allowed)
        with random_stream(0):
            adapters.attach_adapter(loaded.model, self.config)
        adapters.load_adapter_weights(loaded.model, adapter)
        loaded.model.eval()

    @property
    def model(self) -> Any:
        """The mlx model, adapter included."""
        return self._inputs.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, with its chat template."""
        return self._inputs.tokenizer

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        base: bool = False,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        tools: Sequence[Any] | None = None,
        on_text: Callable[[Any], None] | None = None,
    ) -> Any:
        """The model's answer, as `Run.generate` gives it: `mlx_nb.load("adapters/bees").generate("umbrella")`."""
        check_asking(prompt, max_tokens, temperature)
        if base and self.config.fine_tune_type == "full":
            raise CommandError("full fine-tuning changes the base itself, so there is no base left to ask.")
        return answers(
            self._inputs,
            self._inputs.base_model if base else self.model,
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            tools=tools,
            on_text=on_text,
        )

    def __repr__(self) -> str:
        at = "" if self.update is None else f" of update {self.update}"
        return f"SavedModel({self.config.model!r} with the adapter{at} in {str(self.folder)!r})"


def load(folder: str | Path, *, model: str | None = None) -> SavedModel:
    """A model with the adapter in `folder`, as a run or mlx-lm saved it: `mlx_nb.load("adapters/bees")`.

    `model` is the base, where the adapter does not say it or it has moved. Raises ModelError, in one line, for what is
    no adapter and for another base than that it was made on.
    """
    place = folder_of(str(folder), working_folder())
    facts = _facts(place)
    ours = facts.get("mlx_nb") if isinstance(facts.get("mlx_nb"), Mapping) else {}
    assert isinstance(ours, Mapping)
    base = model or _base_named(facts.get("model"), ours.get("model"))
    if base is None:
        raise ModelError(f"nothing says which model {place} was made on. Give it: load({str(folder)!r}, model=...).")
    settings = ours.get("settings") if isinstance(ours.get("settings"), Mapping) else {}
    assert isinstance(settings, Mapping)
    kept = {name: settings[name] for name in _OF_PROMPTS if name in settings}
    if ours.get("prompt_format"):
        kept["prompt_format"] = ours["prompt_format"]
    update = ours.get("update")
    try:
        config = RunConfig.from_dict({**kept, "model": base, "resume_adapter_file": str(place)}).at(working_folder())
    except ConfigError as error:
        raise ModelError(f"{place / CONFIG_FILE} cannot be used: {error}") from None
    return SavedModel(place, config, update if isinstance(update, int) else None, any_base=model is not None)


def _facts(place: Path) -> Mapping[str, Any]:
    """What the adapter says of itself; nothing for a bare file."""
    try:
        found = json_object((place / CONFIG_FILE).read_bytes())
    except OSError:
        if (place / ADAPTER_FILE).is_file():
            return {}
        raise ModelError(f"{place} has no {ADAPTER_FILE}. Give the folder that a run was saved to.") from None
    except ValueError as error:
        raise ModelError(f"{place / CONFIG_FILE} cannot be read: {error}.") from None
    return found if isinstance(found, Mapping) else {}


def _base_named(*names: Any) -> str | None:
    """The first of the names of a base that is one of this machine, else the first that could be that of a hub."""
    from mlx_nb.model.model_source import refuse_unknown_model

    texts = [name for name in names if isinstance(name, str) and name]
    for name in texts:
        try:
            refuse_unknown_model(name)
            return name
        except MlxNbError:
            continue
    return texts[0] if texts else None


def how_to_use(config: RunConfig, loaded: LoadedModel, folder: Path) -> list[str]:
    """What one would type to ask the adapter in `folder`, in Python and in a terminal."""
    from mlx_nb.model.backend import is_cpu
    from mlx_nb.model.loading import loaded_as

    place = str(folder.relative_to(working_folder()) if folder.is_relative_to(working_folder()) else folder)
    model = loaded_as(config, loaded)
    lines = [
        "In a notebook, this one or another:",
        f"  import mlx_nb; mlx_nb.load({place!r}).generate('Hello')",
        "In a terminal, with mlx-lm:",
        f"  mlx_lm.generate --model {shlex.quote(model)} --adapter-path {shlex.quote(place)} --prompt Hello",
    ]
    if loaded.quantized_bits and is_cpu():
        lines.append(
            f"(The base has {loaded.quantized_bits} bits. On a CPU mlx-lm takes minutes to answer with such a model; "
            "mlx_nb, which computes with float weights there, takes seconds.)"
        )
    return lines
