"""No run, adapter or report is written among the files of another run, nor where no file can be."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from folder_lives import make
from mlx_nb import Run
from mlx_nb.errors import CommandError, ConfigError, DataError, FolderError, FolderTaken, MlxNbError, ModelError
from mlx_nb.events import RunFinished
from mlx_nb.files.cache_folder import cache_folder
from mlx_nb.files.places import path_problem, refuse_among_files
from mlx_nb.notebook.commands import run_line
from mlx_nb.notebook.quickstart import run_quickstart
from mlx_nb.notebook.session import Session
from places import SUPPORT
from tiny import tiny_rows


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def nothing_loads(monkeypatch):
    monkeypatch.setattr("mlx_nb.model.shared_base.load_in_pieces", lambda *_args, **_options: pytest.fail("loaded"))


def contents(folder):
    """Bytes by path of every file, links not followed."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()]
    return {path: os.readlink(path) if path.is_symlink() else path.read_bytes() for path in paths}


def refused(call, kind, match):
    """The message of the error that a call raises, which is one line."""
    with pytest.raises(kind, match=match) as error:
        call()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    return str(error.value)


# Among the files of another run

AMONG = [
    "adapters/other/best",
    "adapters/other/checkpoints",
    "adapters/other/checkpoints/x",
    "adapters/other/checkpoints/{save}",
    "adapters/other/.mlx_nb",
    "adapters/other/.mlx_nb/deeper",
    "adapters/other/0000099_adapters.safetensors",
    "adapters/other/report.html/x",
    "adapters/../adapters/other/best",
    "link/best",
    "to_best",
    "to_checkpoints/x",
]


@pytest.mark.parametrize("path", AMONG)
@pytest.mark.matrix(every=12)
def test_a_path_among_the_files_of_another_run_is_refused_before_anything_is_loaded(
    path, here, tiny_folder, monkeypatch
):
    other = make(tiny_folder, "other")
    other.run()
    (here / "link").symlink_to("adapters/other")
    (here / "to_best").symlink_to("adapters/other/best")
    (here / "to_checkpoints").symlink_to(here / "adapters/other/checkpoints")
    path = path.format(save=other.checkpoints()[-1].path.name)
    before = contents(here)
    one = make(tiny_folder, "one")
    one.step()
    ones = contents(here)
    match = r"lies among the files of the run 'other' in .*other, so nothing was written there\. Give another place"
    for whole in (path, str(here / path)):
        refused(lambda path=whole: one.save(path), FolderTaken, match)
        refused(lambda path=whole: one.report(path), CommandError, match)
        refused(lambda path=whole: one.fork(adapter_path=path).run(), FolderTaken, match)
    assert contents(here) == ones
    with monkeypatch.context() as patch:
        patch.setattr("mlx_nb.model.shared_base.load_in_pieces", lambda *_args, **_options: pytest.fail("loaded"))
        for whole in (path, str(here / path)):
            said = refused(make(tiny_folder, "new", adapter_path=whole).run, FolderTaken, match)
            refused(lambda path=whole: make(tiny_folder, "new").save(path), FolderTaken, match)
            refused(lambda path=whole: run_quickstart(path), FolderTaken, match)
    assert {name: it for name, it in contents(here).items() if name in before} == before
    free = said.split("such as ")[1].rstrip(".")
    assert isinstance(make(tiny_folder, "new", adapter_path=free).run(), RunFinished)
    assert {name: it for name, it in contents(here).items() if name in before} == before


def test_a_save_or_report_among_the_files_of_the_run_itself_is_refused(here, tiny_folder, nothing_loads):
    run = make(tiny_folder)
    for path in ("adapters/run/best", "adapters/run/checkpoints", "adapters/run/checkpoints/x", "adapters/run/.mlx_nb"):
        refused(lambda path=path: run.save(path), FolderTaken, "among the files of the run 'run'")
        refused(lambda path=path: run.report(f"{path}/page.html"), CommandError, "among the files of the run 'run'")
    refused(lambda: run.report("adapters/run/adapters.safetensors"), CommandError, "among the files of the run 'run'")
    assert list(here.iterdir()) == []


@pytest.mark.long
def test_the_runs_own_report_is_the_same_by_its_path(here, tiny_folder):
    run = make(tiny_folder)
    run.run()
    assert run.report() == run.report("adapters/run/report.html") == run.report()


OTHER = """
import sys
sys.path.insert(0, {tests!r})
from mlx_nb.model.backend import prepare_backend
prepare_backend()
from folder_lives import make
run = make({model!r}, "other", iters=1000)
for progress in run.load():
    print("loading", flush=True)
    sys.stdin.readline()
    break
"""


@pytest.mark.long
def test_a_run_of_another_process_counts_before_it_has_written_anything(here, tiny_folder):
    code = OTHER.format(tests=str(SUPPORT), model=str(tiny_folder))
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "loading\n"
        assert [path.name for path in (here / "adapters/other").iterdir()] == [".mlx_nb"]
        refused(make(tiny_folder, adapter_path="adapters/other/best").run, FolderTaken, "files of the run 'other'")
        assert not (here / "adapters/other/best").exists()
    finally:
        process.kill()
        process.wait()
    assert isinstance(make(tiny_folder, adapter_path="adapters/other/best").run(), RunFinished)


def test_a_folder_with_another_run_where_this_one_would_write_is_refused(here, tiny_folder, nothing_loads, request):
    (here / "adapters").mkdir()
    for inner in ("best", "checkpoints", "checkpoints/x"):
        folder = here / "adapters" / inner.replace("/", "-")
        run = make(tiny_folder, "inner", adapter_path=str(folder / inner))
        run.home.take()
        run.home.begin()
        before = contents(here)
        said = refused(make(tiny_folder, adapter_path=str(folder)).run, FolderTaken, "is the folder of the run 'inner'")
        assert said.endswith(f"such as {folder}-2.")
        assert contents(here) == before
        run.release()
    refused(make(tiny_folder, adapter_path=str(here / "adapters/best")).run, FolderTaken, "the run 'inner'")


