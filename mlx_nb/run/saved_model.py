"""Loads a model with a saved adapter, for generation without a run or its data; and explains how to use it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import CommandError, ConfigError, MlxNbError, ModelError
from mlx_nb.files.places import folder_of, run_folder, working_folder
from mlx_nb.files.typed_json import json_object
from mlx_nb.files.written_files import ADAPTER_FILE, CONFIG_FILE
from mlx_nb.run.adapter_exports import MLX_LM, check_format, export_files
from mlx_nb.run.adapters import Adapted, AdapterMakers, Adapters
from mlx_nb.run.generation import check_generation, generate_answers
from mlx_nb.run.inputs import RunInputs
from mlx_nb.run.stages import TAKEN_OVER

if TYPE_CHECKING:
    from mlx_nb.export.fuse import FuseInputs
    from mlx_nb.export.fuse_report import FuseReport
    from mlx_nb.export.gguf import GgufExport
    from mlx_nb.model.loading import LoadedModel
    from mlx_nb.rollouts.generation import Prompt


class SavedModel:
    """The result of `mlx_nb.load(folder)`: a model with its adapter. `generate` uses it, or the base model alone.

    model      the mlx model, adapter included
    tokenizer  the tokenizer, with its chat template
    inputs     its base model and tokenizer, and how prompts are written
    config     the settings for `model`, the shape of the adapter and the rendering of prompts
    """

    def __init__(self, inputs: RunInputs, keys: tuple[str, ...], folder: Path | None, update: int | None) -> None:
        self.folder = folder
        self.config = inputs.config
        self.update = update
        self.inputs = inputs
        self._keys = keys
        self._others: dict[str, SavedModel] = {}

    @classmethod
    def holding(cls, config: RunConfig, weights: Mapping[str, Any]) -> SavedModel:
        """The base of `config` with an adapter of its shape that has these weights, and zeros where there are none."""
        import mlx.core as mx

        from mlx_nb.model import adapters

        inputs, keys = _attached(config)
        model = inputs.loaded.model
        there = adapters.adapter_weights(model)
        model.load_weights([(name, weights.get(name, mx.zeros_like(array))) for name, array in there.items()], False)
        mx.eval(model.parameters())
        return cls(inputs, keys, None, None)

    @property
    def model(self) -> Any:
        """The mlx model, adapter included."""
        return self.inputs.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, with its chat template."""
        return self.inputs.tokenizer

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
        """The model's answer, like `Run.generate`: `mlx_nb.load("adapters/bees").generate("umbrella")`."""
        check_generation(prompt, max_tokens, temperature)
        if base and self.config.fine_tune_type == "full":
            raise CommandError("full fine-tuning changes the base itself, so there is no base left to generate with.")
        return generate_answers(
            self.inputs,
            self.inputs.base_model if base else self.model,
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            tools=tools,
            on_text=on_text,
        )

    @property
    def adapters(self) -> Adapters[SavedModel]:
        """This adapter and others on the same base, by name: `model.adapters.load(FOLDER)`."""
        name = "merged" if self.folder is None else self.folder.name
        return adapters_on(name, self, self.inputs, self._others)

    def save(self, path: str | Path, *, format: str = MLX_LM) -> Path:
        """Write the adapter to a folder, in the format `mlx-lm`, `peft` or `peft-rslora`. Returns the folder.

        Raises FolderError if the folder is a run's or has files that mlx_nb did not write, CheckpointError if it cannot
        be written.
        """
        from mlx_nb.model.adapters import adapter_description
        from mlx_nb.model.fingerprint import base_identity
        from mlx_nb.model.loading import loaded_as

        check_format(format)
        config, loaded, folder = self.config, self.inputs.loaded, folder_of(str(path), working_folder())
        description = adapter_description(
            config,
            self._keys,
            base=base_identity(loaded.weights, config.load_in_bits),
            loading_info={
                "model": loaded_as(config, loaded),
                "prompt_format": self.inputs.prompt_rendering.prompt_format or "",
            },
            update=self.update,
        )
        export_files(folder, loaded.model, config, description, format)
        return folder

    def fuse(self, path: str | Path | None = None, *, precision: str | None = None) -> FuseReport:
        """Write the model with its adapter merged to the folder `path`, like `Run.fuse`, but without validation rows.

        So the report has what each precision loses of the fine-tune, and recommends by that; no loss is measured.
        """
        from mlx_nb.run.model_exports import fuse

        return fuse(self._exported(), self.folder, path, precision)

    def gguf(
        self,
        path: str | Path | None = None,
        *,
        type: str = "f16",
        adapter: bool = False,
        base: str | Path | None = None,
        lm_studio_name: str | None = None,
    ) -> GgufExport:
        """Write the model with its adapter merged, or the adapter alone, as a GGUF file, like `Run.gguf`."""
        from mlx_nb.run.model_exports import gguf

        options: dict[str, Any] = {"type": type, "adapter": adapter, "base": base, "lm_studio_name": lm_studio_name}
        return gguf(self._exported(), self.folder, path, **options)

    def _exported(self) -> FuseInputs:
        from mlx_nb.run.model_exports import inputs_of_saved

        name = "merged" if self.folder is None else self.folder.name
        return inputs_of_saved(self.config, self.inputs.loaded, name)

    def __repr__(self) -> str:
        if self.folder is None:
            return f"SavedModel({self.config.model!r} with a merged adapter)"
        at = "" if self.update is None else f" of update {self.update}"
        return f"SavedModel({self.config.model!r} with the adapter{at} in {str(self.folder)!r})"


