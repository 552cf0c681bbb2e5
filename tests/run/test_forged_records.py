"""Whatever one key of a checkpoint is changed to, resuming gives what it gave before or passes over it in one line."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import shutil

import mlx.core as mx
import pytest

from mlx_nb import Run, RunConfig
from mlx_nb.config.run_config import SETTINGS
from mlx_nb.errors import CheckpointError, MlxNbError
from mlx_nb.files.typed_json import WrongJson, read_as
from mlx_nb.run.resume_checks import refuse_unusable
from mlx_nb.train.checkpoint import Checkpoint
from mlx_nb.train.checkpoint_store import CheckpointStore
from mlx_nb.train.record import SEAL, RunRecord, WorkingFolder, sealed
from odd_values import nested
from tiny import tiny_prompts, tiny_rows

MISSING = object()
VALUES = [MISSING, None, 7, "x", [], ["a"], {"x": 1}, float("nan"), 10**30, nested(900)]


def reward(completion):
    return float(len(completion))


METHODS = {
    "sft": ({"lr_schedule": {"name": "cosine_decay", "arguments": [1e-2, 8]}}, tiny_rows),
    "grpo": (
        {"rewards": [reward], "group_size": 2, "max_completion_length": 3, "updates_per_rollout": 2, "val_batches": 1},
        tiny_prompts,
    ),
}


def made(method, tiny_folder, folder):
    """A run with checkpoints at updates 1 and 3, a live change between them and requests that are not done."""
    extra, rows = METHODS[method]
    values = {
        "model": str(tiny_folder),
        "method": method,
        "data": rows(),
        "iters": 8,
        "batch_size": 2,
        "lora_parameters": {"rank": 2},
        "save_every": -1,
        "keep": 99,
        "adapter_path": str(folder),
        **extra,
    }
    run = Run(RunConfig.from_dict(values), namespace={"reward": reward})
    run.step(1)
    run.checkpoint()
    run.set(iters=9)
    run.step(2)
    run.checkpoint()
    run.release()
    return run


@pytest.fixture(scope="module", params=METHODS)
def run(request, tmp_path_factory):
    from tiny import save_tiny_model

    tiny_folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    return made(request.param, tiny_folder, tmp_path_factory.mktemp(request.param) / "a")


def resumed(folder, method):
    return Run.resume(folder, data=METHODS[method][1](), namespace={"reward": reward})


def places(value, path=()):
    """Every key of a JSON value, and the first two items of each list."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from places(item, (*path, key))


def changed(value, path, new):
    """A copy of a JSON value with another one at a place."""
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if new is MISSING:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return value


def same(one, other):
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def stored(folder):
    store = CheckpointStore(folder / "checkpoints", keep=99)
    return store, store.load(None, refuse_unusable)[0]


@pytest.fixture
def copied(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "a")
    return tmp_path / "a"


def loaded(store, forged):
    """What is read where `forged` is the newest, and the lines about it."""
    checkpoint, lines = store.load(None, refuse_unusable)
    for line in lines:
        assert "\n" not in line
        assert len(line) < 1000
    if checkpoint.path.name != forged:
        assert any(line.startswith(f"{forged}: ") for line in lines), lines
    return checkpoint


def refusal(checkpoint):
    """Why a checkpoint is passed over, None where it is used."""
    try:
        refuse_unusable(checkpoint)
    except CheckpointError as error:
        reason = str(error)
    else:
        return None
    assert "\n" not in reason
    assert len(reason) < 1000
    return reason


def forgeries(state):
    """(place, value, state with it) for every place and value, of the many settings for some of the values."""
    for path in places(state):
        for value in VALUES[::4] if path[0] == "config" and len(path) > 1 else VALUES:
            other = changed(state, path, value)
            if not same(other, state):
                yield path, value, other


