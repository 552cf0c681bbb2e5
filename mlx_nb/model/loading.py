"""Loads a model and its tokenizer from an alias, hub id, local folder or GGUF file."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten

from mlx_nb.config.named_templates import NAMED_TEMPLATES
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.errors import ModelError, OutOfMemory
from mlx_nb.events import Progress
from mlx_nb.files.cache_folder import repair_note
from mlx_nb.model.backend import is_cpu
from mlx_nb.model.fingerprint import Weights, configuration_digest, weights_fingerprint
from mlx_nb.model.finite import not_finite
from mlx_nb.model.memory import memory_errors, shortage
from mlx_nb.model.mlx_lm_import import LIBRARIES, files_for_a_model, import_mlx_lm, import_tokenizers
from mlx_nb.model.model_source import ALIASES, model_folder, model_named, one_line, shown_name
from mlx_nb.model.passes import cache_mismatch_note
from mlx_nb.model.randomness import random_stream
from mlx_nb.model.text_model import full_logits_note
from mlx_nb.model.trees import held_arrays, named_arrays
from mlx_nb.process.pieces import SECONDS_BETWEEN_PIECES, finished, on_thread, relayed

_Result = TypeVar("_Result")

_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to train. `quantized_bits` is that of the source, even if it was dequantized in memory.

    `weights` and `configuration` are the `weights_fingerprint` and `configuration_digest` of its files at the time of
    loading.
    """

    model: nn.Module
    tokenizer: Tokenizer
    folder: Path
    source: str
    quantized_bits: int | None
    loading_notes: tuple[str, ...] = ()
    weights: Weights = ()
    configuration: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes about the model. The first access runs it on a few tokens."""
        found = (cache_mismatch_note(self.model), full_logits_note(self.model))
        return (*self.loading_notes, *(note for note in found if note is not None))


def load_model(model: str, *, load_in_bits: int | None = None, chat_template: str | None = None) -> LoadedModel:
    """Load a model and tokenizer through mlx-lm. `model` is what `model_folder` takes.

    `load_in_bits` (2, 3, 4, 5, 6 or 8) quantizes all matrices of a float base except embeddings. On a CPU the base,
    quantized or not, is then converted to float32 with the same values, and a note says so: mlx's other CPU kernels are
    tens of times slower. `chat_template`, Jinja text or the path of a file with it, replaces the tokenizer's. Raises
    ModelError in one line if something is missing, cannot be read or is already quantized, or for a tensor with NaN or
    infinite values; OutOfMemory if the model does not fit.
    """
    return finished(load_in_pieces(model, load_in_bits=load_in_bits, chat_template=chat_template))


def load_in_pieces(
    model: str, *, load_in_bits: int | None = None, chat_template: str | None = None
) -> Generator[Progress, None, LoadedModel]:
    """`load_model` in pieces, yielding Progress. Downloading and parsing happen on a thread."""
    with memory_errors("the model was loaded", "Close other programs and kernels, or use a smaller model."):
        folder = yield from fetched_folder(model)
        begun = time.monotonic()
        for done in import_tokenizers():
            yield Progress(0, "loading libraries", done, len(LIBRARIES), time.monotonic() - begun)
        network, config = load_skeleton(folder)
        tokenizer = yield from _meanwhile("tokenizer", partial(load_tokenizer, folder))
        yield from _evaluated(network, "weights, as they are in the file")
        if bad := not_finite(dict(named_arrays(network.parameters()))):
            raise ModelError(f"the weights in {folder} are damaged: {bad}. Download or convert the model again.")
        configuration = configuration_digest(config)
        bits = (config.get("quantization") or {}).get("bits")
        notes = [note] if (note := repair_note(folder)) else []
        if load_in_bits is not None:
            if bits is not None:
                raise ModelError(
                    f"load_in_bits: {load_in_bits}: {model} is already quantized to {bits} bits. Remove load_in_bits."
                )
            quantize(network, load_in_bits)
            bits = load_in_bits
        if chat_template is not None:
            _set_chat_template(tokenizer, chat_template)
        if is_cpu():
            given = {id(array) for _, array in named_arrays(network.parameters())}
            _compute_in_float32(network)
            made = sum(array.nbytes for _, array in named_arrays(network.parameters()) if id(array) not in given)
            if lacking := shortage(made):
                raise OutOfMemory(f"{model} in float32, which this CPU needs, {lacking}. Use a smaller model.")
            base = f"{bits}-bit base" if bits else "base"
            notes.append(
                f"On this CPU the {base} is held and computed in float32; saved adapters are the same either way."
            )
        yield from _evaluated(network, "weights")
    weights = weights_fingerprint(folder)
    return LoadedModel(network, tokenizer, folder, model, bits, tuple(notes), weights, configuration)


def fetched_folder(model: str) -> Generator[Progress, None, Path]:
    """`model_folder` in pieces, yielding Progress, because a download or conversion may be necessary."""
    return (yield from _meanwhile("files", partial(model_folder, model)))


def _meanwhile(what: str, function: Callable[[], _Result]) -> Generator[Progress, None, _Result]:
    """Call `function` on a thread, yielding Progress until it returns."""
    begun = time.monotonic()
    return (
        yield from relayed(
            on_thread(function), lambda _: Progress(0, f"loading {what}", 0, 0, time.monotonic() - begun)
        )
    )


def _evaluated(network: nn.Module, what: str) -> Generator[Progress, None, None]:
    """Evaluate the lazy arrays of a model, a few at a time, yielding Progress."""
    arrays = held_arrays(network)
    begun = since = time.monotonic()
    for done, array in enumerate(arrays, 1):
        mx.eval(array)
        if (now := time.monotonic()) - since >= SECONDS_BETWEEN_PIECES:
            yield Progress(0, f"loading {what}", done, len(arrays), now - begun)
            since = time.monotonic()


def loaded_as(config: RunConfig, loaded: LoadedModel) -> str:
    """The name by which mlx-lm can load the model of a run: a hub id or a folder. mlx-lm knows no aliases."""
    name = model_named(config)
    if name in ALIASES or Path(name).expanduser().exists():
        return str(loaded.folder.resolve())
    return name


def load_tokenizer(folder: Path, chat_template: str | None = None) -> Any:
    """Load only the tokenizer of a model folder, in mlx-lm's wrapper."""
    import_mlx_lm()
    from mlx_lm.utils import load_config
    from mlx_lm.utils import load_tokenizer as load_with_mlx_lm

    try:
        config = load_config(folder)
        tokenizer = load_with_mlx_lm(folder, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:
        raise ModelError(f"the tokenizer in {folder} cannot be loaded: {one_line(error)}") from None
    if chat_template is not None:
        _set_chat_template(tokenizer, chat_template)
    return tokenizer


def load_skeleton(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model in a folder without reading weights yet, and its config.json. Raises ModelError."""
    import_mlx_lm()
    from mlx_lm.utils import load_model as load_with_mlx_lm

    try:
        with files_for_a_model(), random_stream(0):  # mlx draws initial values that are overwritten
            network, config = load_with_mlx_lm(folder, lazy=True)
    except Exception as error:
        raise ModelError(f"the model in {folder} cannot be loaded: {one_line(error)}") from None
    return network, config


def load_base_as_stored(folder: Path, load_in_bits: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """The base model of a run as it is stored, quantized to `load_in_bits` if given, and its config.json.

    Reads no weights yet. Raises ModelError.
    """
    network, config = load_skeleton(folder)
    if load_in_bits is not None:
        quantize(network, load_in_bits)
    return network, config


def quantize(network: nn.Module, bits: int) -> None:
    """Quantize all matrices except embeddings, in groups of 64 columns, or of 32 if 64 does not divide them."""
    if bits not in _BITS:
        raise ModelError(f"load_in_bits: {bits} is not supported; supported are {', '.join(map(str, _BITS))}.")

    def choose(_path: str, module: nn.Module) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized") or isinstance(module, nn.Embedding):
            return False
        columns = module.weight.shape[-1]
        size = next((size for size in (64, 32) if columns % size == 0), None)
        return False if size is None else {"group_size": size, "bits": bits}

    nn.quantize(network, class_predicate=choose)


def _compute_in_float32(network: nn.Module) -> None:
    """Replace quantized matrices by float32 matrices with the same values, and cast other floats to float32."""
    plain = [
        (path, _dequantized(module))
        for path, module in network.named_modules()
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding))
    ]
    if plain:
        network.update_modules(tree_unflatten(plain))
    network.update(tree_map(_float32, network.parameters()))


def _float32(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def _dequantized(module: nn.QuantizedLinear | nn.QuantizedEmbedding) -> nn.Module:
    biases = module.get("biases")
    # mlx rounds the result to the dtype of the scales, so half precision would be less exact than quantized_matmul.
    weight = mx.dequantize(
        module.weight,
        _float32(module.scales),
        None if biases is None else _float32(biases),
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    ).astype(mx.float32)
    if isinstance(module, nn.QuantizedEmbedding):
        embedding = nn.Embedding(1, 1)
        embedding.weight = weight
        return embedding
    linear = nn.Linear(1, 1, bias="bias" in module)
    linear.weight = weight
    if "bias" in module:
        linear.bias = module.bias
    return linear


def _named_template(tokenizer: Tokenizer, name: str) -> str:
    """The Jinja text of a named template. Its end-of-turn token is added to the end tokens. Raises ModelError.

    A control token that the tokenizer lacks would become ordinary characters, which could not end a turn.
    """
    named = NAMED_TEMPLATES[name]
    known = getattr(tokenizer, "_tokenizer", tokenizer).get_vocab()
    if missing := [token for token in named.tokens if token not in known]:
        fitting = [other for other, one in NAMED_TEMPLATES.items() if all(token in known for token in one.tokens)]
        raise ModelError(
            f"`chat_template: {name}` needs the tokens {', '.join(missing)}, which this model's tokenizer does not "
            f"have. Templates that it supports: {', '.join(fitting)}."
        )
    if named.end and hasattr(tokenizer, "add_eos_token"):
        tokenizer.add_eos_token(named.end)
    return named.source


def template_text(chat_template: str) -> str:
    """The Jinja text that `chat_template` is or is the path of, or the name of a known one. Raises ModelError."""
    if chat_template in NAMED_TEMPLATES or "{" in chat_template:
        return chat_template
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"chat_template: {shown_name(chat_template)} cannot be read as a file ({one_line(error)}). Give Jinja "
            "text, or the path of a file with it."
        ) from None


def _set_chat_template(tokenizer: Tokenizer, chat_template: str) -> None:
    named = chat_template in NAMED_TEMPLATES
    chat_template = _named_template(tokenizer, chat_template) if named else template_text(chat_template)
    getattr(tokenizer, "_tokenizer", tokenizer).chat_template = chat_template
    tokenizer.has_chat_template = True
    # mlx-lm's own rendering code for this model would take precedence.
    tokenizer._chat_template = None