def adapters_on(
    name: str, own: Adapted, inputs: RunInputs, others: dict[str, SavedModel], *, ready: bool = True
) -> Adapters[SavedModel]:
    """The adapters on the base of `own`, which is called `name`, and others that are loaded beside it."""

    def opened(place: Path, base: Mapping[str, Any]) -> SavedModel:
        return opened_adapter(place, {**settings_of_saved(place, base["model"]), **base}, any_base=True)

    return Adapters(name, own, inputs, others, AdapterMakers(opened, SavedModel.holding), ready=ready)


def load(folder: str | Path, *, model: str | None = None) -> SavedModel:
    """A model with the adapter in `folder`, as a run, mlx-lm or PEFT saved it: `mlx_nb.load("adapters/bees")`.

    `model` is the base model, if the adapter does not record it or it has moved. Raises ModelError, in one line, for a
    folder without an adapter and for a base other than the one it was trained on.
    """
    place = folder_of(str(folder), working_folder())
    return opened_adapter(place, settings_of_saved(place, model), any_base=model is not None)


def load_named(name: str) -> SavedModel:
    """A model with the adapter of the run `name`, or in the folder `name`. Raises ModelError as `load` does."""
    return load(run_folder(name, working_folder()))


def opened_adapter(place: Path, settings: Mapping[str, Any], *, any_base: bool) -> SavedModel:
    """A model with the adapter in the folder `place`, which is the start adapter of `settings`.

    With `any_base`, an adapter that does not record its base is taken. Raises ModelError in one line.
    """
    from mlx_nb.model import adapters
    from mlx_nb.model.adapter_files import START, check_base, open_adapter, with_adapter_settings

    try:
        config = RunConfig.from_dict(settings).at(working_folder())
    except ConfigError as error:
        raise ModelError(f"{place / CONFIG_FILE} cannot be used: {error}") from None
    config, adapter = with_adapter_settings(config), open_adapter(str(place), START)
    inputs, keys = _attached(config)
    allowed = ("model",) if any_base and adapter.base is None else ()
    check_base(adapter, config.model, inputs.loaded.folder, config.load_in_bits, allowed)
    adapters.load_adapter_weights(inputs.loaded.model, adapter)
    update = _recorded(place, _facts(place)).get("update")
    return SavedModel(inputs, keys, place, update if isinstance(update, int) else None)


def _attached(config: RunConfig) -> tuple[RunInputs, tuple[str, ...]]:
    """The base of `config` with a new adapter attached, and the keys of that."""
    from mlx_nb.model import adapters
    from mlx_nb.model.randomness import random_stream

    inputs = RunInputs(config)
    with random_stream(0):
        keys = adapters.attach_adapter(inputs.loaded.model, config)
    inputs.loaded.model.eval()
    return inputs, keys


def settings_of_saved(place: Path, model: str | None = None) -> dict[str, Any]:
    """The settings to start from the adapter in a folder: it, its base (or `model`), and how prompts are written.

    Raises ModelError for a folder without an adapter, or if its base is not recorded.
    """
    ours = _recorded(place, _facts(place))
    settings = ours.get("settings") if isinstance(ours.get("settings"), Mapping) else {}
    assert isinstance(settings, Mapping)
    kept = {name: settings[name] for name in TAKEN_OVER if name in settings}
    if ours.get("prompt_format"):
        kept["prompt_format"] = ours["prompt_format"]
    return {**kept, "model": model or base_of(place), "resume_adapter_file": str(place)}


def base_of(place: Path) -> str:
    """The base model of the adapter in a folder, by name or path. Raises ModelError if it is not recorded."""
    facts = _facts(place)
    ours = _recorded(place, facts)
    base = _base_named(facts.get("model"), facts.get("base_model_name_or_path"), ours.get("model"))
    if base is None:
        raise ModelError(f"the base model of {place} is not recorded. Pass it: load({str(place)!r}, model=...).")
    return base


def _recorded(place: Path, facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the run recorded in its adapter; empty if another program wrote it."""
    from mlx_nb.model.adapter_files import peft_record

    ours = facts.get("mlx_nb")
    return ours if isinstance(ours, Mapping) else peft_record(place)


def _facts(place: Path) -> Mapping[str, Any]:
    """The contents of adapter_config.json; empty for an adapter file without one."""
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
    """The first name that is a model on this machine or a valid hub id; otherwise the first name."""
    from mlx_nb.model.model_source import refuse_unknown_model

    texts = [name for name in names if isinstance(name, str) and name]
    for name in texts:
        try:
            refuse_unknown_model(name)
            return name
        except MlxNbError:
            continue
    return texts[0] if texts else None


def how_to_use(config: RunConfig, loaded: LoadedModel, folder: Path, *, peft: bool = False) -> list[str]:
    """Instructions for using the adapter in `folder`: with mlx_nb, and with mlx-lm or, if it is in its format, PEFT."""
    from mlx_nb.model.backend import is_cpu
    from mlx_nb.model.loading import loaded_as

    place = str(folder.relative_to(working_folder()) if folder.is_relative_to(working_folder()) else folder)
    model = loaded_as(config, loaded)
    lines = [
        "In a notebook, this one or another:",
        f"  import mlx_nb; mlx_nb.load({place!r}).generate('Hello')",
    ]
    if peft:
        return [
            *lines,
            "With PEFT, where `base` is this model in transformers:",
            f"  peft.PeftModel.from_pretrained(base, {place!r})",
        ]
    lines += [
        "In a terminal, with mlx-lm:",
        f"  mlx_lm.generate --model {shlex.quote(model)} --adapter-path {shlex.quote(place)} --prompt Hello",
    ]
    if loaded.quantized_bits and is_cpu():
        lines.append(
            f"(The base has {loaded.quantized_bits} bits. On a CPU mlx-lm needs minutes for an answer with such a "
            "model; mlx_nb computes with float weights there and needs seconds.)"
        )
    return lines
