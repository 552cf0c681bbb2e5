"""Writes a trained model, or its adapter alone, as a GGUF file for llama.cpp, Ollama and LM Studio.

A file is in its folder only after every tensor was read back and, if llama.cpp is installed, after it has given the
same logits as mlx.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_nb.errors import CommandError, ModelError, did_you_mean
from mlx_nb.export.fuse import FuseInputs
from mlx_nb.export.gguf_check import MOST_KL, MOST_KL_OF_OTHERS, Checked, checked_by_llama_cpp
from mlx_nb.export.gguf_families import Unwritable, family_of, rope_factors, settings_of
from mlx_nb.export.gguf_tensors import Layout, Tensor, adapter_tensors, encoded, prove, trained_tensors
from mlx_nb.export.gguf_tokenizer import tokenizer_metadata
from mlx_nb.export.llama_cpp import HOW_TO_INSTALL, llama_cpp_folder, run_llama_cpp
from mlx_nb.export.llama_cpp_process import QUANTIZED_BY_LLAMA_CPP
from mlx_nb.export.ollama import modelfile
from mlx_nb.files.export_folder import refuse_beyond_disk, refuse_foreign, replacing_folder
from mlx_nb.model.adapters import adapter_modules
from mlx_nb.model.loading import load_base_as_stored
from mlx_nb.model.shared_base import shared_copy

WRITTEN_TYPES = ("f16", "bf16", "f32", "q8_0")
TYPES = (*WRITTEN_TYPES, *QUANTIZED_BY_LLAMA_CPP)
LORA = "lora"
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufExport:
    """A written GGUF file: its path, size, type and number of tensors that were read back.

    `checked` is None if llama.cpp is not installed. `modelfile` is the Ollama file beside it.
    """

    path: Path
    bytes: int
    type: str
    tensors: int
    checked: Checked | None
    modelfile: Path

    def __str__(self) -> str:
        name, there = shlex.quote(self.path.stem), shlex.quote(_here(self.path))
        by_llama = f"Checked by llama.cpp: {self.checked}." if self.checked else f"Not checked: {HOW_TO_INSTALL}."
        lines = [
            f"Written to {self.path} ({self.bytes / 1e6:,.1f} MB, {self.type}); "
            f"all {self.tensors} tensors were read back.",
            by_llama,
            f"Ollama:     ollama create {name} -f {shlex.quote(_here(self.modelfile))} && ollama run {name}",
        ]
        if self.type == LORA:
            base = "FROM in the Modelfile and BASE.gguf here are the base model as GGUF."
            return "\n".join([*lines, f"llama.cpp:  llama-cli -m BASE.gguf --lora {there}", base])
        lines.append(f"LM Studio:  lms import --user-repo mlx_nb/{name} -y -c {there}")
        return "\n".join([*lines, f"llama.cpp:  llama-cli -m {there}"])

    __repr__ = __str__


def _here(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def write_gguf(inputs: FuseInputs, folder: Path, type: str) -> GgufExport:
    """Write the model with its adapter fused to `folder`, as `NAME-TYPE.gguf` with a Modelfile.

    Raises CommandError for an unknown type, or for one that needs llama.cpp if it is not installed; ModelError for a
    model that cannot be written, or if a check fails; FolderError. The folder is then as before.
    """
    if type not in TYPES:
        raise CommandError(f"no GGUF type {type!r}.{did_you_mean(type, TYPES)} Known: {', '.join(TYPES)}.")
    if type not in WRITTEN_TYPES and llama_cpp_folder() is None:
        raise CommandError(f"{type} is made by llama.cpp, which is not installed. {HOW_TO_INSTALL}. Or use q8_0.")
    refuse_foreign(folder)
    live, tokenizer = inputs.model, inputs.loaded.tokenizer
    layout, arguments, metadata = _described(inputs)
    tensors = list(_named(inputs, trained_tensors(live, layout)))
    written = type if type in WRITTEN_TYPES else "f16"
    name = f"{inputs.name}-{type}.gguf"
    size = sum(int(np.prod(tensor.shape)) for tensor in tensors) * {"f32": 4, "q8_0": 1.1}.get(written, 2)
    refuse_beyond_disk(folder, int(size * (1 if written == type else 1.4)))
    with replacing_folder(folder, inputs.run_id, inputs.name) as work:
        file = work / (name if written == type else "f16.gguf")
        factors = rope_factors(arguments)
        _write(file, layout.family.architecture, metadata, tensors, layout, written, factors)
        proved = prove(file, tensors, layout, {_ROPE_FACTORS} if factors is not None else set())
        if written != type:
            run_llama_cpp({"model": str(file), "quantize": [str(work / name), type]})
            file.unlink()
            file = work / name
        checked = checked_by_llama_cpp(live, tokenizer, {"model": str(file)}, MOST_KL.get(type, MOST_KL_OF_OTHERS))
        (work / "Modelfile").write_text(modelfile(tokenizer, f"./{name}"), encoding="utf-8")
        size = file.stat().st_size
    return GgufExport(folder / name, size, type, proved, checked, folder / "Modelfile")


def write_adapter(inputs: FuseInputs, folder: Path, base: Path | None = None) -> GgufExport:
    """Write the adapter alone to `folder`, as `NAME-lora.gguf` with a Modelfile.

    llama.cpp checks it on `base`, the base model as a GGUF file, or on one that is made for it and removed again.
    Raises as `write_gguf` does, and ModelError for an adapter that llama.cpp cannot apply.
    """
    import gguf

    config = inputs.config
    if config.fine_tune_type != "lora":
        raise ModelError(
            f"llama.cpp applies adapters of the type lora, not {config.fine_tune_type}. Write the whole model instead."
        )
    refuse_foreign(folder)
    live, tokenizer = inputs.model, inputs.loaded.tokenizer
    layout, _, _ = _described(inputs)
    alpha = float(config.lora_parameters.scale * config.lora_parameters.rank)
    matrices = list(_named(inputs, adapter_tensors(live, layout, alpha)))
    name = f"{inputs.name}-lora.gguf"
    with replacing_folder(folder, inputs.run_id, inputs.name) as work:
        writer = gguf.GGUFWriter(str(work / name), layout.family.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(inputs.name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for tensor_name, matrix in matrices:
            writer.add_tensor(tensor_name, matrix)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _prove_adapter(work / name, inputs, layout, matrices)
        checked = None
        if llama_cpp_folder() is not None:
            made = work / "base.gguf"
            if base is None:
                _write_base(inputs, made)
            job = {"model": str(base or made), "adapter": str(work / name)}
            checked = checked_by_llama_cpp(live, tokenizer, job, MOST_KL["f16" if base is None else "q8_0"])
            made.unlink(missing_ok=True)
        source = str(base) if base is not None else "./base.gguf"
        (work / "Modelfile").write_text(modelfile(tokenizer, source, f"./{name}"), encoding="utf-8")
        size = (work / name).stat().st_size
    return GgufExport(folder / name, size, LORA, len(matrices), checked, folder / "Modelfile")


def _write_base(inputs: FuseInputs, path: Path) -> None:
    layout, arguments, metadata = _described(inputs)
    tensors = list(trained_tensors(shared_copy(inputs.loaded).model, layout))
    _write(path, layout.family.architecture, metadata, tensors, layout, "f16", rope_factors(arguments))


def _described(inputs: FuseInputs) -> tuple[Layout, dict[str, Any], dict[str, Any]]:
    """The layout of a model in llama.cpp, its arguments, and the metadata of its file."""
    _, config = load_base_as_stored(inputs.loaded.folder, None)
    live: Any = inputs.model
    network = live.language_model if "language_model" in live else live
    arguments = dict(vars(network.args)) if hasattr(network, "args") else {}
    try:
        family = family_of(str(arguments.get("model_type") or config["model_type"]))
        settings = settings_of(family, arguments, config)
        vocabulary = tokenizer_metadata(inputs.loaded.tokenizer, arguments["vocab_size"])
        layout = Layout(family, arguments)
    except Unwritable as error:
        raise _unwritable(inputs, error) from None
    metadata = {f"{family.architecture}.{key}": value for key, value in settings.items()}
    return layout, arguments, {"general.name": inputs.name, **metadata, **vocabulary}


def _unwritable(inputs: FuseInputs, error: Unwritable) -> ModelError:
    return ModelError(
        f"{inputs.config.model} cannot be written as GGUF: {error}. `%finetune fuse` writes it for mlx-lm."
    )


def _named(inputs: FuseInputs, made: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from made
    except Unwritable as error:
        raise _unwritable(inputs, error) from None


def _write(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Sequence[Tensor],
    layout: Layout,
    type: str,
    factors: np.ndarray | None,
) -> None:
    """Write a file, computing one tensor at a time. Raises OSError."""
    import gguf

    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[kinds[type]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in metadata.items():
        _add(writer, key, value)
    if factors is not None:
        writer.add_tensor_info(_ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for tensor in tensors:
        one_row = np.zeros((1, *tensor.shape[-1:]) if len(tensor.shape) > 1 else tensor.shape, np.float32)
        stored, kind = encoded(one_row, type)
        shape = (*tensor.shape[:-1], stored.shape[-1])
        rows = int(np.prod(tensor.shape[:-1])) if len(tensor.shape) > 1 else 1
        writer.add_tensor_info(tensor.name, shape, stored.dtype, stored.nbytes * rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for tensor in tensors:
        stored, _ = encoded(layout.to_llama(tensor.name, np.array(tensor.value())), type)
        writer.write_tensor_data(stored)
    writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    """Add one setting in the type that llama.cpp expects."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _prove_adapter(path: Path, inputs: FuseInputs, layout: Layout, matrices: Sequence[tuple[str, np.ndarray]]) -> None:
    """Read an adapter back and compare the change of each weight that it makes with that of the live one."""
    import gguf

    reader = gguf.GGUFReader(str(path))
    there = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    alpha = reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents()
    if there.keys() != {name for name, _ in matrices}:
        raise ModelError(f"{path.name} does not have the matrices of the adapter.")
    for module_path, module in adapter_modules(inputs.model):
        name = layout.name(f"{module_path}.weight")
        a, b = there[f"{name}.lora_a"], layout.to_mlx(name, there[f"{name}.lora_b"])
        change = module.scale * np.array((module.lora_a @ module.lora_b).astype(mx.float32)).T
        same = np.allclose(alpha / len(a) * (b @ a), change, rtol=1e-4, atol=1e-6 * (1 + np.abs(change).max()))
        if not same:
            raise ModelError(f"{path.name}: {name} does not hold the adapter of {module_path}.")


def lm_studio_folder(name: str) -> Path:
    """The folder in which LM Studio finds a model that is called `name`: `models/mlx_nb/NAME`."""
    home = Path(os.environ.get("LM_STUDIO_HOME") or "~/.lmstudio").expanduser()
    publisher, _, model = name.rpartition("/")
    return home / "models" / (publisher or "mlx_nb") / model
