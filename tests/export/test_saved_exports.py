"""A saved adapter, in the format of mlx-lm or PEFT, is written for other programs without its run."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import mlx_nb
from exported_families import family_run
from mlx_nb.cli import main
from mlx_nb.errors import CommandError, FolderTaken
from mlx_nb.model.gguf.convert import write_model
from mlx_nb.model.loading import load_model
from mlx_nb.notebook.commands import run_line
from mlx_nb.notebook.session import Session
from runs import rows_run

TOKENS = mx.array([[3, 9, 4, 20, 7]])


def logits_of(model):
    return np.array(model(TOKENS)[0].astype(mx.float32))


def saved_adapter(folder, tiny_folder, format="mlx-lm", **settings):
    """The logits of a trained run, whose adapter is in the folder `saved`; the run is gone."""
    folder.mkdir()
    run = rows_run(folder, tiny_folder, iters=2, learning_rate=1e-2, steps_per_eval=-1, save_every=-1, **settings)
    run.run()
    run.save(folder / "saved", format=format)
    logits = logits_of(run.model)
    run.release()
    return logits


@pytest.mark.parametrize(
    ("format", "settings"),
    [("mlx-lm", {}), ("peft", {}), ("mlx-lm", {"fine_tune_type": "full"}), ("mlx-lm", {"load_in_bits": 4})],
    ids=str,
)
@pytest.mark.matrix(every=2)
def test_mlx_lm_loads_the_fused_model_of_a_saved_adapter(format, settings, tmp_path, tiny_folder):
    from mlx_lm import load

    trained = saved_adapter(tmp_path / "run", tiny_folder, format, **settings)
    model = mlx_nb.load(tmp_path / "run" / "saved")
    before = logits_of(model.model)
    report = model.fuse(tmp_path / "fused", precision="16-bit" if "load_in_bits" in settings else "base")
    fused, _ = load(str(tmp_path / "fused"))
    assert np.abs(trained - logits_of(fused)).max() < (0.05 if "load_in_bits" in settings else 1e-4)
    assert (report.measured, report.candidates[0].predicted) == (None, None)  # it has no rows
    assert (logits_of(model.model) == before).all()
    with pytest.raises(FolderTaken, match="is the folder of the run 'saved'"):
        model.fuse(tmp_path / "run" / "saved")


@pytest.mark.long
def test_a_gguf_file_of_a_saved_adapter_has_its_weights(tmp_path, tiny_folder, no_llama_cpp):
    run = family_run(tmp_path, "llama")
    run.save(tmp_path / "saved", format="peft")
    trained = logits_of(run.model)
    run.release()
    written = mlx_nb.load(tmp_path / "saved").gguf(tmp_path / "out", type="f32")
    assert written.path.name == "saved-f32.gguf"
    again = load_model(str(write_model(written.path, tmp_path / "again"))).model
    assert np.abs(trained - logits_of(again)).max() < 1e-3
    adapter = mlx_nb.load(tmp_path / "saved").gguf(tmp_path / "adapter", adapter=True)
    assert adapter.path.name == "saved-lora.gguf"


@pytest.mark.long
def test_llama_cpp_opens_the_file_of_a_saved_adapter(tmp_path, real_llama_cpp):
    run = family_run(tmp_path, "llama")
    run.save(tmp_path / "saved")
    run.release()
    written = mlx_nb.load(tmp_path / "saved").gguf(tmp_path / "out", type="f32")
    assert written.checked.kl < 1e-4


@pytest.mark.long
def test_a_merged_adapter_is_written_by_its_name(tmp_path, tiny_folder):
    from mlx_lm import load

    saved_adapter(tmp_path / "run", tiny_folder)
    model = mlx_nb.load(tmp_path / "run" / "saved")
    half = model.adapters.merge("half", {"saved": 0.5})
    half.fuse(tmp_path / "fused")
    fused, _ = load(str(tmp_path / "fused"))
    assert np.abs(logits_of(half.model) - logits_of(fused)).max() < 1e-4
    assert np.abs(logits_of(model.model) - logits_of(fused)).max() > 0.01


def test_the_commands_take_a_saved_adapter(tmp_path, tiny_folder, monkeypatch, capsys, no_llama_cpp):
    saved_adapter(tmp_path / "run", tiny_folder)
    monkeypatch.chdir(tmp_path / "run")
    shown = str(run_line(Session({}), "fuse fused --from saved"))
    assert "mlx_lm.generate --model fused" in shown
    with pytest.raises(CommandError, match="cannot be combined"):
        run_line(Session({}), "fuse fused --from saved --name run")
    assert main(["fuse", "saved", "again"]) == 0
    assert main(["fuse", "saved"]) == 0
    assert main(["gguf", "saved", "out", "--type", "f32"]) == 0
    out = capsys.readouterr().out
    assert "mlx_lm.generate --model again" in out
    assert "ollama create saved-f32 -f out/Modelfile" in out
    assert main(["fuse", "nowhere", "x"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
