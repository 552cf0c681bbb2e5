"""What earlier runs leave on disk is said, bounded by a rule, and removed by hand; a file of a person's never is."""

from __future__ import annotations

import gc
import os
import re
import shlex

import pytest

from folder_lives import make, seeds_in
from mlx_nb import Run
from mlx_nb.cli import main
from mlx_nb.errors import CommandError, FolderTaken
from mlx_nb.files.folder_lock import FolderLock
from mlx_nb.files.kept_runs import others_in, own_files
from mlx_nb.notebook.commands import run_line
from mlx_nb.notebook.session import Session
from tiny import tiny_rows


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sizes_in(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def run_seeds(tiny_folder, *seeds, **settings):
    """The notes of the last of these runs, each to its end in the same folder."""
    for seed in seeds:
        run = make(tiny_folder, seed=seed, **settings)
        run.run()
    return run.trainer.notes


def kept_seeds(here):
    return {path.name: seeds_in(path) for path in (here / "adapters").iterdir() if (path / "checkpoints").is_dir()}


@pytest.mark.long
def test_a_rerun_says_how_large_the_kept_folder_is_and_the_command_it_names_removes_it(here, tiny_folder, capsys):
    (note,) = [note for note in run_seeds(tiny_folder, 1, 2) if "is now in" in note]
    kept = here / "adapters/run.previous-1"
    assert f"is now in {kept}, with the rest of its run: {sum(sizes_in(kept).values()) / 1e6:,.1f} MB." in note
    command = re.search(r"`mlx-nb (delete [^`]*)`", note)[1]
    assert main(shlex.split(command)) == 0
    assert not kept.exists()
    assert kept_seeds(here) == {"run": {2}}


@pytest.mark.long
def test_of_the_earlier_runs_of_a_folder_the_newest_are_kept_and_removals_are_reported(here, tiny_folder):
    notes = run_seeds(tiny_folder, 1, 2, 3, 4, 5)
    assert kept_seeds(here) == {"run": {5}, "run.previous-3": {3}, "run.previous-4": {4}}
    assert not (here / "adapters/run.previous-2").exists()
    assert [note for note in notes if "previous-2 (" in note and "the 2 newest are kept (`keep_previous`)" in note]
    run_seeds(tiny_folder, 6, keep_previous=1)
    assert kept_seeds(here) == {"run": {6}, "run.previous-5": {5}}
    run_seeds(tiny_folder, 7, 8, 9, 10, keep_previous=None)
    assert [next(iter(kept_seeds(here)[f"run.previous-{number}"])) for number in range(5, 10)] == [5, 6, 7, 8, 9]


def put_file(place):
    (place / "notes.md").write_text("mine")


def put_into_checkpoint(place):
    (next((place / "checkpoints").glob("save-*")) / "mine.safetensors").write_bytes(b"mine")


def put_link(place):
    (place / "best/link").symlink_to(place)


def put_folder(place):
    (place / "checkpoints/mine").mkdir()


def changed_adapter(place):
    content = (place / "adapters.safetensors").read_bytes()
    (place / "adapters.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def changed_checkpoint(place):
    path = next(place.glob("checkpoints/save-*/parameters.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\7")


FOREIGN = [put_file, put_into_checkpoint, put_link, put_folder, changed_adapter, changed_checkpoint]


@pytest.mark.parametrize("change", FOREIGN, ids=lambda change: change.__name__)
@pytest.mark.matrix(every=6)
def test_a_folder_with_anything_that_mlx_nb_did_not_write_stays_whole(change, here, tiny_folder):
    run_seeds(tiny_folder, 1, 2)
    place = here / "adapters/run.previous-1"
    change(place)
    before = {path: os.lstat(path).st_size for path in place.rglob("*")}
    notes = run_seeds(tiny_folder, 3, 4, keep_previous=1)
    assert {path: os.lstat(path).st_size for path in place.rglob("*")} == before
    assert [note for note in notes if f"{place} stays, although" in note]
    assert kept_seeds(here) == {"run": {4}, "run.previous-3": {3}, "run.previous-1": {1}}


@pytest.mark.long
def test_a_folder_that_a_run_is_in_stays(here, tiny_folder):
    run_seeds(tiny_folder, 1, 2)
    resumed = Run.resume("adapters/run.previous-1", data=tiny_rows())
    run_seeds(tiny_folder, 3, keep_previous=1)
    assert resumed.finished
    assert "run.previous-1" in kept_seeds(here)
    del resumed
    gc.collect()
    lock = FolderLock(here / "adapters/run.previous-1", "of another")
    assert lock.take() is None
    run_seeds(tiny_folder, 4, keep_previous=1)
    assert "run.previous-1" in kept_seeds(here)
    lock.release()
    run_seeds(tiny_folder, 5, keep_previous=1)
    assert kept_seeds(here) == {"run": {5}, "run.previous-4": {4}}


@pytest.mark.long
def test_every_file_of_a_run_is_known_as_its_own(here, tiny_folder):
    run = make(tiny_folder, save_every=1)
    run.step(2)
    run.report()
    run.release()
    Run.resume("adapters/run", data=tiny_rows()).run()
    own = own_files(here / "adapters/run")
    assert own == sizes_in(here / "adapters/run")
    assert others_in(here / "adapters/run", own) == []


# By hand


@pytest.mark.long
def test_runs_on_disk_are_listed_with_their_bytes(here, tiny_folder, capsys):
    run_seeds(tiny_folder, 1, 2)
    elsewhere = make(tiny_folder, "elsewhere", adapter_path="out/here")
    elsewhere.run(until=3)
    elsewhere.checkpoint()
    session = Session()
    session.add(elsewhere)
    said = str(run_line(session, "runs --disk"))
    rows = {line.split()[0]: line.split() for line in said.splitlines()}
    total = 0
    for folder, name, update in (
        ("adapters/run", "run", "4"),
        ("adapters/run.previous-1", "run", "4"),
        ("out/here", "elsewhere", "3"),
    ):
        size = sum(size for path, size in sizes_in(here / folder).items() if not path.endswith("/lock"))
        assert rows[folder] == [folder, name, update, f"{size / 1e6:,.1f}", "MB"]
        total += size
    assert f"{total / 1e6:,.1f} MB in total" in said
    assert main(["runs", "--disk"]) == 0
    assert "adapters/run.previous-1" in capsys.readouterr().out
    assert main(["runs"]) == 0
    assert "MB" not in capsys.readouterr().out


def test_delete_says_what_it_would_remove_and_removes_only_what_the_run_wrote(here, tiny_folder):
    run_seeds(tiny_folder, 1, 2)
    session = Session()
    place = here / "adapters/run.previous-1"
    put_file(place)
    put_into_checkpoint(place)
    (mine,) = place.rglob("mine.safetensors")
    before = sizes_in(here)
    said = str(run_line(session, "delete run.previous-1"))
    own = {name: size for name, size in sizes_in(place).items() if not name.endswith(("notes.md", "mine.safetensors"))}
    assert f"would delete {len(own)} files ({sum(own.values()) / 1e6:,.1f} MB) of the run 'run' in {place}" in said
    assert "notes.md" in said
    assert sizes_in(here) == before
    said = str(run_line(session, "delete run.previous-1 --yes"))
    assert said.startswith(f"Deleted {len(own)} files")
    assert sizes_in(place) == {"notes.md": 4, mine.relative_to(place).as_posix(): 4}
    assert seeds_in(here / "adapters/run") == {2}
    run_line(session, "delete adapters/run --yes")
    assert [path.name for path in (here / "adapters").iterdir()] == ["run.previous-1"]


def test_delete_refuses_a_live_run_and_what_is_none(here, tiny_folder):
    run = make(tiny_folder)
    run.step()
    session = Session()
    session.add(run)
    before = sizes_in(here)
    for words in ("delete run", "delete run --yes", "delete adapters/run --yes"):
        with pytest.raises(FolderTaken, match=r"in use by the run 'run' of this process.*nothing was deleted"):
            run_line(session, words)
    (here / "notes").mkdir()
    (here / "notes/adapters.safetensors").write_bytes(b"mine")
    for words in ("delete notes --yes", "delete adapters --yes", "delete rum --yes"):
        with pytest.raises(CommandError, match="there is no run in") as error:
            run_line(session, words)
        assert "\n" not in str(error.value)
    assert {name: size for name, size in sizes_in(here).items() if name in before} == before
    assert (here / "notes/adapters.safetensors").read_bytes() == b"mine"
    run.run()
    assert str(run_line(session, "delete run --yes")).startswith("Deleted")
    assert not (here / "adapters/run").exists()
