"""Checkpoints come back bit for bit, and whatever dies or rots, the newest or the one before it is there."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from every_line import at_line
from mlx_nb.errors import CheckpointError
from mlx_nb.train import checkpoint as module
from mlx_nb.train.checkpoint import Checkpoint
from mlx_nb.train.checkpoint_store import CheckpointStore

DTYPES = [
    mx.bool_,
    mx.uint8,
    mx.uint16,
    mx.uint32,
    mx.uint64,
    mx.int8,
    mx.int16,
    mx.int32,
    mx.int64,
    mx.float16,
    mx.bfloat16,
    mx.float32,
    mx.complex64,
]
FILES = ["parameters.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
# Saves checkpoints 1, 2, 3, ... of which every array and the state are filled with the step, until it is killed.
SAVER = """
import sys
from pathlib import Path
import mlx.core as mx
import numpy as np
from mlx_nb.train.checkpoint import Checkpoint
from mlx_nb.train.checkpoint_store import CheckpointStore
store, first = CheckpointStore(Path(sys.argv[1]), keep=2), int(sys.argv[2])
print("ready", flush=True)
for step in range(first, first + 10_000):
    arrays = {"parameters": {f"w{i}": mx.array(np.full(2000, step, np.float32)) for i in range(3)},
              "optimizer": {"step": mx.array(step, mx.uint64)}}
    store.save(Checkpoint(step, arrays, {"step": step, "steps": [step] * 50}), kind="step")
    print(step, flush=True)
