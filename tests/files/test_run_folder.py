"""The folder of a run has one writer, who touches only what mlx_nb wrote; and it stays where it was."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from every_line import interrupted_at
from fault_count import part_of
from folder_lives import make, seeds_in
from mlx_nb import Run, RunConfig
from mlx_nb.errors import CheckpointError, CommandError, ConfigError, FolderError, FolderTaken, MlxNbError
from mlx_nb.events import RunFinished, RunPaused
from mlx_nb.files import folder_lock
from mlx_nb.files.folder_lock import FolderLock
from mlx_nb.notebook.session import Session
from mlx_nb.train.checkpoint_store import CheckpointStore
from places import SUPPORT
from tiny import save_tiny_model, tiny_pairs, tiny_rows


def digests(folder):
    """SHA-256 by path of every file, links not followed; links by where they lead."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_symlink():
            found[path] = os.readlink(path)
        elif path.is_file():
            found[path] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("where", ["take", "release"])
def test_an_interrupt_at_any_moment_leaves_a_folder_that_can_be_taken_again(here, where):
    moments = 0
    while True:
        folder = here / where / str(moments)
        lock = FolderLock(folder, "run")
        if where == "release":
            assert lock.take() is None
        if not interrupted_at(moments + 1, getattr(lock, where), folder_lock.__file__):
            break
        moments += 1
        assert lock.take() is None, f"moment {moments}: the run that was interrupted cannot go on"
        lock.release()
        assert FolderLock(folder, "other").take() is None, f"moment {moments}: nobody else can have it"
    assert moments > 10


# Numbered adapters


@pytest.mark.long
def test_of_numbered_adapters_the_newest_stay_and_every_one_that_this_run_did_not_write(here, tiny_folder):
    run = make(tiny_folder, iters=9, save_every=1, keep=2)

    def numbers():
        return sorted(int(path.name[:7]) for path in run.folder.glob("*_adapters.safetensors"))

    run.step(3)
    assert numbers() == [2, 3]
    mine, changed = (run.folder / f"000000{number}_adapters.safetensors" for number in (1, 2))
    mine.write_bytes(b"mine")
    changed.write_bytes(b"changed")
    run.step(2)
    assert numbers() == [1, 2, 4, 5]
    assert (mine.read_bytes(), changed.read_bytes()) == (b"mine", b"changed")
    # The newest are those that were written last, and after a rewind not the highest.
    run.rewind(to=3)
    run.step()
    assert numbers() == [1, 2, 3, 4]
    run.release()
    resumed = Run.resume(run.folder, data=tiny_rows())
    resumed.run()
    assert numbers() == [1, 2, 7, 8]
    assert (run.folder / "adapters.safetensors").is_file()
    assert (run.folder / "best" / "adapters.safetensors").is_file()


# One writer

