"""What is proved of a model is proved once for all models of the same files, and again for others."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import types
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx_lm.models import base, cache

from mlx_nb.errors import ModelError
from mlx_nb.model import stored_checks
from mlx_nb.model.once_per_model import once_per_model, register_files, register_same_files
from runs import rows_run
from tiny import tiny_model

CHECKS_FOLDER = stored_checks.checks_folder


def test_a_good_result_is_shared_by_models_of_the_same_files_and_computed_again_for_others():
    asked = []

    @once_per_model(good=lambda answer: answer == "good", from_json=str)
    def question(model, answer):
        asked.append(answer)
        return answer

    models = [tiny_model() for _ in range(4)]
    for model in models[:2]:
        register_files(model, ("folder", 1))
    register_files(models[2], ("folder", 2))
    for model in models:
        assert [question(model, answer) for answer in ("good", "bad", "good", "bad")] == ["good", "bad"] * 2
    assert asked == ["good", "bad", "bad", "good", "bad", "good", "bad"]
    one, other = tiny_model(), tiny_model()
    register_same_files(one, models[0])
    register_same_files(other, models[3])
    asked.clear()
    assert (question(one, "good"), question(other, "good")) == ("good", "good")
    assert asked == ["good"]


def test_a_run_of_files_that_were_changed_since_is_tried_again(tmp_path, tiny_folder):
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    rows_run(tmp_path, model).step()
    weights = mx.load(str(model / "model.safetensors"))
    zeros = {name: mx.zeros_like(array) for name, array in weights.items()}
    mx.save_safetensors(str(model / "model.safetensors"), zeros, metadata={"format": "mlx"})
    with pytest.raises(ModelError, match="no trained parameter has a gradient"):
        rows_run(tmp_path, model, adapter_path=str(tmp_path / "b")).step()


@pytest.mark.long
def test_a_second_run_of_the_same_model_is_the_first_bit_for_bit(tmp_path, tiny_folder):
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    runs = [rows_run(tmp_path, model, adapter_path=str(tmp_path / name)) for name in ("a", "b")]
    for run in runs:
        run.run()
    assert runs[0].adapter_bytes() == runs[1].adapter_bytes()
    assert runs[0].history["loss"] == runs[1].history["loss"]


@pytest.fixture
def slow_check(tmp_path, monkeypatch):
    """A function that makes a check of a later process, which computes into the list that is given."""
    monkeypatch.setenv("MLX_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stored_checks, "checks_folder", CHECKS_FOLDER)
    monkeypatch.setattr("mlx_nb.model.once_per_model._WORTH_STORING_SECONDS", 0.0)

    def in_a_new_process(computed):
        @once_per_model(good=lambda answer: answer != "bad", from_json=str)
        def check(model, answer):
            computed.append(answer)
            return answer

        return check

    return in_a_new_process


def of_files(*files):
    model = tiny_model()
    register_files(model, files)
    return model


def test_a_good_result_is_read_by_later_processes_and_others_are_computed_again(slow_check):
    computed = []
    for _ in range(3):
        check = slow_check(computed)
        assert [check(of_files("folder", 1), answer) for answer in ("good", "bad")] == ["good", "bad"]
    assert computed == ["good", "bad", "bad", "bad"]
    slow_check(computed)(of_files("folder", 2), "good")
    slow_check(computed)(tiny_model(), "good")  # of no files
    assert computed[4:] == ["good", "good"]


def wrapped(function):
    @functools.wraps(function)
    def other(*args, **kwargs):
        return function(*args, **kwargs)

    return other


def with_other_constant(function):
    constants = tuple(7 if one == 4 else one for one in (*function.__code__.co_consts, 4))
    return types.FunctionType(
        function.__code__.replace(co_consts=constants), function.__globals__, closure=function.__closure__
    )


CHANGES = {
    "another function": lambda model, patch: patch.setattr(
        type(model.layers[0].self_attn), "__call__", lambda self, *args, **kwargs: args[0]
    ),
    "a wrapper": lambda model, patch: patch.setattr(
        type(model.layers[0].mlp), "__call__", wrapped(type(model.layers[0].mlp).__call__)
    ),
    "a constant": lambda model, patch: patch.setattr(
        type(model.layers[0].mlp), "__call__", with_other_constant(type(model.layers[0].mlp).__call__)
    ),
    "a property": lambda model, patch: patch.setattr(type(model), "layers", property(lambda self: [])),
    "a base class": lambda model, patch: patch.setattr(nn.Module, "eval", wrapped(nn.Module.eval)),
    "the cache": lambda model, patch: patch.setattr(
        cache.KVCache, "update_and_fetch", wrapped(cache.KVCache.update_and_fetch)
    ),
    "a mask": lambda model, patch: patch.setattr(base, "create_causal_mask", wrapped(base.create_causal_mask)),
    "an operation": lambda model, patch: patch.setattr(mx.fast, "rope", wrapped(mx.fast.rope)),
    "a scale": lambda model, patch: setattr(model.layers[0].self_attn, "scale", 0.5),
    "the dtype": lambda model, patch: model.set_dtype(mx.float16),
    "a layer": lambda model, patch: model.model.layers.pop(),
    "a version": lambda model, patch: patch.setattr(mlx_lm, "__version__", "99"),
    "a variable": lambda model, patch: patch.setenv("MLX_ENABLE_TF32", "0"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_result_is_not_that_of_a_model_or_code_that_somebody_changed(slow_check, change):
    computed, model = [], of_files("folder", 1)
    slow_check(computed)(model, "good")
    slow_check(computed)(model, "good")
    assert computed == ["good"]
    with pytest.MonkeyPatch.context() as patch:
        CHANGES[change](model, patch)
        slow_check(computed)(model, "good")
    assert computed == ["good", "good"]


def test_nothing_is_stored_by_a_process_whose_code_was_replaced_on_disk(slow_check, tmp_path, monkeypatch):
    monkeypatch.setattr(stored_checks, "_package_digest", lambda: "of an update")
    slow_check([])(of_files("folder", 1), "good")
    assert not (tmp_path / "cache" / "checks").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"results": 1}', '{"result": null}', '{"result": 5}', "[" * 100_000])
def test_a_damaged_file_is_computed_and_written_again(slow_check, tmp_path, text):
    computed = []
    slow_check(computed)(of_files("folder", 1), "good")
    (file,) = (tmp_path / "cache" / "checks").iterdir()
    written = file.read_bytes()
    file.write_text(text)
    slow_check(computed)(of_files("folder", 1), "good")
    assert computed == ["good", "good"]
    assert file.read_bytes() == written


def test_without_a_folder_to_write_to_each_process_computes(slow_check, tmp_path, monkeypatch):
    computed = []
    for place in (tmp_path / "file", Path("/proc/nowhere")):
        (tmp_path / "file").touch()
        monkeypatch.setenv("MLX_NB_CACHE", str(place))
        assert slow_check(computed)(of_files("folder", 1), "good") == "good"
    assert computed == ["good", "good"]


def test_what_took_no_time_is_not_stored_and_the_oldest_are_removed(slow_check, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_nb.model.stored_checks._MOST_FILES", 2)
    for number in range(4):
        slow_check([])(of_files("folder", number), "good")
    assert len(list((tmp_path / "cache" / "checks").iterdir())) == 2
    monkeypatch.setattr("mlx_nb.model.once_per_model._WORTH_STORING_SECONDS", 10.0)
    slow_check([])(of_files("folder", 9), "good")
    computed = []
    slow_check(computed)(of_files("folder", 9), "good")
    assert computed == ["good"]


def test_stored_checks_import_neither_mlx_lm_nor_transformers():
    """Their import takes seconds, and is done in pieces when a model is loaded."""
    code = "import sys, mlx_nb.model.stored_checks; print(*{'mlx_lm', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
