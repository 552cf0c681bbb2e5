"""A saved adapter is used again: by mlx_nb without its run, and by mlx-lm with the model that it names."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import pytest

import mlx_nb
from mlx_nb.errors import ModelError
from mlx_nb.run.saved_model import how_to_use
from runs import rows_run


@pytest.fixture
def saved(tmp_path, tiny_folder, monkeypatch):
    """A run whose model is named by a relative path, and its adapter."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, tmp_path / "models" / "tiny")
    run = rows_run(tmp_path, "models/tiny", iters=6, learning_rate=1e-2)
    run.run()
    return run, run.save("mine")


@pytest.mark.long
def test_a_saved_adapter_answers_as_its_run_does(saved, tmp_path, monkeypatch):
    run, folder = saved
    monkeypatch.chdir(tmp_path / "models")
    model = mlx_nb.load(folder)
    assert model.update == 6
    for asked in ({}, {"base": True}, {"temperature": 0.8, "seed": 3}):
        answer = run.generate("say red", max_tokens=12, **asked)
        assert model.generate("say red", max_tokens=12, **asked) == answer
    reported = []
    many = model.generate(["say red", "say blue"], max_tokens=6, on_text=lambda texts: reported.append(list(texts)))
    assert reported[-1] == many
    assert model.generate("say red", max_tokens=12) != model.generate("say red", max_tokens=12, base=True)


@pytest.mark.long
def test_an_adapter_names_a_model_that_mlx_lm_loads(saved, tmp_path, monkeypatch):
    from mlx_lm import load

    _, folder = saved
    described = json.loads((folder / "adapter_config.json").read_text())
    assert described["mlx_nb"]["model"] == "models/tiny"
    monkeypatch.chdir("/")
    load(described["model"], adapter_path=str(folder))


@pytest.mark.long
def test_saving_says_what_to_type_and_that_works(saved, monkeypatch):
    run, folder = saved
    lines = how_to_use(run.config, run.loaded, folder)
    (python,) = [line.strip() for line in lines if "mlx_nb.load" in line]
    (terminal,) = [line.strip() for line in lines if line.strip().startswith("mlx_lm.generate ")]
    answered = {}
    exec(re.sub(r"mlx_nb\.load", "answer = mlx_nb.load", python), answered)
    assert answered["answer"] == run.generate("Hello")
    words = shlex.split(terminal)
    from mlx_lm import load

    load(words[words.index("--model") + 1], adapter_path=words[words.index("--adapter-path") + 1])


@pytest.mark.long
def test_an_adapter_of_mlx_lm_and_one_that_has_moved_are_loaded_too(saved, tmp_path):
    run, folder = saved
    facts = json.loads((folder / "adapter_config.json").read_text())
    del facts["mlx_nb"]
    (folder / "adapter_config.json").write_text(json.dumps(facts))
    assert mlx_nb.load(folder).generate("say red") == run.generate("say red")
    (folder / "adapter_config.json").write_text(json.dumps({**facts, "model": "/no/such/folder"}))
    with pytest.raises(ModelError):
        mlx_nb.load(folder)
    assert mlx_nb.load(folder, model=str(tmp_path / "models" / "tiny")).generate("say red") == run.generate("say red")


@pytest.mark.parametrize("what", ["nothing", "no JSON", "no model"])
@pytest.mark.matrix(every=3)
def test_what_is_no_adapter_is_refused_in_one_line(saved, tmp_path, what):
    _, folder = saved
    if what == "nothing":
        folder = tmp_path / "empty"
    elif what == "no JSON":
        (folder / "adapter_config.json").write_text("{")
    else:
        (folder / "adapter_config.json").unlink()
    with pytest.raises(ModelError) as caught:
        mlx_nb.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
