"""The wheel holds all that an installed package needs: its data files, and the example of `mlx-nb quickstart`."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mlx_nb
from mlx_nb.view.panel.panel import PARTS

PACKAGE = Path(mlx_nb.__file__).parent
ROOT = PACKAGE.parent

COPY = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from mlx_nb.notebook import quickstart
assert Path(quickstart.__file__).is_relative_to(sys.argv[1]), quickstart.__file__
print(quickstart._copy_example(Path.cwd() / "example"))
"""


pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    build = [sys.executable, "-m", "pip", "wheel", str(ROOT), *options]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_every_file_of_the_package_is_in_it_and_nothing_of_the_tests(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    there = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert there - names == set()
    assert {"mlx_nb/py.typed", *(f"mlx_nb/view/panel/page/{part}" for part in (*PARTS, "panel.css"))} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mlx_nb"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_quickstart_s_example_comes_out_of_it_in_an_empty_folder(wheel, tmp_path):
    inside, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(inside)
    done = subprocess.run(
        [sys.executable, "-I", "-c", COPY, str(inside)], cwd=empty, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    original = ROOT / "example_notebooks"
    assert (empty / "example" / "01_quickstart.ipynb").read_bytes() == (original / "01_quickstart.ipynb").read_bytes()
    for rows in ("train", "valid", "test"):
        name = f"home_requests/{rows}.jsonl"
        assert (empty / "example" / name).read_bytes() == (original / name).read_bytes()