@pytest.mark.long
def test_any_key_of_the_state_changed_is_refused(run):
    _, good = stored(run.folder)
    assert refusal(good) is None
    for path, value, state in forgeries(good.state):
        reason = refusal(dataclasses.replace(good, state=state))
        assert (reason is None) == (path == ("seal",) and value is MISSING), (path, value)


@pytest.mark.long
def test_without_a_seal_any_key_changed_is_refused_by_kind_or_continues_without_a_traceback(run, copied):
    store, good = stored(copied)
    unsealed = {key: value for key, value in good.state.items() if key != "seal"}
    accepted = [
        state
        for path, _, state in forgeries(unsealed)
        if path[0] not in ("config", "made_from", "history") and refusal(dataclasses.replace(good, state=state)) is None
    ]
    for state in accepted[:: max(1, len(accepted) // 10)]:
        forged = store.save(dataclasses.replace(good, state=state), kind="step")
        with contextlib.suppress(MlxNbError):
            other = resumed(copied, run.config.method)
            other.step()
            other.release()
        for info in store.list():
            if info.save >= int(forged.name[5:9]):
                shutil.rmtree(info.path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("finished", []),
        ("place", [0, 4]),
        ("working_folder", {"path": 3, "from_run": ""}),
        ("working_folder", {"path": "", "from_run": 3}),
        ("name", "../../evil"),
        ("history", 5),
        ("history_parts", None),
        ("feed", 5),
        ("due", [["evil", ""]]),
    ],
)
@pytest.mark.matrix(every=12)
def test_a_forged_newest_is_named_with_its_key_and_the_one_before_is_used(run, copied, key, value):
    store, good = stored(copied)
    forged = store.save(dataclasses.replace(good, state={**good.state, key: value}), kind="step")
    assert loaded(store, forged.name).step < 3
    notes = resumed(copied, run.config.method).trainer.notes
    (said,) = [note for note in notes if forged.name in note]
    assert key in said or key == "name"


def swapped(group, change):
    """Arrays of a checkpoint with one of `group` changed, or a name more or less."""

    def swap(arrays):
        arrays = {name: dict(inner) for name, inner in arrays.items()}
        name = next(name for name, array in arrays[group].items() if array.dtype == mx.float32 and array.ndim)
        new = change(arrays[group][name])
        if new is MISSING:
            del arrays[group][name]
        elif isinstance(new, dict):
            arrays[group] |= new
        else:
            arrays[group][name] = new
        return arrays

    return swap


UNFIT_ARRAYS = {
    "missing": lambda array: MISSING,
    "one more": lambda array: {"zz": array},
    "another shape": lambda array: mx.zeros([size + 1 for size in array.shape]),
    "another dtype": lambda array: array.astype(mx.float16),
    "no number": lambda array: mx.full(array.shape, float("nan")),
    "infinite": lambda array: mx.full(array.shape, float("inf")),
}


@pytest.mark.parametrize("group", ["parameters", "optimizer"])
@pytest.mark.parametrize("kind", UNFIT_ARRAYS)
@pytest.mark.matrix(every=12)
def test_arrays_that_do_not_fit_are_named_and_the_checkpoint_before_is_used(run, copied, group, kind):
    store, good = stored(copied)
    arrays = swapped(group, UNFIT_ARRAYS[kind])(good.arrays)
    forged = store.save(dataclasses.replace(good, arrays=arrays), kind="step")
    other = resumed(copied, run.config.method)
    (said,) = [note for note in other.trainer.notes if forged.name in note]
    assert {"parameters": "parameter ", "optimizer": "optimizer state "}[group] in said
    assert (before := other.step_count) < 3
    other.step()
    other.release()
    later = [info.step for info in store.list() if info.save > int(forged.name[5:9])]
    assert later == [before + 1]  # nothing of it was saved


def test_where_no_checkpoint_fits_it_is_named(run, copied):
    store, good = stored(copied)
    arrays = swapped("parameters", UNFIT_ARRAYS["another shape"])(good.arrays)
    for info in store.list():
        shutil.rmtree(info.path)
    forged = store.save(dataclasses.replace(good, arrays=arrays), kind="step")
    with pytest.raises(CheckpointError, match=rf"{forged.name}.* does not match.*lora_parameters and optimizer"):
        resumed(copied, run.config.method)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("place", 2), 0),
        (("place", 0), -1),
        (("place", 1), -3),
        (("place", 1), 2**64),
        (("history_parts", 0, "bytes"), -7414),
        (("history_parts", 0, "lines"), -1),
        (("trainer", "step"), -3),
        (("trainer", "batches"), -1),
        (("trainer", "tokens"), 2**70),
        (("events",), -1),
    ],
)
@pytest.mark.matrix(every=3)
def test_counts_that_no_run_came_to_are_named_and_the_checkpoint_before_is_used(run, copied, path, value):
    store, good = stored(copied)
    state = sealed(changed({name: part for name, part in good.state.items() if name != SEAL}, path, value))
    forged = store.save(dataclasses.replace(good, state=state), kind="step")
    other = resumed(copied, run.config.method)
    (said,) = [note for note in other.trainer.notes if forged.name in note]
    assert path[0] in said or "step" in said
    assert other.step_count < 3


