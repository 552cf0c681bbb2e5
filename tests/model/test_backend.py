"""What mlx computes with on this machine: a fast BLAS whoever imports mlx first, and a line that says so where not."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import mlx.core as mx
import pytest
from IPython.core.interactiveshell import InteractiveShell

from method_runs import run_of
from mlx_nb.errors import CheckpointError
from mlx_nb.model import backend
from mlx_nb.run.run import Run

LIBRARY = backend.prepare_backend().library
in_openblas = pytest.mark.skipif(LIBRARY is None, reason="OpenBLAS is loaded on Linux CPUs alone")
MLX_FIRST = "import mlx.core as mx; mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)));"
PRODUCT = """
import hashlib, json, mlx.core as mx, numpy as np
left, right = (mx.random.normal((300, 1000), key=mx.random.key(seed)) for seed in (1, 2))
found = np.array(left @ right.T)
assert np.allclose(found, np.array(left) @ np.array(right).T, atol=1e-3)
print(json.dumps([hashlib.sha256(found.tobytes()).hexdigest(), *facts]))
"""
WITH_MLX_NB = """
from mlx_nb.model.backend import prepare_backend
blas = prepare_backend()
facts = [blas.note, blas.threads, blas.warning]
"""


@pytest.fixture
def slow(monkeypatch):
    """A machine whose mlx is slow."""
    warning = "Training is slow: mlx was imported first. Restart the kernel."
    monkeypatch.setattr(backend, "_prepared", backend.Blas(None, "", warning=warning))
    return warning


def facts_of(code):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ}, capture_output=True, text=True, check=True, timeout=120
    )
    return json.loads(done.stdout)


@pytest.mark.long
@in_openblas
def test_products_are_those_of_the_fast_blas_whoever_imported_mlx_first():
    mlx_nb_first, mlx_first, alone = (
        facts_of(first + PRODUCT) for first in (WITH_MLX_NB, MLX_FIRST + WITH_MLX_NB, "facts = []")
    )
    assert mlx_first == mlx_nb_first
    assert mlx_first[1:] == ["OpenBLAS", LIBRARY.openblas_get_num_threads(), None]
    assert alone[0] != mlx_first[0]  # the reference BLAS rounds otherwise


@in_openblas
def test_an_mlx_that_cannot_be_redirected_is_left_as_it_was_and_reason_and_cure_are_reported(monkeypatch):
    def locked(mlx, library):
        assert mlx is mx
        raise OSError("its function table is locked")

    monkeypatch.setattr(backend, "redirect_blas_calls", locked)
    blas = backend._load_blas()
    assert blas.library is None
    assert blas.threads == 1
    assert "imported before mlx_nb" in blas.warning
    assert "function table is locked" in blas.warning
    assert "Restart the kernel" in blas.warning
    assert "\n" not in blas.warning


def test_a_machine_without_openblas_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(backend, "_candidates", list)
    monkeypatch.setattr(backend, "_installed", lambda package: package == "mlx-cpu")
    warning = backend._load_blas().warning
    assert "no OpenBLAS was found" in warning
    assert "pip install cmeel-openblas" in warning


@pytest.mark.parametrize(("platform", "package"), [("darwin", "mlx-cpu"), ("linux", "mlx-cuda-12"), ("linux", "none")])
def test_where_mlx_does_not_need_it_nothing_is_loaded_and_nothing_reported(monkeypatch, platform, package):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(backend, "_candidates", list)
    monkeypatch.setattr(backend, "_installed", lambda name: name == package)
    blas = backend._load_blas()
    assert (blas.path, blas.library, blas.warning) == (None, None, None)


def test_loading_the_extension_says_in_one_line_that_mlx_is_slow(slow, capsys):
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "mlx_nb")
    shell.run_line_magic("unload_ext", "mlx_nb")
    assert capsys.readouterr().out == f"mlx_nb: {slow}\n"


def test_loading_the_extension_is_silent_where_mlx_is_fast(monkeypatch, capsys):
    monkeypatch.setattr(backend, "_prepared", backend.Blas(None, ""))
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "mlx_nb")
    shell.run_line_magic("unload_ext", "mlx_nb")
    assert capsys.readouterr().out == ""


def test_notes_and_panel_of_a_run_say_that_mlx_is_slow(slow, tmp_path, tiny_folder):
    run = run_of("sft", tmp_path, tiny_folder, iters=1)
    panel = run.panel()
    assert list(panel.head["notes"][0]) == [True, slow]
    assert slow in run.trainer.notes
    run.run()
    assert run.history.started.notes[0] == slow


def test_a_resume_that_the_device_prevents_says_why(tmp_path, tiny_folder, monkeypatch):
    run = run_of("sft", tmp_path, tiny_folder, iters=2)
    run.step()
    run.checkpoint()
    warning = "Training is slow: mlx was imported first. Restart the kernel."
    monkeypatch.setattr(backend, "_prepared", backend.Blas(None, "", threads=run_threads() + 1, warning=warning))
    with pytest.raises(CheckpointError, match="CPU, lanes: ") as refused:
        Run.resume(run.folder, data=run.config.data)
    assert warning in str(refused.value)
    assert f"lanes: {run_threads() - 1} then" in str(refused.value)
    assert f"lanes: {run_threads()} now" in str(refused.value)


def run_threads():
    return backend.prepare_backend().threads


@pytest.mark.long
def test_importing_mlx_lm_says_nothing_and_gives_the_environment_back():
    code = (
        "import os; from mlx_nb.model.mlx_lm_import import import_mlx_lm; before = dict(os.environ); import_mlx_lm(); "
        "assert dict(os.environ) == before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.long
def test_loading_a_tokenizer_alone_or_in_pieces_says_nothing_either():
    code = (
        "import os; from mlx_nb.model.mlx_lm_import import import_tokenizers; before = dict(os.environ); "
        "list(import_tokenizers()); assert dict(os.environ) == before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
