"""Runs the real llama.cpp, if it is installed, in a process of its own.

The functions are declared by the package llama-cpp-py-sync (the extra `gguf-check`), which also brings the libraries.
`MLX_NB_LLAMA_CPP` names another folder with libllama and libggml, for systems on which those cannot be loaded.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mlx_nb.errors import ModelError
from mlx_nb.export.llama_cpp_process import BINDINGS, library

FOLDER = "MLX_NB_LLAMA_CPP"
HOW_TO_INSTALL = (
    "pip install 'mlx-nb[gguf-check]' installs llama.cpp; on a system that is too old for its libraries, set "
    f"{FOLDER} to a folder with others"
)


def llama_cpp_folder() -> Path | None:
    """The folder of llama.cpp's libraries; None if it is not installed, or cannot be loaded on this system."""
    return _found(os.environ.get(FOLDER))


@cache
def _found(named: str | None) -> Path | None:
    spec = importlib.util.find_spec(BINDINGS)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(named) if named else Path(spec.submodule_search_locations[0])
    try:
        ctypes.CDLL(str(library(folder, "ggml-base")))  # another name than libllama, which would load all of it
    except OSError:
        return None
    return folder


def run_llama_cpp(job: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Do a job in llama.cpp. The keys of a job, all but `model` optional:

    model     path of a GGUF file
    adapter   path of a GGUF adapter
    texts     texts to tokenize: `text-0`, ... in the result
    tokens    lists of tokens: `logits-0` (T, V), ...
    prompts   lists of tokens to continue by at most `most` tokens: `answer-0`, ...
    ends      tokens: whether each ends generation
    quantize  (path to write, type): nothing else is done

    Raises ModelError with llama.cpp's words if it fails.
    """
    folder = llama_cpp_folder()
    if folder is None:
        raise ModelError(f"llama.cpp is not installed. {HOW_TO_INSTALL}.")
    with tempfile.TemporaryDirectory(prefix="mlx_nb-") as work:
        job_file, result = Path(work) / "job.json", Path(work) / "result.npz"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-m", "mlx_nb.export.llama_cpp_process", str(folder), str(job_file), str(result)]
        place = str(Path(__file__).parent.parent.parent)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (place, os.environ.get("PYTHONPATH"))))}
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
        if done.returncode != 0:
            last_line = done.stderr.strip().splitlines()[-1:] or [f"it ended with status {done.returncode}"]
            raise ModelError(f"llama.cpp did not accept {Path(str(job['model'])).name}: {last_line[0]}.")
        if not result.exists():
            return {}
        with np.load(result) as arrays:
            return dict(arrays)