def refreshed(folder, name, content):
    """Write a file of a checkpoint and a manifest that says so."""
    from mlx_nb.train.checkpoint import manifest_bytes

    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["sha256"]
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_bytes(manifest_bytes(manifest))


FILES = {
    "cut arrays": ("parameters.safetensors", lambda content: content[: len(content) // 2]),
    "other arrays": ("parameters.safetensors", lambda content: content[:-4] + b"\0\0\0\x3f"),
    "no arrays": ("optimizer.safetensors", lambda content: b""),
    "garbled header": ("optimizer.safetensors", lambda content: content[:8] + b"\xff" * 20 + content[28:]),
    "no JSON": ("state.json", lambda content: b"{"),
    "a list": ("state.json", lambda content: b"[1]"),
    "nested": ("state.json", lambda content: b'{"name": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "a key twice": ("state.json", lambda content: content[:-1] + b', "name": "other"}'),
    "UTF-16": ("state.json", lambda content: content.decode().encode("utf-16")),
    "no text": ("state.json", lambda content: b"\xff\xfe\x00"),
    "other digests": ("state.json", lambda content: content.replace(b'"arrays": {', b'"arrays": {"x": 1, ')),
}
UNIMPORTANT = {
    "a byte order mark": ("state.json", lambda content: b"\xef\xbb\xbf" + content),
    "lines that end as on Windows": ("state.json", lambda content: content.replace(b'"trainer": ', b'"trainer":\r\n ')),
    "without the digests of arrays": (
        "state.json",
        lambda content: json.dumps({k: v for k, v in json.loads(content).items() if k != "arrays"}).encode(),
    ),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.matrix(every=6)
def test_a_file_that_was_changed_with_its_manifest_is_passed_over(run, copied, kind):
    store, good = stored(copied)
    name, change = FILES[kind]
    refreshed(good.path, name, change((good.path / name).read_bytes()))
    if kind != "UTF-16":
        assert loaded(store, good.path.name).step < 3
    other = resumed(copied, run.config.method)
    assert (other.step_count == 3) == (kind == "UTF-16")
    assert (kind == "UTF-16") or any(good.path.name in note for note in other.trainer.notes)


@pytest.mark.parametrize("kind", UNIMPORTANT)
@pytest.mark.matrix(every=6)
def test_another_spelling_of_the_same_state_continues_bit_for_bit(run, copied, tmp_path, kind):
    _, good = stored(copied)
    shutil.copytree(copied, tmp_path / "b")
    name, change = UNIMPORTANT[kind]
    refreshed(good.path, name, change((good.path / name).read_bytes()))
    one, other = resumed(copied, run.config.method), resumed(tmp_path / "b", run.config.method)
    for each in (one, other):
        assert each.step_count == 3
        each.step(2)
    assert one.adapter_bytes() == other.adapter_bytes()


@pytest.mark.long
@pytest.mark.matrix(every=2)
def test_any_key_of_the_manifest_changed_is_passed_over(run, copied):
    from mlx_nb.train.checkpoint import manifest_bytes

    store, good = stored(copied)
    before = (good.path / "manifest.json").read_bytes()
    content = json.loads(before)
    del content["sha256"]
    for path, value, forged in list(forgeries(content))[::2]:
        (good.path / "manifest.json").write_bytes(manifest_bytes(forged))
        assert loaded(store, good.path.name).step < 3, (path, value)
    for garbled in (b"", b"[" * 5000, b"\xff", before[:-5], before.replace(b"\n", b"\r\n")):
        (good.path / "manifest.json").write_bytes(garbled)
        assert loaded(store, good.path.name).step < 3, garbled
    (good.path / "manifest.json").write_bytes(before)
    assert stored(copied)[1].step == 3


@pytest.mark.long
def test_a_garbled_history_costs_itself_alone(run, copied):
    expected = resumed(copied, run.config.method)
    expected.step(1)
    expected.release()
    for info in CheckpointStore(copied / "checkpoints").list():
        if info.step > 3:
            shutil.rmtree(info.path)
    for path in (copied / "checkpoints").glob("history-*.jsonl"):
        lines = path.read_bytes().splitlines(keepends=True)
        lines[1] = lines[1].replace(b'"step": 0', b'"step": "zero"').replace(b'"loss": ', b'"loss": "')
        path.write_bytes(b"".join(lines))
    other = resumed(copied, run.config.method)
    assert any("history" in note for note in other.trainer.notes)
    other.step(1)
    assert other.adapter_bytes() == expected.adapter_bytes()
    other.plot()
    other.report()


def test_a_setting_that_a_checkpoint_does_not_say_is_named_with_the_value_taken(run, copied):
    store, good = stored(copied)
    state = {key: value for key, value in good.state.items() if key != "seal"}
    config = {key: value for key, value in state["config"].items() if key != "grad_clip"}
    config["lora_parameters"] = {key: value for key, value in config["lora_parameters"].items() if key != "scale"}
    store.save(Checkpoint(good.step, good.arrays, {**state, "config": config}), kind="step")
    notes = resumed(copied, run.config.method).trainer.notes
    said = [note for note in notes if "older mlx_nb without" in note]
    assert len(said) == 2
    assert f"the setting `grad_clip`, so its default is used: {SETTINGS['grad_clip'].default!r}" in said[0]
    assert "the setting `lora_parameters.scale`, so its default is used: 20.0" in said[1]


def test_a_checkpoint_alone_says_what_is_wrong_with_it(run, copied):
    store, good = stored(copied)
    state = {**good.state, "place": [0, 4]}
    shutil.rmtree(store.folder)
    forged = store.save(Checkpoint(good.step, good.arrays, state), kind="step")
    with pytest.raises(CheckpointError) as caught:
        resumed(copied, run.config.method)
    assert f"{forged.name}: its contents cannot be resumed from (`place` is [0, 4], where a list of 3 values" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (int, True, "it is not a whole number"),
        (float, 10**400, "it is not a number that can be computed with"),
        (list[tuple[int, float]], [[1, "x"]], "`[0][1]` is 'x', where a number belongs"),
        (WorkingFolder | None, {"path": 3, "from_run": ""}, "`path` is 3, where text belongs"),
        (WorkingFolder, {"path": ""}, "no 'from_run'"),
        (WorkingFolder, {"path": "", "from_run": "", "x": 1}, "nobody knows 'x'"),
        (RunRecord, 5, "it is not an object"),
        (dict[str, int | list[str]], {"a": 1.5}, "`a` is 1.5, where a whole number or a list belongs"),
    ],
)
def test_what_is_of_another_kind_is_reported_with_its_place(kind, value, said):
    with pytest.raises(WrongJson) as caught:
        read_as(kind, value)
    assert str(caught.value) == said
