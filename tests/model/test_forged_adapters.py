"""Whatever is in the place of the files of an adapter, one line says what is wrong, with the setting and the file."""

from __future__ import annotations

import copy
import json
import shutil
import struct
from pathlib import Path

import pytest

from mlx_nb import Run, RunConfig
from mlx_nb.errors import MlxNbError, ModelError
from mlx_nb.model.adapter_files import REFERENCE, START, check_base, open_adapter, shape_of, with_adapter_settings
from odd_values import nested
from tiny import tiny_model, tiny_rows

PEFT_ADAPTER = Path(__file__).parent.parent / "export" / "goldens" / "lora"
VALUES = [None, 7, -1, "x", "~nobody/x", "\0", "\ud800", [], ["a"], {}, {"x": 1}, float("nan"), 10**30, True]
VALUES += [nested(900), 1e308]


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "a"
    settings = {"iters": 1, "lora_parameters": {"rank": 2}, "val_set_size": 0, "adapter_path": str(folder)}
    run = Run(RunConfig.from_dict({**settings, "model": str(tiny_folder), "data": tiny_rows(8)}))
    run.run()
    run.release()
    return folder


@pytest.fixture
def copied(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "copied")
    return tmp_path / "copied"


def read(folder, tiny_folder):
    """The line about what is wrong before the weights are loaded; None where nothing is."""
    reasons = []
    for setting in (START, REFERENCE):
        try:
            found = open_adapter(str(folder), setting)
            shape_of(found, tiny_model())
            check_base(found, str(tiny_folder), tiny_folder, None, ())
            with_adapter_settings(RunConfig.from_dict({"resume_adapter_file": str(folder)}))
        except MlxNbError as error:
            reasons.append(str(error))
    for reason in reasons:
        assert "\n" not in reason
        assert len(reason) < 1200
        assert START in reason or REFERENCE in reason
    return reasons[0] if reasons else None


def places(value, path=()):
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key)
            yield from places(item, (*path, key))


@pytest.mark.long
def test_any_key_of_the_description_changed_is_taken_or_said_in_one_line(copied, tiny_folder):
    path = copied / "adapter_config.json"
    content = json.loads(path.read_bytes())
    assert read(copied, tiny_folder) is None
    known = {"fine_tune_type", "num_layers", "lora_parameters", "mlx_nb", "model"}
    for where in [one for one in places(content) if one[0] in known and one[1:2] != ("settings",)]:
        for value in VALUES:
            forged = copy.deepcopy(content)
            inner = forged
            for key in where[:-1]:
                inner = inner[key]
            inner[where[-1]] = value
            path.write_text(json.dumps(forged))
            reason = read(copied, tiny_folder)
            if where in (("lora_parameters",), ("mlx_nb",), ("mlx_nb", "base")) and value is not None and value != {}:
                assert reason is not None or isinstance(value, dict), (where, value)


@pytest.mark.long
def test_any_key_of_a_description_of_peft_changed_is_taken_or_said_in_one_line(tiny_folder, tmp_path):
    folder = tmp_path / "peft"
    shutil.copytree(PEFT_ADAPTER, folder)
    path = folder / "adapter_config.json"
    content = json.loads(path.read_bytes())
    assert "another base" in read(folder, tiny_folder)
    for key in content:
        for value in VALUES:
            path.write_text(json.dumps({**content, key: value}))
            reason = read(folder, tiny_folder)
            if key in ("r", "lora_alpha") and not (value is True or isinstance(value, int | float)):
                assert reason is not None, (key, value)


FILES = {
    "nothing": b"",
    "no JSON": b"{",
    "no text": b"\xff\xfe\x00",
    "nested": b"[" * 5000 + b"]" * 5000,
    "a key twice": b'{"num_layers": 1, "num_layers": 2}',
    "null": b"null",
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_an_invalid_description_is_a_one_line_error(content, copied, tiny_folder):
    (copied / "adapter_config.json").write_bytes(content)
    assert "adapter_config.json" in read(copied, tiny_folder)


def with_header(header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


WEIGHTS = {
    "nothing": b"",
    "half a length": b"\x01\x02",
    "a huge length": b"\xff" * 64,
    "a list": with_header([1, 2]),
    "a list of names": with_header(["a", "b"]),
    "text": with_header("abc"),
    "a number": with_header(5),
    "null": with_header(None),
    "no JSON": with_header(b"{"),
    "no text": with_header(b"\xff" * 9),
    "nested": with_header(b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "no tensors": with_header({"__metadata__": {}}),
    "a layer without end": with_header({f"model.layers.{'9' * 5000}.q_proj.lora_a": {}}),
    "tensors that are none": with_header({"model.layers.0.self_attn.q_proj.lora_a": 5}),
    "offsets beyond the end": with_header(
        {"model.layers.0.self_attn.q_proj.lora_a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 10**9]}}
    ),
    "an unknown dtype": with_header(
        {"model.layers.0.self_attn.q_proj.lora_a": {"dtype": "Z9", "shape": [1], "data_offsets": [0, 4]}}
    )
    + b"\0" * 4,
}


@pytest.mark.parametrize("content", WEIGHTS.values(), ids=WEIGHTS)
def test_invalid_weights_are_one_line_errors(content, copied, tiny_folder, tmp_path):
    (copied / "adapters.safetensors").write_bytes(content)
    values = {"model": str(tiny_folder), "data": tiny_rows(8), "iters": 1, "val_set_size": 0}
    with pytest.raises(ModelError) as caught:
        Run(
            RunConfig.from_dict({**values, "resume_adapter_file": str(copied), "adapter_path": str(tmp_path / "b")})
        ).step()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("resume_adapter_file: ")


@pytest.mark.parametrize("source", ["~nobody-of-that-name/x", "x/" * 1200, "a\0b"])
def test_an_impossible_path_is_a_one_line_error(source):
    with pytest.raises(ModelError) as caught:
        open_adapter(source, START)
    assert "\n" not in str(caught.value)


def test_a_link_to_itself_is_a_one_line_error(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ModelError) as caught:
        open_adapter(str(tmp_path / "loop"), START)
    assert "\n" not in str(caught.value)
