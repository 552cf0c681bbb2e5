"""Answers of a model kept on disk, so that an evaluation that was interrupted, or is repeated, does not start again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_nb.files.cache_folder import cache_folder
from mlx_nb.files.typed_json import WrongJson, json_object, read_as
from mlx_nb.files.whole_files import write_whole

if TYPE_CHECKING:
    from mlx_nb.run.inputs import RunInputs
    from mlx_nb.train.answer_metrics import Answer

MOST_FILES = 4096  # of a few kilobytes each; the oldest are removed first
_FOLDER = "answers"
# Of the fingerprints of a run, those that its answers depend on.
_OF_ANSWERS = ("template", "tokenizer", "model", "mlx version", "device")
_SETTINGS = ("load_in_bits", "fine_tune_type", "num_layers", "lora_parameters")


class AnswerFiles:
    """The answers of one state of a model, in batches by key, in the folder `answers` of the cache.

    `model` is a key of everything besides the prompts that the answers depend on. What cannot be read is not there,
    and what cannot be written is not kept: the answers are then generated.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._folder = cache_folder() / _FOLDER

    def read(self, key: str) -> list[Answer] | None:
        """The answers of a batch; None if they are not there."""
        from mlx_nb.train.answer_metrics import Answer

        try:
            found = read_as(list[tuple[str, list[int], bool]], json_object(self._path(key).read_bytes())["answers"])
            return [Answer(*one) for one in found]
        except (OSError, ValueError, KeyError, WrongJson):
            return None

    def write(self, key: str, answers: Sequence[Answer]) -> None:
        """Keep the answers of a batch."""
        text = json.dumps({"answers": [list(one) for one in answers]})
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._path(key), lambda file: file.write(text.encode()))
            self._remove_oldest()

    def _path(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(f'{self._model} {key}'.encode()).hexdigest()}.json"

    def _remove_oldest(self) -> None:
        files = list(self._folder.glob("*.json"))
        if len(files) > MOST_FILES:
            files.sort(key=lambda file: file.stat().st_mtime)
            for file in files[: len(files) - MOST_FILES // 2]:
                file.unlink(missing_ok=True)


def model_key(inputs: RunInputs, weights: dict[str, bytes]) -> str:
    """A key of what the answers of a model depend on: the base, the trained `weights`, tokenizer, device, versions."""
    from importlib.metadata import version

    found = inputs.fingerprints
    config: dict[str, Any] = inputs.config.to_dict()
    parts = [[found[name] for name in _OF_ANSWERS], [config[name] for name in _SETTINGS], version("mlx-lm")]
    digest = hashlib.sha256(json.dumps(parts, default=str).encode())
    for name in sorted(weights):
        digest.update(name.encode() + b"\0" + weights[name])
    return digest.hexdigest()