OTHER = """
import sys
import time
sys.path.insert(0, {tests!r})
from mlx_nb.model.backend import prepare_backend
prepare_backend()
from folder_lives import make
run = make({model!r}, iters=1000, seed=7)
run.step(2)
print("holds", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def other_process(here, tiny_folder):
    """A process whose run of the default name has done two updates and waits."""
    code = OTHER.format(tests=str(SUPPORT), model=str(tiny_folder))
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.long
def test_a_folder_in_use_is_refused_before_anything_is_loaded_and_a_dead_owner_is_followed(
    other_process, here, tiny_folder, monkeypatch
):
    before = digests(here / "adapters/run")
    who = rf"held by the run 'run' of process {other_process.pid}.*--name"
    with monkeypatch.context() as patch:
        patch.setattr("mlx_nb.model.shared_base.load_in_pieces", lambda *_args, **_options: pytest.fail("loaded"))
        with pytest.raises(FolderTaken, match=who) as error:
            make(tiny_folder).run()
        one_line(error)
        with pytest.raises(FolderTaken, match="held by"):
            Run.resume("adapters/run", data=tiny_rows())
    elsewhere = make(tiny_folder, "elsewhere")
    elsewhere.step()
    with pytest.raises(FolderTaken, match="held by"):
        elsewhere.save("adapters/run")
    assert digests(here / "adapters/run") == before
    os.kill(other_process.pid, signal.SIGKILL)
    other_process.wait()
    theirs = (here / "adapters/run/adapters.safetensors").read_bytes()
    assert Run.resume("adapters/run", data=tiny_rows()).config.seed == 7
    run = make(tiny_folder)
    assert isinstance(run.run(), RunFinished)
    assert (here / "adapters/run.previous-1/adapters.safetensors").read_bytes() == theirs
    assert Run.resume("adapters/run.previous-1", data=tiny_rows()).config.seed == 7


def test_a_forked_child_is_refused_and_its_end_frees_nothing(here, tiny_folder):
    run = make(tiny_folder)
    run.step()
    child = os.fork()
    if child == 0:
        try:
            run.checkpoint()
        except FolderTaken:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert run.home.held
    with pytest.raises(FolderTaken):
        make(tiny_folder).run()
    assert isinstance(run.run(), RunFinished)


@pytest.mark.long
def test_on_a_disk_without_locks_a_living_process_counts_and_a_dead_or_renumbered_one_does_not(
    here, tiny_folder, monkeypatch
):
    def cannot(_descriptor, _operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", cannot)
    first = make(tiny_folder)
    first.step()
    lock = here / "adapters/run/.mlx_nb/lock"
    holder = json.loads(lock.read_text())
    assert (holder["pid"], holder["run"]) == (os.getpid(), "run")
    with pytest.raises(FolderTaken, match="this process"):
        make(tiny_folder).run()
    shutil.rmtree(here / "adapters")
    first.release()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for gone in ({"pid": ended.pid}, {"pid": os.getpid(), "started": "1"}):
        shutil.rmtree(here / "adapters", ignore_errors=True)
        lock.parent.mkdir(parents=True)
        lock.write_text(json.dumps({**holder, **gone}))
        assert isinstance(make(tiny_folder).run(), RunFinished)
    shutil.rmtree(here / "adapters")
    lock.parent.mkdir(parents=True)
    lock.write_text(json.dumps({**holder, "host": "another-machine", "pid": ended.pid}))
    with pytest.raises(FolderTaken, match=f"process {ended.pid} on another-machine"):
        make(tiny_folder).run()


@pytest.mark.long
def test_a_second_run_of_the_process_is_refused_while_the_first_has_something_to_lose(here, tiny_folder):
    first = make(tiny_folder, iters=6)
    first.step(1)
    second = make(tiny_folder, seed=2)
    with pytest.raises(FolderTaken, match="held by the run 'run' of this process"):
        second.run()
    assert isinstance(first.run(), RunFinished)
    kept = (here / "adapters/run/adapters.safetensors").read_bytes()
    assert isinstance(second.run(), RunFinished)
    assert (here / "adapters/run.previous-1/adapters.safetensors").read_bytes() == kept
    seconds = digests(here)
    for write in (first.save, first.checkpoint, first.report):
        with pytest.raises(FolderTaken, match=r"holds another run, 'run', by now\. `run\.save\(FOLDER\)`"):
            write()
    assert digests(here) == seconds
    first.save("first")
    assert (here / "first/adapters.safetensors").read_bytes() == kept


def test_a_run_resumed_in_the_same_process_continues_where_the_first_was_saved_at_once(here, tiny_folder):
    first = make(tiny_folder, iters=6)
    first.step(3)
    second = Run.resume("adapters/run", data=tiny_rows())
    assert second.step_count == 3
    assert [info.kind for info in second.checkpoints()][-1] == "exit"
    with pytest.raises(FolderTaken, match="resumed in this process"):
        first.run()
    assert isinstance(second.run(), RunFinished)


def test_a_run_replaced_in_the_notebook_is_saved_and_writes_no_more(here, tiny_folder):
    session = Session()
    first = make(tiny_folder, iters=6)
    session.add(first)
    first.step(3)
    second = make(tiny_folder, seed=2)
    session.add(second)
    assert (first.checkpoints()[-1].step, first.checkpoints()[-1].kind) == (3, "exit")
    second.run()
    with pytest.raises(FolderTaken, match="replaced by a new run"):
        first.run()
    assert Run.resume("adapters/run.previous-1", data=tiny_rows()).step_count == 3


@pytest.mark.long
def test_a_folder_replaced_under_a_live_run_is_not_written_and_the_run_continues_elsewhere(here, tiny_folder):
    run = make(tiny_folder, iters=6)
    run.step(1)
    shutil.rmtree(here / "adapters/run")
    other = make(tiny_folder, seed=3)
    other.run()
    others = digests(here / "adapters/run")
    with pytest.raises(FolderTaken, match="holds another run"):
        run.run()
    with pytest.raises(CheckpointError):
        run.checkpoint()
    assert digests(here / "adapters/run") == others
    run.save("mine")
    assert run.folder == here / "mine"
    whole = make(tiny_folder, "whole", iters=6)
    whole.run()
    run.run()
    assert run.adapter_bytes() == whole.adapter_bytes()


def test_a_lock_that_is_let_go_leaves_no_trace(here, tiny_folder):
    with pytest.raises(MlxNbError, match="no such file or folder"):
        make(tiny_folder, data="./missing").run()
    assert list(here.iterdir()) == []
    run = make(tiny_folder)
    run.run()
    assert not (here / "adapters/run/.mlx_nb/lock").exists()


# Only our own files


def foreign_files(here):
    """A project with a model, rows and runs, and what a person keeps beside them."""
    save_tiny_model(here / "model")
    rows = "".join(json.dumps(row) + "\n" for row in tiny_rows())
    for folder in ("data", "project"):
        (here / folder).mkdir()
        (here / folder / "train.jsonl").write_text(rows)
    for name in ("project/notes.md", "project/checkpoints/mine.txt", "project/best/photo.png", "adapters/readme.md"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
    (here / "project/checkpoints/.tmp-12-mine").write_text("a person's own")
    (here / "disk").mkdir()
    (here / "disk/family.txt").write_text("family")
    (here / "link").symlink_to("disk")
    (here / "linked_into").mkdir()
    (here / "linked_into/checkpoints").symlink_to(here / "disk")
    (here / "inner/work").mkdir(parents=True)


PLACES = {
    "project": ("project", "."),
    "working folder": ("project", "../project"),
    "above": ("inner/work", ".."),
    "data": (".", "data"),
    "model": (".", "model"),
    "link": (".", "link"),
    "through a link": (".", "link/deep/er"),
    "link inside": (".", "linked_into"),
    "other runs": (".", "adapters"),
    "mount": (".", "disk"),
    "home": (".", "~/run"),
}


@pytest.mark.long
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.matrix(every=11)
def test_no_file_of_the_user_is_moved_or_changed_by_runs_in_any_folder(place, here, tiny_folder, monkeypatch):
    foreign_files(here)
    monkeypatch.setenv("HOME", str(here / "disk"))
    make(tiny_folder, "one").run()
    live = make(tiny_folder, "live", iters=20)
    live.step(2)
    start, path = PLACES[place]
    rename = os.rename
    if place == "mount":
        monkeypatch.setattr(os.path, "ismount", lambda one: Path(one).name == "disk" or one == "/")

        def across(source, target):
            inside = [Path(one).is_relative_to(here / "disk") for one in (source, target)]
            if inside[0] != inside[1] or Path(source) == here / "disk":
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            rename(source, target)

        monkeypatch.setattr(os, "rename", across)
    before = digests(here)
    monkeypatch.chdir(here / start)
    adapters = []
    for seed in (1, 2, 3):
        run = make(here / "model", seed=seed, adapter_path=path, data=str(here / "data"))
        assert isinstance(run.run(), RunFinished)
        adapters.append((run.folder / "adapters.safetensors").read_bytes())
    after = digests(here)
    assert {name: after.get(name) for name in before} == before
    kept = [file.read_bytes() for file in here.rglob("previous-*/adapters.safetensors")]
    kept += [file.read_bytes() for file in here.rglob("*.previous-*/adapters.safetensors")]
    assert sorted(kept) == sorted(adapters[:2])
    for folder in [*here.rglob("previous-1"), *here.rglob("*.previous-1")]:
        assert Run.resume(folder).config.seed == 1
    assert isinstance(live.run(), RunFinished)


FOREIGN = {
    "an adapter of mlx-lm": {"adapters.safetensors": b"theirs", "adapter_config.json": b'{"rank": 8}'},
    "weights alone": {"adapters.safetensors": b"theirs"},
    "another best": {"best/adapters.safetensors": b"theirs"},
    "a file called best": {"best": b"theirs"},
    "a file called checkpoints": {"checkpoints": b"theirs"},
    "a pointer of another program": {"checkpoints/latest": b"epoch_3.pt"},
    "a numbered adapter": {"0000002_adapters.safetensors": b"theirs"},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_file_in_the_way_is_named_before_anything_is_loaded_and_stays(what, here, tiny_folder, monkeypatch):
    for name, content in FOREIGN[what].items():
        path = here / "adapters/run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    before = digests(here)
    monkeypatch.setattr("mlx_nb.model.shared_base.load_in_pieces", lambda *_args, **_options: pytest.fail("loaded"))
    with pytest.raises(FolderError, match=r"mlx_nb did not write it.*--name") as error:
        make(tiny_folder).run()
    one_line(error)
    assert digests(here) == before


def test_a_file_that_was_changed_since_is_neither_written_over_nor_moved(here, tiny_folder):
    run = make(tiny_folder, iters=6)
    run.step(2)
    mine = here / "adapters/run/adapters.safetensors"
    mine.write_bytes(b"a person's own")
    ended = run.run()
    assert isinstance(ended, RunPaused)
    assert "adapters.safetensors was changed by another program" in ended.reason
    assert mine.read_bytes() == b"a person's own"
    with pytest.raises(FolderError, match=r"adapters\.safetensors"):
        make(tiny_folder, seed=2, adapter_path="adapters/run").run()
    mine.unlink()
    assert isinstance(run.run(), RunFinished)


@pytest.mark.long
def test_a_run_whose_adapter_was_changed_continues_in_the_folder_that_it_is_saved_to(here, tiny_folder):
    whole = make(tiny_folder, iters=6, adapter_path="whole")
    whole.run()
    run = make(tiny_folder, iters=6)
    run.step(2)
    mine = here / "adapters/run/adapters.safetensors"
    mine.write_bytes(b"a person's own")
    assert isinstance(run.run(), RunPaused)
    run.save("else")
    assert run.folder == here / "else"
    assert isinstance(run.run(), RunFinished)
    assert run.adapter_bytes() == whole.adapter_bytes()
    assert mine.read_bytes() == b"a person's own"
    run.save("copy")  # nothing was refused since: an export
    assert run.folder == here / "else"


def test_the_adapter_of_an_older_version_is_known_by_its_settings(here, tiny_folder):
    make(tiny_folder).run()
    shutil.rmtree(here / "adapters/run/.mlx_nb")
    (here / "adapters/run/notes.md").write_text("mine")
    old = digests(here / "adapters/run")
    make(tiny_folder, seed=2).run()
    moved = digests(here / "adapters/run.previous-1")
    assert {path.name for path in moved} == {path.name for path in old} - {"notes.md"}
    assert sorted(moved.values()) == sorted(digest for path, digest in old.items() if path.name != "notes.md")
    assert (here / "adapters/run/notes.md").read_text() == "mine"
    assert Run.resume("adapters/run.previous-1", data=tiny_rows()).finished


@pytest.mark.parametrize("after", range(0, 9, 2))
@pytest.mark.matrix(every=5)
def test_a_move_cut_short_is_finished_by_the_next_run(after, here, tiny_folder, monkeypatch):
    make(tiny_folder).run()
    whole = sorted(digest for path, digest in digests(here / "adapters/run").items())
    rename, done = os.rename, []

    class Killed(BaseException):
        pass

    def dying(source, target):
        if ".previous-" in str(target):
            if len(done) == after:
                raise Killed
            done.append(target)
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", dying)
        with pytest.raises(Killed):
            make(tiny_folder, seed=2).run()
    make(tiny_folder, seed=3).run()
    assert sorted(digests(here / "adapters/run.previous-1").values()) == whole
    assert not (here / "adapters/run.previous-2").exists()


def test_save_writes_over_nothing_but_what_this_run_saved_there(here, tiny_folder):
    run, other = make(tiny_folder), make(tiny_folder, "other", seed=5)
    run.run()
    other.run()
    before = digests(here)
    with pytest.raises(FolderTaken, match="is the folder of the run 'run'") as error:
        other.save("adapters/run")
    one_line(error)
    (here / "theirs").mkdir()
    (here / "theirs/adapters.safetensors").write_bytes(b"theirs")
    with pytest.raises(FolderError, match="was not written by mlx_nb") as error:
        other.save("theirs")
    one_line(error)
    assert (here / "theirs/adapters.safetensors").read_bytes() == b"theirs"
    assert digests(here / "adapters") == {path: it for path, it in before.items() if here / "adapters" in path.parents}
    (here / "out").mkdir()
    (here / "out/notes.md").write_text("mine")
    run.save("out")
    first = (here / "out/adapters.safetensors").read_bytes()
    run.save("out")
    other.save("out")
    assert (here / "out.previous-1/adapters.safetensors").read_bytes() == first
    assert (here / "out/adapters.safetensors").read_bytes() != first
    assert (here / "out/notes.md").read_text() == "mine"


def test_what_the_user_puts_into_a_checkpoint_keeps_it(here, tiny_folder):
    run = make(tiny_folder, iters=8, keep=1)
    run.run(until=2)
    first = CheckpointStore(run.folder / "checkpoints").list()[0]
    (first.path / "notes.md").write_text("mine")
    run.run()
    assert (first.path / "notes.md").read_text() == "mine"
    with pytest.raises(CheckpointError, match=r"notes\.md was not written by mlx_nb"):
        run.delete_checkpoint(first)


# Paths that cannot be


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"adapter_path": "/dev/null/run"}, "Not a directory"),
        ({"adapter_path": "/proc/run"}, "cannot be written"),
        ({"adapter_path": "loop"}, "symbolic links|File exists"),
        ({"adapter_path": "file"}, "File exists|Not a directory"),
        ({"adapter_path": "file/inner"}, "Not a directory"),
        ({"adapter_path": "~nobody-of-that-name/run"}, r"cannot be a folder: [^.]+\. Give another adapter_path\."),
    ],
)
def test_an_impossible_folder_is_reported_before_anything_is_loaded(settings, what, here, tiny_folder, monkeypatch):
    (here / "loop").symlink_to("loop")
    (here / "file").write_text("a file")
    before = digests(here)
    monkeypatch.setattr("mlx_nb.model.shared_base.load_in_pieces", lambda *_args, **_options: pytest.fail("loaded"))
    with pytest.raises(FolderError, match=what) as error:
        make(tiny_folder, **settings).run()
    one_line(error)
    assert digests(here) == before
    assert sorted(path.name for path in here.iterdir()) == ["file", "loop"]


@pytest.mark.parametrize(
    "name", ["x" * 300, "é" * 101, "../../evil", "a/../../evil", "/evil", "", " ", "a//b", ".", None, 3]
)
def test_a_name_that_no_folder_can_have_is_refused_when_the_run_is_made(name, here):
    for make_run in (lambda: Run(RunConfig(), name=name), lambda: Run.from_yaml("iters: 1", name=name)):
        with pytest.raises(ConfigError, match="a run cannot be called") as error:
            make_run()
        assert len(str(error.value)) < 250
        assert "\n" not in str(error.value)
    assert list(here.iterdir()) == []
    assert Run(RunConfig(), name="é" * 100).name == "é" * 100


@pytest.mark.parametrize("path", ["x" * 300, f"adapters/{'é' * 130}/run"])
def test_an_adapter_path_that_no_folder_can_have_is_refused_when_configured(path):
    with pytest.raises(ConfigError, match="`adapter_path` has a name of more than 255 bytes in it") as error:
        RunConfig(adapter_path=path)
    assert "\n" not in str(error.value)


def test_a_folder_without_permission_is_noticed_at_the_start(here, tiny_folder, monkeypatch):
    def refused(*_args, **_options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refused)
    monkeypatch.setattr("mlx_nb.model.shared_base.load_in_pieces", lambda *_args, **_options: pytest.fail("loaded"))
    with pytest.raises(FolderError, match="Read-only file system"):
        make(tiny_folder).run()
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name", ["", "..", "a/../b", "/etc", "a\0b", "a\nb"])
def test_a_name_that_is_no_folder_is_refused(name):
    with pytest.raises(ConfigError, match="cannot be called") as error:
        Run(name=name)
    one_line(error)


def test_names_of_any_script_are_folders(here, tiny_folder):
    make(tiny_folder, "naïve 日本 🚀").run()
    assert Run.resume("adapters/naïve 日本 🚀", data=tiny_rows()).finished


# Paths begin where the run was made


@pytest.mark.long
def test_a_run_does_not_notice_that_the_process_went_elsewhere(here, tiny_folder, monkeypatch):
    shutil.copytree(tiny_folder, here / "m/tiny")
    shutil.copytree(tiny_folder, here / "m/reference")
    (here / "rows").mkdir()
    rows = "".join(json.dumps(row) + "\n" for row in tiny_pairs())
    (here / "rows/train.jsonl").write_text(rows)
    (here / "template.txt").write_text((here / "m/tiny/chat_template.jinja").read_text())
    start = make("m/tiny", "start", iters=1)
    start.run()
    (here / "elsewhere").mkdir()

    def dpo(**changes):
        settings = {"method": "dpo", "data": "rows", "chat_template": "template.txt", "iters": 6}
        return make("m/tiny", "dpo", **{**settings, "resume_adapter_file": "adapters/start", **changes})

    for changes in ({}, {"reference_model": "m/reference"}, {"reference_adapter": "adapters/start"}):
        shutil.rmtree(here / "adapters/dpo", ignore_errors=True)
        run = dpo(**changes)
        shown = run.config.to_dict()
        for step in range(4):  # at every moment: before loading, before the first save, after it
            monkeypatch.chdir(here / "elsewhere" if step % 2 == 0 else here)
            run.step()
            run.checkpoint()
        monkeypatch.chdir(here / "elsewhere")
        assert run.rows()[3].conversation is not None
        run.report()
        run.run()
        assert list((here / "elsewhere").iterdir()) == []
        assert run.config.to_dict() == shown
        assert (shown["model"], shown["data"]) == ("m/tiny", "rows")
        resumed = Run.resume(here / "adapters/dpo", step=3)
        assert resumed.run().step == 6
        assert resumed.adapter_bytes() == run.adapter_bytes()
        monkeypatch.chdir(here)


@pytest.mark.parametrize(
    "data", ["rows.jsonl", ["rows.jsonl"], [{"path": "rows.jsonl"}], {"train": "rows.jsonl"}, "mine"]
)
def test_rows_are_found_from_where_the_run_was_made(data, here, tiny_folder, monkeypatch):
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows()))
    config = RunConfig.from_dict({"model": str(tiny_folder), "data": data, "iters": 2, "val_set_size": 0})
    run = Run(config, namespace={"mine": Path("rows.jsonl")})
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    run.step()
    monkeypatch.chdir(here)
    monkeypatch.chdir("/")
    run.run()
    assert (here / "adapters/run/adapters.safetensors").exists()


@pytest.mark.parametrize("left", ["copied", "moved"])
@pytest.mark.matrix(every=2)
def test_a_project_that_was_copied_continues_with_its_own_files(left, here, tiny_folder, monkeypatch):
    project = here / "project"
    project.mkdir()
    shutil.copytree(tiny_folder, project / "m")
    (project / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows()))
    monkeypatch.chdir(project)
    run = make("m", data="rows.jsonl")
    run.run(until=2)
    run.checkpoint()
    monkeypatch.chdir(here)
    (shutil.copytree if left == "copied" else shutil.move)(project, here / "copy")
    resumed = Run.resume("copy/adapters/run")
    assert resumed.loaded.folder == here / "copy/m"
    assert resumed.run().step == 4
    assert resumed.folder == here / "copy/adapters/run"


def test_a_working_folder_that_is_gone_is_reported(here, tiny_folder, monkeypatch):
    (here / "gone").mkdir()
    monkeypatch.chdir(here / "gone")
    (here / "gone").rmdir()
    with pytest.raises(FolderError, match="working folder no longer exists"):
        make(tiny_folder)


# Forks


@pytest.mark.long
def test_each_fork_has_a_name_and_a_folder_of_its_own(here, tiny_folder):
    run = make(tiny_folder, adapter_path="out")
    run.step()
    forks = [run.fork(learning_rate=rate) for rate in (1e-5, 1e-4, 1e-3)]
    assert [fork.name for fork in forks] == ["run-fork", "run-fork-2", "run-fork-3"]
    with pytest.raises(FolderTaken, match="held by the run 'run-fork'"):
        run.fork(name="run-fork")
    ended = [fork.run() for fork in forks]
    ended.append((again := run.fork()).run())
    assert again.name == "run-fork-4"
    assert len({fork.folder for fork in (run, *forks, again)}) == 5
    assert all(isinstance(one, RunFinished) for one in ended)
    assert isinstance(run.run(), RunFinished)
    assert len({(fork.folder / "adapters.safetensors").read_bytes() for fork in forks}) == 3
    with pytest.raises(CommandError, match="another folder"):
        run.fork(adapter_path="out")


# Several at once

# Imports everything once, then forks a process for each life of a worker: its death is as real as any.
SERVER = """
import os, sys
sys.path.insert(0, {tests!r})
from mlx_nb.model.backend import prepare_backend
prepare_backend()
import mlx_lm, transformers
import mlx_nb.model.shared_base, mlx_nb.train.trainer, mlx_nb.rollouts.generation
from mlx_lm.models import llama
from folder_lives import life
os.chdir({folder!r})
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        life({model!r}, int(line))
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""
LIVES = part_of(51)


