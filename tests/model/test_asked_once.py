"""What is proved of a model is proved once for all models of the same files, and again for others."""

from __future__ import annotations

import shutil

import mlx.core as mx
import pytest

from mlx_nb.errors import ModelError
from mlx_nb.model.passes import once_per_model, register_files, register_same_files
from runs import rows_run
from tiny import tiny_model


def test_a_good_answer_is_that_of_every_model_of_the_same_files_and_others_are_asked_anew():
    asked = []

    @once_per_model(good=lambda answer: answer == "good")
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
    with pytest.raises(ModelError, match="nothing that would be trained has a gradient"):
        rows_run(tmp_path, model, adapter_path=str(tmp_path / "b")).step()


def test_a_second_run_of_the_same_model_is_the_first_bit_for_bit(tmp_path, tiny_folder):
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    runs = [rows_run(tmp_path, model, adapter_path=str(tmp_path / name)) for name in ("a", "b")]
    for run in runs:
        run.run()
    assert runs[0].adapter_bytes() == runs[1].adapter_bytes()
    assert runs[0].history["loss"] == runs[1].history["loss"]
