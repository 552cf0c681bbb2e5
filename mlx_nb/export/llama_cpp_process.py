"""A process of its own that opens a GGUF file in the real llama.cpp, which aborts its process on an invalid file.

`python -m mlx_nb.export.llama_cpp_process FOLDER JOB RESULT`: the folder with llama.cpp's libraries, the job as JSON
(see `llama_cpp.Job`), and the .npz file to write. It imports neither mlx nor the rest of mlx_nb.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

BINDINGS = "llama_cpp_py_sync"  # the package with the declarations of llama.cpp's functions
_THREADS = max(1, (os.cpu_count() or 2) // 2)  # they wait in busy loops, which slows down everything else
QUANTIZED_BY_LLAMA_CPP = {
    "q4_0": 2,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
    "q2_k": 10,
    "q3_k_m": 12,
}


class _Library:
    """llama.cpp's functions (`lib`), and the means to call them (`ffi`)."""

    def __init__(self, folder: Path) -> None:
        found = importlib.util.find_spec(BINDINGS)
        assert found is not None
        assert found.submodule_search_locations
        # Without the package's own code, which loads a library when it is imported.
        file = Path(found.submodule_search_locations[0]) / "_cffi_bindings.py"
        spec = importlib.util.spec_from_file_location("llama_cpp_declarations", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        ctypes.CDLL(str(library(folder, "ggml-base")), mode=ctypes.RTLD_GLOBAL)
        ggml = ctypes.CDLL(str(library(folder, "ggml")), mode=ctypes.RTLD_GLOBAL)
        ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
        ggml.ggml_backend_load_all_from_path(str(folder).encode())
        self.ffi: Any = module.get_ffi()
        self.lib: Any = self.ffi.dlopen(str(library(folder, "llama")))
        self._quiet = self.ffi.callback(
            "void(enum ggml_log_level, const char*, void*)", lambda _level, _text, _data: None
        )
        self.lib.llama_log_set(self._quiet, self.ffi.NULL)


def library(folder: Path, name: str) -> Path:
    """The file of a shared library, such as libllama.so, libllama.so.0 or libllama.v0.5.0.so. Raises OSError."""
    found = sorted(file for file in folder.glob(f"lib{name}.*") if ".so" in file.name or file.suffix == ".dylib")
    if not found:
        raise OSError(f"{folder} has no lib{name}")
    return found[0]


class Model:
    """A GGUF file opened by llama.cpp, with an adapter or without."""

    def __init__(self, folder: Path, path: str, adapter: str | None) -> None:
        self._library = _Library(folder)
        self._ffi, self._lib = self._library.ffi, self._library.lib
        settings = self._lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = self._lib.llama_model_load_from_file(path.encode(), settings)
        if self._model == self._ffi.NULL:
            raise SystemExit(f"llama.cpp cannot open {path}")
        self._vocabulary = self._lib.llama_model_get_vocab(self._model)
        self._size = self._lib.llama_vocab_n_tokens(self._vocabulary)
        self._adapter = self._ffi.NULL
        if adapter is not None:
            self._adapter = self._lib.llama_adapter_lora_init(self._model, adapter.encode())
            if self._adapter == self._ffi.NULL:
                raise SystemExit(f"llama.cpp cannot open the adapter {adapter}")

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text, with control tokens recognized, without any added."""
        data = text.encode()
        room = self._ffi.new("llama_token[]", len(data) + 8)
        count = self._lib.llama_tokenize(self._vocabulary, data, len(data), room, len(data) + 8, False, True)
        return [room[at] for at in range(count)]

    def ends(self, token: int) -> bool:
        """Whether a token ends generation."""
        return bool(self._lib.llama_vocab_is_eog(self._vocabulary, token))

    def _context(self, length: int) -> Any:
        settings = self._lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = max(64, length)
        settings.n_threads = settings.n_threads_batch = _THREADS
        context = self._lib.llama_init_from_model(self._model, settings)
        if self._adapter != self._ffi.NULL:
            adapters = self._ffi.new("struct llama_adapter_lora *[1]", [self._adapter])
            if self._lib.llama_set_adapters_lora(context, adapters, 1, self._ffi.new("float[1]", [1.0])):
                raise SystemExit("llama.cpp cannot apply the adapter")
        return context

    def _decode(self, context: Any, tokens: list[int], begun: int) -> np.ndarray:
        """(T, V) float32 logits of tokens from position `begun` on."""
        batch = self._lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = token, begun + at, 1, 1
            batch.seq_id[at][0] = 0
        if self._lib.llama_decode(context, batch):
            raise SystemExit("llama.cpp cannot compute the model")
        rows = [self._lib.llama_get_logits_ith(context, at) for at in range(len(tokens))]
        logits = [np.frombuffer(self._ffi.buffer(row, self._size * 4), dtype=np.float32).copy() for row in rows]
        self._lib.llama_batch_free(batch)
        return np.stack(logits)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """(T, V) float32 logits."""
        context = self._context(len(tokens))
        result = self._decode(context, tokens, 0)
        self._lib.llama_free(context)
        return result

    def greedy(self, tokens: list[int], most: int) -> list[int]:
        """The most probable continuation, up to the token that ends it, at most `most` tokens."""
        context = self._context(len(tokens) + most)
        made: list[int] = []
        logits, done = self._decode(context, tokens, 0), len(tokens)
        while len(made) < most:
            token = int(logits[-1].argmax())
            made.append(token)
            if self.ends(token):
                break
            logits, done = self._decode(context, [token], done), done + 1
        self._lib.llama_free(context)
        return made


def quantize(folder: Path, source: str, target: str, kind: str) -> None:
    """Quantize a GGUF file to one of llama.cpp's types, such as q4_k_m."""
    found = _Library(folder)
    settings = found.ffi.new("struct llama_model_quantize_params *", found.lib.llama_model_quantize_default_params())
    settings.nthread, settings.ftype = _THREADS, QUANTIZED_BY_LLAMA_CPP[kind]
    if found.lib.llama_model_quantize(source.encode(), target.encode(), settings):
        raise SystemExit(f"llama.cpp cannot quantize {source} to {kind}")


def main(folder: str, job_file: str, result_file: str) -> None:
    """Do a job."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    if job.get("quantize"):
        quantize(Path(folder), job["model"], *job["quantize"])
        return
    model = Model(Path(folder), job["model"], job.get("adapter"))
    found: dict[str, np.ndarray] = {}
    for number, text in enumerate(job.get("texts", ())):
        found[f"text-{number}"] = np.array(model.tokenize(text), np.int64)
    for number, tokens in enumerate(job.get("tokens", ())):
        found[f"logits-{number}"] = model.logits(tokens)
    for number, tokens in enumerate(job.get("prompts", ())):
        found[f"answer-{number}"] = np.array(model.greedy(tokens, job["most"]), np.int64)
    found["ends"] = np.array([model.ends(token) for token in job.get("ends", ())], bool)
    np.savez(result_file, allow_pickle=False, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