def test_a_link_in_the_place_of_its_own_folders_leads_into_no_other_run(here, tiny_folder):
    make(tiny_folder, "other").run()
    for name, target in (("best", ""), ("best", "best"), ("checkpoints", "checkpoints")):
        folder = here / f"{name}-{target}"
        folder.mkdir()
        (folder / name).symlink_to(here / "adapters/other" / target)
        before = contents(here)
        refused(make(tiny_folder, adapter_path=str(folder)).run, FolderError, r"'other'|mlx_nb did not write it")
        assert contents(here) == before


@pytest.mark.long
def test_a_folder_that_holds_runs_and_one_inside_a_run_under_a_name_of_the_user_stay_allowed(here, tiny_folder):
    for name in ("one", "two"):
        make(tiny_folder, name).run()
    before = contents(here / "adapters")
    assert isinstance(make(tiny_folder, adapter_path="adapters").run(), RunFinished)
    assert isinstance(make(tiny_folder, "three").run(), RunFinished)
    assert isinstance(make(tiny_folder, adapter_path="adapters/one/inner").run(), RunFinished)
    after = contents(here / "adapters")
    assert {path: after.get(path) for path in before} == before
    saved = Run.resume("adapters/one", data=tiny_rows())
    assert saved.save("out") == here / "out"
    assert saved.save("out/best") == here / "out/best"  # a saved adapter has no best/ of its own


# Where nothing can be

IMPOSSIBLE = {
    "deep": "x/" * 1200,
    "deeper than any path": "x/" * 3000,
    "in a device": "/dev/null/x",
    "long name": f"a/{'y' * 256}",
    "long path": ("y" * 200 + "/") * 30,
    "a file": "file",
    "in a file": "file/a/b",
    "loop": "loop",
    "in a loop": "loop/a",
    "link to where nothing can be": "dangling",
    "null character": "a\0b",
    "half a surrogate pair": "a\ud800b",
    "home of nobody": "~nobody-of-that-name/a",
}
CANNOT_BE = "cannot be|bytes in it, which no folder|no checkpoint|is a link|is not a report"


@pytest.mark.parametrize("what", IMPOSSIBLE)
@pytest.mark.matrix(every=7)
def test_a_path_where_nothing_can_be_is_a_one_line_error_wherever_it_is_given(
    what, here, tiny_folder, monkeypatch, capsys
):
    (here / "file").write_text("a file")
    (here / "loop").symlink_to("loop")
    (here / "dangling").symlink_to("/proc/nowhere/x")
    base = make(tiny_folder, "base", iters=1)
    base.run()
    session = Session()
    session.add(base)
    before, path = contents(here), IMPOSSIBLE[what]
    refused(lambda: base.save(path), MlxNbError, CANNOT_BE)
    refused(lambda: run_line(session, f"save '{path}'"), MlxNbError, CANNOT_BE)
    refused(lambda: base.report(path), CommandError, CANNOT_BE)
    refused(lambda: base.fork(adapter_path=path).run(), MlxNbError, CANNOT_BE)
    refused(lambda: Run.resume(path, data=tiny_rows()), MlxNbError, CANNOT_BE)
    refused(lambda: run_line(session, f"resume '{path}'"), MlxNbError, CANNOT_BE)
    if what not in ("a file",):
        refused(lambda: run_quickstart(path), MlxNbError, CANNOT_BE)
    monkeypatch.setattr("mlx_nb.model.shared_base.load_in_pieces", lambda *_args, **_options: pytest.fail("loaded"))

    def train():
        run = make(tiny_folder, adapter_path=path)
        try:
            run.run()
        finally:
            run.release()

    refused(train, (FolderError, ConfigError), CANNOT_BE)
    assert contents(here) == before
    assert sorted(entry.name for entry in here.iterdir()) == ["adapters", "dangling", "file", "loop"]


@pytest.mark.parametrize("what", ["deep", "long name", "long path", "home of nobody"])
def test_rows_an_adapter_and_the_cache_are_not_looked_for_there_either(what, here, tiny_folder, monkeypatch):
    path = IMPOSSIBLE[what]
    refused(make(tiny_folder, data=path).run, DataError, "cannot be a file or folder")
    refused(lambda: make(tiny_folder, resume_adapter_file=path), ModelError, "cannot be a file or folder")
    monkeypatch.setenv("MLX_NB_CACHE", path)
    refused(cache_folder, ModelError, "the cache cannot be in .*Set MLX_NB_CACHE to another folder")


def test_a_cell_with_an_impossible_folder_leaves_the_run_of_its_name_as_it_is(here, tiny_folder):
    session = Session()
    first = make(tiny_folder)
    session.add(first)
    first.step()
    refused(lambda: session.add(make(tiny_folder, adapter_path="x/" * 1200)), FolderError, "folders deep")
    assert session.get() is first
    assert isinstance(first.run(), RunFinished)


def test_the_deepest_and_longest_path_that_is_allowed_works(here, tiny_folder):
    deep = "/".join(["d"] * (199 - len(here.parts)))
    assert path_problem(here / deep) is None
    assert isinstance(make(tiny_folder, adapter_path=deep).run(), RunFinished)
    with pytest.raises(FolderError, match="folders deep"):
        make(tiny_folder, adapter_path=f"{deep}/d/d").run()
    refuse_among_files(here / deep / "mine")