@pytest.mark.faults
@pytest.mark.parametrize("workers", [2, 5])
def test_runs_started_at_once_under_one_name_and_killed_at_random_never_mix(workers, here, tiny_folder):
    chance = random.Random(workers)
    code = SERVER.format(tests=str(SUPPORT), folder=str(here), model=str(tiny_folder))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    servers = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(workers)]
    (here / "log").touch()
    kills = 0
    try:
        while kills < LIVES:
            for seed, server in enumerate(servers):
                server.stdin.write(f"{seed}\n")
                server.stdin.flush()
            children = [int(server.stdout.readline()) for server in servers]
            time.sleep(chance.uniform(0.0, 1.5))
            for child, server in zip(children, servers):
                if chance.random() < 0.7:
                    with suppress(ProcessLookupError):  # it ended just before
                        os.kill(child, signal.SIGKILL)
                        kills += 1
                assert server.stdout.readline() == "dead\n"
    finally:
        for server in servers:
            server.kill()
            server.wait()
    log = [line.split(maxsplit=2) for line in (here / "log").read_text().splitlines()]
    folders = [folder for folder in (here / "adapters").iterdir() if (folder / "checkpoints").is_dir()]
    assert [line for line in log if line[0] == "foreign"] == []
    assert all(len(seeds_in(folder)) <= 1 for folder in folders)
    kept = {}
    for folder in folders:
        if (folder / "adapters.safetensors").exists():
            digest = hashlib.sha256((folder / "adapters.safetensors").read_bytes()).hexdigest()
            kept.setdefault(digest, []).append(folder)
    finished = [line for line in log if line[0] == "finished"]
    assert finished
    for _, seed, digest in finished:
        assert digest in kept, (seed, digest)
        assert any(Run.resume(folder, data=tiny_rows()).finished for folder in kept[digest])
    print(workers, "workers:", kills, "kills,", {word: sum(line[0] == word for line in log) for word, *_ in log})
