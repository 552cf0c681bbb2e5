"""What mlx_nb keeps track of in a folder has fixed names; a person's file of such a name is never written over."""

from __future__ import annotations

import json
import os

import pytest

from folder_lives import make
from mlx_nb import Run
from mlx_nb.errors import FolderError, MlxNbError
from mlx_nb.events import RunFinished, RunPaused
from mlx_nb.files.cache_folder import damage, make_once
from mlx_nb.notebook.quickstart import _copy_example, _example_files
from tiny import save_tiny_model, tiny_rows


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    paths = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()]
    return {path: os.readlink(path) if path.is_symlink() else path.read_bytes() for path in paths}


MINE = {
    "written.jsonl": b'{"date": "2026-01-01", "text": "dear diary"}\n',
    "written.jsonl of another kind": b"line one\nline two\n",
    "written.jsonl, not UTF-8": b"\xff\xfe\x00",
    "lock": b"pid 12\n",
    "moving": b"boxes: 12\n",
    "moving, a path": b"/srv/removal-van",
    "moving, not UTF-8": b"\xff\xfe",
    "arriving": b"train at 12:30",
}


def refused(call):
    with pytest.raises(MlxNbError, match=r"\.mlx_nb.* mlx_nb did not write it") as error:
        call()
    assert isinstance(error.value, FolderError)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("what", MINE)
@pytest.mark.parametrize("how", ["file", "link", "folder link"])
@pytest.mark.matrix(every=8)
def test_a_users_file_of_that_name_is_neither_overwritten_nor_removed(what, how, here, tiny_folder, monkeypatch):
    base = make(tiny_folder, "base", iters=1)
    base.run()
    name = what.partition(",")[0].partition(" ")[0]
    folder, diary = here / "project", here / "diary"
    folder.mkdir()
    diary.mkdir()
    (diary / name).write_bytes(MINE[what])
    if how == "folder link":
        (folder / ".mlx_nb").symlink_to(diary)
    else:
        (folder / ".mlx_nb").mkdir()
        (folder / ".mlx_nb" / name).write_bytes(MINE[what])
        if how == "link":
            (folder / ".mlx_nb" / name).unlink()
            (folder / ".mlx_nb" / name).symlink_to(diary / name)
    before = contents(here)
    refused(lambda: base.save("project"))
    monkeypatch.setattr("mlx_nb.model.shared_base.load_in_pieces", lambda *_args, **_options: pytest.fail("loaded"))
    refused(make(tiny_folder, adapter_path="project").run)
    assert contents(here) == before


def test_a_file_in_the_place_of_the_marks_or_a_link_that_leads_nowhere_stays(here, tiny_folder):
    for number, make_it in enumerate(
        (
            lambda path: path.write_bytes(b"mine"),
            lambda path: path.symlink_to(here / "nowhere"),
            lambda path: (path.mkdir(), (path / "written.jsonl").symlink_to(here / "nowhere.jsonl")),
            lambda path: (path.mkdir(), (path / "lock").symlink_to(here / "nowhere.lock")),
        )
    ):
        folder = here / f"project-{number}"
        folder.mkdir()
        make_it(folder / ".mlx_nb")
        before = contents(here)
        refused(make(tiny_folder, adapter_path=str(folder)).run)
        assert contents(here) == before
    assert not list(here.glob("nowhere*"))


def test_a_list_that_is_replaced_while_a_run_continues_is_not_overwritten(here, tiny_folder):
    run = make(tiny_folder, iters=6)
    run.step(1)
    path = here / "adapters/run/.mlx_nb/written.jsonl"
    path.write_bytes(b"dear diary\n")
    ended = run.run()
    assert isinstance(ended, RunPaused)
    assert "mlx_nb did not write it" in ended.reason
    assert path.read_bytes() == b"dear diary\n"
    path.unlink()
    assert isinstance(run.run(), RunFinished)


@pytest.mark.long
def test_what_a_process_that_died_left_of_its_own_is_taken_for_that(here, tiny_folder):
    for name, content in (("written.jsonl", b'{"run": "012'), ("written.jsonl", b""), ("lock", b'{"run": "run", "p')):
        folder = here / f"left-{len(content)}"
        (folder / ".mlx_nb").mkdir(parents=True)
        (folder / ".mlx_nb" / name).write_bytes(content)
        assert isinstance(make(tiny_folder, adapter_path=str(folder)).run(), RunFinished)
        assert Run.resume(folder, data=tiny_rows()).finished


# Elsewhere


def test_the_quickstart_replaces_no_link(here):
    first = _copy_example(here / "first").parent
    (here / "second").mkdir()
    (here / "second" / _example_files()[0]).symlink_to(first / _example_files()[0])
    assert _copy_example(here / "second").parent == here / "second-2"
    assert (here / "second" / _example_files()[0]).is_symlink()


def test_a_folder_of_the_user_beside_cached_models_is_not_swept_away(here):
    source = save_tiny_model(here / "source")

    def make_model(work):
        (work / "model").mkdir()
        for file in source.iterdir():
            (work / "model" / file.name).write_bytes(file.read_bytes())
        return work / "model"

    kept = [here / "cache" / name for name in (".backup-0123abcd", ".thesis.work")]
    for folder in kept:
        (folder / "chapters").mkdir(parents=True)
        (folder / "chapters/one.tex").write_text("mine")
        os.utime(folder, (0, 0))
    folder = make_once(here / "cache/tiny", make_model)
    assert [(one / "chapters/one.tex").read_text() for one in kept] == ["mine", "mine"]
    (folder / "notes.md").write_text("mine")
    (folder / "config.json").write_text("{")
    assert damage(make_once(folder, make_model)) is None
    assert json.loads((folder / "config.json").read_text())
    assert (folder / "notes.md").read_text() == "mine"