"""


def checkpoint(step: int) -> Checkpoint:
    arrays = {
        "parameters": {"layers.0.lora_a": mx.full((3, 2), step, mx.float32), "b": mx.full((2,), step, mx.bfloat16)},
        "optimizer": {"step": mx.array(step, mx.uint64)},
    }
    mx.eval(arrays)
    return Checkpoint(step, arrays, {"step": step, "loss": 1 / (step + 1)})


def bits(array: mx.array) -> bytes:
    return bytes(np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)))


def content(stored: Checkpoint) -> object:
    arrays = {
        group: {name: (array.dtype, array.shape, bits(array)) for name, array in named.items()}
        for group, named in stored.arrays.items()
    }
    return stored.step, arrays, stored.state


def is_step(stored: Checkpoint, step: int) -> bool:
    return content(stored) == content(checkpoint(step))


def partial_folders(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(".tmp-*")]


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "run" / "checkpoints")


@pytest.fixture
def two(store):
    """A store with steps 1 and 2, and the folder of step 2."""
    store.save(checkpoint(1), kind="step")
    return store, store.save(checkpoint(2), kind="step")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """For properties over many examples, which share a folder."""
    return CheckpointStore(tmp_path_factory.mktemp("scratch") / "checkpoints", keep=1)


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_arrays_of_every_dtype_and_shape_come_back_bit_for_bit(scratch, data):
    named = {}
    for name in data.draw(st.lists(st.text(min_size=1, max_size=8).filter(lambda n: n.isprintable()), max_size=4)):
        dtype = data.draw(st.sampled_from(DTYPES))
        shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
        size = math.prod(shape) * dtype.size
        raw = data.draw(st.binary(min_size=size, max_size=size))
        if dtype == mx.bool_:
            raw = bytes(byte & 1 for byte in raw)
        flat = mx.array(np.frombuffer(raw, np.uint8))
        named[name] = (flat.view(dtype) if size else mx.zeros((0,), dtype)).reshape(shape)
    saved = Checkpoint(3, {"parameters": named, "none": {}}, {})
    path = scratch.save(saved, kind="step")
    loaded, messages = scratch.load()
    assert messages == []
    assert loaded.path == path
    assert content(loaded) == content(saved)


def test_zero_dimensional_transposed_and_unevaluated_arrays_come_back(store):
    base = mx.arange(12, dtype=mx.float16).reshape(3, 4)
    arrays = {
        "t": base.T[1:],
        "zero": mx.array(np.array(2**64 - 1, np.uint64)),
        "lazy": base * 2,
        "nan": mx.array(math.nan),
    }
    store.save(Checkpoint(0, {"parameters": arrays}, {}), kind="step")
    loaded = store.load()[0].arrays["parameters"]
    assert list(loaded) == ["lazy", "nan", "t", "zero"]
    for name, array in arrays.items():
        assert (loaded[name].dtype, loaded[name].shape, bits(loaded[name])) == (array.dtype, array.shape, bits(array))


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.floats(), max_size=20), text=st.text(max_size=20), whole=st.integers())
def test_state_comes_back_bit_for_bit(scratch, values, text, whole):
    # JSON has one NaN; its sign and payload mean nothing and are not kept.
    values = [math.nan if math.isnan(value) else value for value in [*values, math.nan, math.inf, -math.inf, -0.0]]
    scratch.save(Checkpoint(1, {}, {"values": values, text: [text, None, True, whole]}), kind="step")
    state = scratch.load()[0].state
    found = state.pop("values")
    assert struct.pack(f"{len(values)}d", *found) == struct.pack(f"{len(values)}d", *values)
    assert text == "values" or state == {text: [text, None, True, whole]}


@pytest.mark.parametrize("state", [{1: 2}, {"a": [{"b": {None: 1}}]}, {"a": object()}, {"a": mx.array(1)}])
def test_a_state_that_json_would_change_or_refuse_is_not_saved(two, state):
    store, _ = two
    with pytest.raises(CheckpointError, match="cannot be saved as JSON"):
        store.save(Checkpoint(3, {}, state), kind="step")
    assert is_step(store.load()[0], 2)
    assert partial_folders(store.folder) == []


def test_float64_arrays_are_refused_by_group_and_nothing_stays(two):
    store, _ = two
    with mx.stream(mx.cpu), pytest.raises(CheckpointError, match=r"optimizer cannot be saved.*invalid dtype"):
        store.save(Checkpoint(3, {"optimizer": {"a": mx.array([1.0], mx.float64)}}, {}), kind="step")
    assert [info.step for info in store.list()] == [1, 2]
    assert partial_folders(store.folder) == []


@pytest.mark.parametrize("word", ["../evil", "", "a/b", "Best", "a.b"])
def test_kinds_and_groups_that_are_no_words_are_refused(store, word):
    with pytest.raises(CheckpointError, match="cannot name"):
        store.save(checkpoint(1), kind=word)
    with pytest.raises(CheckpointError, match="cannot name"):
        store.save(Checkpoint(1, {word: {}}, {}), kind="step")


def test_loading_from_where_nothing_is_says_so(store, tmp_path):
    assert store.list() == []
    with pytest.raises(CheckpointError, match=r"there is no checkpoint in .*checkpoints"):
        store.load()
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be read as a folder"):
        CheckpointStore(tmp_path / "file").load()


def test_the_listing_tells_step_kind_size_and_time(store):
    before = time.time()
    path = store.save(checkpoint(7), kind="pause")
    (info,) = store.list()
    assert (info.save, info.step, info.kind, info.path) == (1, 7, "pause", path)
    assert info.bytes == sum(file.stat().st_size for file in path.iterdir())
    assert before - 1 <= info.time <= time.time() + 1


def test_load_chooses_by_step_kind_or_folder_name(store):
    store.save(checkpoint(1), kind="best")
    second = store.save(checkpoint(2), kind="step")
    store.save(checkpoint(3), kind="pause")
    assert is_step(store.load(1)[0], 1)
    assert is_step(store.load("best")[0], 1)
    assert is_step(store.load(second.name)[0], 2)
    assert is_step(store.load()[0], 3)
    with pytest.raises(CheckpointError, match=r"no checkpoint 9 in .*: 1 \(best\), 2 \(step\), 3 \(pause\)"):
        store.load(9)


def test_the_newest_is_the_last_saved_also_after_a_rewind(store):
    for step in (50, 100, 60):
        store.save(checkpoint(step), kind="step")
    assert is_step(store.load()[0], 60)


def test_loaded_arrays_do_not_depend_on_the_files_any_more(two):
    store, newest = two
    loaded, _ = store.load()
    for file in newest.iterdir():
        file.write_bytes(bytes(file.stat().st_size))
    assert is_step(loaded, 2)


# Damage


def test_any_altered_byte_in_any_file_is_recognized_and_the_one_before_is_used(two):
    store, newest = two
    for file in [newest / name for name in FILES]:
        original = file.read_bytes()
        for position in range(0, len(original), 1 if len(original) < 100 else 7):
            altered = bytearray(original)
            altered[position] ^= 1 << (position % 8)
            file.write_bytes(altered)
            loaded, (message,) = store.load()
            assert is_step(loaded, 1)
            assert message.startswith(f"{newest.name}: {file.name} was changed after it was written")
            assert message.endswith("; used save-0001-step-0000001-step instead.")
            assert "\n" not in message
        file.write_bytes(original)
    assert is_step(store.load()[0], 2)


def test_any_altered_byte_in_latest_is_recognized_and_the_newest_is_used(two):
    store, newest = two
    latest = store.folder / "latest"
    original = latest.read_bytes()
    assert original.split()[0].decode() == newest.name
    for position in range(len(original)):
        for mask in (1, 0x80, 0xFF):
            altered = bytearray(original)
            altered[position] ^= mask
            latest.write_bytes(altered)
            loaded, messages = store.load()
            assert is_step(loaded, 2)
            assert messages == [f"latest: damaged; used {newest.name} instead."]


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_at_any_length_is_recognized_and_the_one_before_is_used(two, name):
    store, newest = two
    original = (newest / name).read_bytes()
    for length in [*range(0, len(original), max(1, len(original) // 20)), len(original) - 1]:
        (newest / name).write_bytes(original[:length])
        loaded, messages = store.load()
        assert is_step(loaded, 1)
        assert len(messages) == 1
        assert messages[0].startswith(f"{newest.name}: {name}")
    (newest / name).write_bytes(original + b" ")
    assert is_step(store.load()[0], 1)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_recognized_and_the_one_before_is_used(two, name):
    store, newest = two
    (newest / name).unlink()
    loaded, messages = store.load()
    assert is_step(loaded, 1)
    assert messages == [f"{newest.name}: {name}: No such file or directory; used save-0001-step-0000001-step instead."]


def test_a_missing_or_stale_latest_is_reported_and_the_newest_is_used(two):
    store, newest = two
    (store.folder / "latest").unlink()
    loaded, messages = store.load()
    assert is_step(loaded, 2)
    assert messages == [f"latest: No such file or directory; used {newest.name} instead."]
    store.save(checkpoint(3), kind="step")
    shutil.rmtree(store.folder / "save-0003-step-0000003-step")
    loaded, messages = store.load()
    assert is_step(loaded, 2)
    assert messages == [
        f"latest: names save-0003-step-0000003-step, which is not there; used {newest.name} instead.",
    ]


def rewrite_manifest(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["sha256"]
    manifest |= changes
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest}, sort_keys=True, indent=2))


@pytest.mark.parametrize(
    ("version", "words"), [(2, "written by a newer mlx_nb (checkpoint format 2, this mlx_nb reads 1)"), (0, "format 0")]
)
def test_another_format_version_is_named_and_the_one_before_is_used(two, version, words):
    store, newest = two
    rewrite_manifest(newest, format=version)
    loaded, (message,) = store.load()
    assert is_step(loaded, 1)
    assert words in message


def test_a_renamed_folder_is_not_taken_for_another_step(two):
    store, newest = two
    newest.rename(store.folder / "save-0009-step-0000009-step")
    loaded, messages = store.load()
    assert is_step(loaded, 1)
    assert "the folder was renamed: it is save 2 at step 2" in messages[1]


def test_when_none_is_good_one_error_names_each(two):
    store, newest = two
    (newest / "state.json").unlink()
    (store.folder / "save-0001-step-0000001-step" / "manifest.json").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        store.load()
    assert f"{newest.name}: state.json: No such file" in str(caught.value)
    assert "save-0001-step-0000001-step: manifest.json was changed after it was written" in str(caught.value)


def test_a_damaged_step_asked_for_by_number_is_never_replaced_by_another_step(two):
    store, newest = two
    (newest / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint 2 in .* can be used"):
        store.load(2)


# Keeping and replacing


def test_the_newest_steps_and_the_best_are_kept(store):
    for step in range(1, 9):
        store.save(checkpoint(step), kind="best" if step in (1, 3) else "step")
    assert [(info.step, info.kind) for info in store.list()] == [(3, "best"), (6, "step"), (7, "step"), (8, "step")]
    assert partial_folders(store.folder) == []


def test_saving_a_step_again_replaces_it_but_never_the_best(store):
    for kind in ("step", "pause"):
        store.save(checkpoint(5), kind=kind)
    assert [(info.step, info.kind) for info in store.list()] == [(5, "pause")]
    store.save(checkpoint(5), kind="best")
    store.save(Checkpoint(5, {}, {"other": 1}), kind="step")
    assert [(info.step, info.kind) for info in store.list()] == [(5, "best"), (5, "step")]
    assert store.load(5)[0].state == {"other": 1}
    assert is_step(store.load("best")[0], 5)


def test_what_a_dead_writer_left_is_removed_at_the_next_save(two):
    store, _ = two
    for pid in (os.getpid(), 2**22 + 1):
        (store.folder / f".tmp-{pid}-save-0003-step-0000003-step").mkdir()
        (store.folder / f".tmp-{pid}-save-0003-step-0000003-step" / "state.json").write_text("{")
        (store.folder / f".tmp-{pid}-latest").write_text("x")
    assert is_step(store.load()[0], 2)
    store.save(checkpoint(3), kind="step")
    assert partial_folders(store.folder) == []
    assert is_step(store.load()[0], 3)


def test_what_a_living_writer_is_writing_stays(two):
    store, _ = two
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        theirs = store.folder / f".tmp-{other.pid}-save-0003-step-0000003-step"
        theirs.mkdir()
        store.save(checkpoint(3), kind="step")
        assert partial_folders(store.folder) == [theirs.name]
        other.communicate(b"\n")
    store.save(checkpoint(4), kind="step")
    assert partial_folders(store.folder) == []


def test_everything_is_flushed_before_the_rename_that_shows_it_and_the_folder_after(two, monkeypatch):
    store, _ = two
    flushed: set[int] = set()
    shown: list[str] = []

    def fsync(descriptor):
        flushed.add(os.fstat(descriptor).st_ino)
        real_fsync(descriptor)

    def moving(real):
        def move(source, target):
            shown.append(target.name)
            needed = [source, *source.iterdir()] if source.is_dir() else [source]
            if target.parent == store.folder and not target.name.startswith(".tmp-"):
                assert {path.stat().st_ino for path in needed} <= flushed
                flushed.clear()
            else:
                assert store.folder.stat().st_ino in flushed
            real(source, target)

        return move

    real_fsync = os.fsync
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", moving(os.rename))
    monkeypatch.setattr(os, "replace", moving(os.replace))
    CheckpointStore(store.folder, keep=2).save(checkpoint(3), kind="step")
    name = "save-0003-step-0000003-step"
    assert shown == [name, "latest", f".tmp-{os.getpid()}-old-save-0001-step-0000001-step"]


# Saving fails


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half_written(two):
    store, _ = two
    big = {"parameters": {f"w{index}": mx.zeros((20_000,)) for index in range(10)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step 3 could not be saved in .*File too large.*save again"):
            store.save(Checkpoint(3, big, {}), kind="step")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert partial_folders(store.folder) == []
    assert is_step(store.load()[0], 2)
    assert mx.array_equal(big["parameters"]["w3"], mx.zeros((20_000,)))
    store.save(Checkpoint(3, big, {}), kind="step")
    assert store.load()[0].step == 3


@pytest.mark.parametrize("where", ["file", "file/run/checkpoints"])
def test_a_file_in_the_place_of_the_folder_is_one_clear_error(tmp_path, where):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"could not be saved.*Move the file|cannot be read as a folder"):
        CheckpointStore(tmp_path / where).save(checkpoint(1), kind="step")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_clear_error(two):
    store, _ = two
    store.folder.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match=r"Permission denied.*Make the folder writable"):
            store.save(checkpoint(3), kind="step")
    finally:
        store.folder.chmod(0o700)
    assert is_step(store.load()[0], 2)


def test_a_folder_deleted_between_saves_is_made_again(two):
    store, _ = two
    shutil.rmtree(store.folder.parent)
    store.save(checkpoint(3), kind="step")
    loaded, messages = store.load()
    assert is_step(loaded, 3)
    assert messages == []


def lines_of_a_save(store: CheckpointStore, at: int, act: Callable[[], None]) -> bool:
    """Save step 9 and call `act` before line `at` of checkpoint.py and checkpoint_store.py. False without one."""
    return at_line(at, act, lambda: store.save(checkpoint(9), kind="step"), module.__file__.removesuffix(".py"))


def fresh_copies(two, tmp_path):
    """Copies of a store with two checkpoints, without end."""
    store, _ = two
    number = 0
    while True:
        number += 1
        folder = tmp_path / f"copy-{number}" / "checkpoints"
        shutil.copytree(store.folder, folder)
        yield number, CheckpointStore(folder, keep=1)
        shutil.rmtree(folder.parent, ignore_errors=True)


@pytest.mark.faults
def test_an_interrupt_before_any_line_of_save_leaves_the_newest_or_the_one_before(two, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    outcomes = set()
    for number, store in fresh_copies(two, tmp_path):
        try:
            if not lines_of_a_save(store, number, interrupt):
                break
        except KeyboardInterrupt:
            pass
        loaded, messages = store.load()
        assert loaded.step in (2, 9)
        assert is_step(loaded, loaded.step)
        assert messages == []
        assert all("-old-" in name for name in partial_folders(store.folder))
        outcomes.add(loaded.step)
        store.save(checkpoint(10), kind="step")
        assert is_step(store.load()[0], 10)
        assert partial_folders(store.folder) == []
    assert outcomes == {2, 9}
    assert number > 100


@pytest.mark.faults
def test_a_folder_deleted_before_any_line_of_save_is_a_checkpoint_error_or_a_save(two, tmp_path):
    for number, store in fresh_copies(two, tmp_path):
        try:
            if not lines_of_a_save(store, number, partial(shutil.rmtree, store.folder.parent)):
                break
        except CheckpointError:
            pass
        store.save(checkpoint(10), kind="step")
        assert is_step(store.load()[0], 10)
        assert partial_folders(store.folder) == []
    assert number > 100


@pytest.mark.parametrize(
    "call", ["fsync", "rename", "replace", "mkdir", "open", "rmdir", "unlink", "write", "__init__"]
)
def test_a_fault_at_any_system_call_of_save_leaves_the_newest_or_the_one_before(two, tmp_path, monkeypatch, call):
    owner = module.HashedFile if call in ("write", "__init__") else os
    real = getattr(owner, call)
    for number, store in fresh_copies(two, tmp_path):
        calls = 0

        def faulty(*arguments, number=number, **named):
            nonlocal calls
            calls += 1
            if calls == number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments, **named)

        monkeypatch.setattr(owner, call, faulty)
        error = None
        try:
            store.save(checkpoint(9), kind="step")
        except CheckpointError as raised:
            error = str(raised)
        monkeypatch.setattr(owner, call, real)
        loaded, messages = store.load()
        assert loaded.step in (2, 9)
        assert is_step(loaded, loaded.step)
        assert ("could not be saved" in error) == (loaded.step == 2) if error else loaded.step == 9
        assert error is None or "Input/output error" in error
        assert messages == []
        store.save(checkpoint(10), kind="step")
        assert is_step(store.load()[0], 10)
        assert partial_folders(store.folder) == []
        if calls < number:
            break
    assert number > 1


@pytest.mark.faults
def test_a_writer_killed_at_any_moment_leaves_the_newest_or_the_one_before(tmp_path):
    store, moments = CheckpointStore(tmp_path / "checkpoints", keep=2), random.Random(0)
    last, inside_a_save = 0, 0
    for _ in range(30):
        command = [sys.executable, "-c", SAVER, str(store.folder), str(last + 1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            begun = time.monotonic()
            reported = [int(child.stdout.readline()) for _ in range(moments.randint(1, 3))]
            time.sleep(moments.random() * (time.monotonic() - begun) / len(reported))
            child.kill()
            reported += [int(line) for line in child.stdout.read().split("\n")[:-1]]
        last = max([last, *reported])
        inside_a_save += bool(partial_folders(store.folder))
        loaded, messages = store.load()
        assert loaded.step in (last, last + 1)
        assert all(message.startswith("latest: No such file") for message in messages)
        assert loaded.state == {"step": loaded.step, "steps": [loaded.step] * 50}
        assert loaded.arrays["optimizer"]["step"].item() == loaded.step
        for array in loaded.arrays["parameters"].values():
            assert mx.array_equal(array, mx.full((2000,), loaded.step))
        last = loaded.step
    assert last > 30
    assert inside_a_save > 5
    store.save(checkpoint(last + 1), kind="step")
    assert partial_folders(store.folder) == []
