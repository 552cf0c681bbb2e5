"""A fused model is what was trained: mlx-lm loads it and computes the same, and nothing else on the disk changes."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_nb.errors import CommandError, FolderError, FolderTaken
from mlx_nb.export import fuse as fuse_module
from mlx_nb.export.fuse_report import Candidate, recommended
from mlx_nb.export.fused_weights import ModuleLoss
from mlx_nb.files.export_folder import replacing_folder
from mlx_nb.files.written_files import EXPORT, WrittenFiles
from runs import rows_run
from tiny import CHAT_TEMPLATE

KINDS = {
    "lora": {},
    "dora": {"fine_tune_type": "dora"},
    "full": {"fine_tune_type": "full"},
    "last layer, on two keys": {
        "num_layers": 1,
        "lora_parameters": {"rank": 2, "scale": 20.0, "keys": ["q_proj", "down_proj"]},
    },
    "embedding": {"lora_parameters": {"rank": 4, "scale": 20.0, "keys": ["embed_tokens", "v_proj"]}},
    "4 bits": {"load_in_bits": 4},
    "4 bits, dora": {"load_in_bits": 4, "fine_tune_type": "dora"},
    "3 bits": {"load_in_bits": 3},
}


def trained_run(folder, tiny_folder, **settings):
    folder.mkdir(exist_ok=True)
    values = {
        "learning_rate": 1e-2,
        "iters": 4,
        "steps_per_eval": -1,
        "save_every": -1,
        "val_set_size": 0.25,
        **settings,
    }
    run = rows_run(folder, tiny_folder, **values)
    run.run()
    return run


def logits_of(model, tokens):
    return np.array(model(mx.array([tokens]))[0].astype(mx.float32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.matrix(every=5)
def test_mlx_lm_loads_a_fused_model_and_computes_the_same(kind, tmp_path, tiny_folder):
    from mlx_lm import load
    from mlx_lm.generate import generate

    run = trained_run(tmp_path / "run", tiny_folder, **KINDS[kind])
    quantized = "bits" in kind
    report = run.fuse(tmp_path / "fused", precision="16-bit" if quantized else "base")
    model, tokenizer = load(str(tmp_path / "fused"))
    tokens = tokenizer.encode("say red 3")
    trained, fused = (logits_of(one, tokens) for one in (run.model, model))
    base = logits_of(run.inputs.base_model, tokens)
    assert np.abs(trained - fused).max() < (0.1 if quantized else 1e-4)
    assert np.abs(trained - fused).max() < 0.1 * np.abs(trained - base).max() or kind == "full"
    if not quantized:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "say red 3"}], add_generation_prompt=True)
        assert generate(model, tokenizer, prompt, max_tokens=12) == run.generate("say red 3", max_tokens=12)
    assert report.measured == pytest.approx(report.measured_adapter, abs=0.01)
    assert "quantization" not in json.loads((tmp_path / "fused" / "config.json").read_text())


@pytest.mark.parametrize("precision", ["base", "mixed"])
@pytest.mark.matrix(every=2)
def test_a_quantized_fuse_loses_what_was_predicted(precision, tmp_path, tiny_folder):
    from mlx_lm import load

    run = trained_run(tmp_path / "run", tiny_folder, load_in_bits=4, learning_rate=1e-3)
    before = run.adapter_bytes()
    report = run.fuse(tmp_path / "fused", precision=precision)
    model, _ = load(str(tmp_path / "fused"))
    bits = {module.bits for _, module in model.named_modules() if "scales" in module}
    assert bits == ({4, 8} if precision == "mixed" else {4})
    chosen = report.candidate(precision)
    assert chosen.predicted == pytest.approx(report.measured, abs=1e-4)
    assert chosen.bytes == pytest.approx((tmp_path / "fused" / "model.safetensors").stat().st_size, rel=0.1)
    assert report.candidate("16-bit").lost < report.candidate("mixed").lost < report.candidate("base").lost <= 1
    assert set(chosen.layers) == {"0", "1"}
    assert run.adapter_bytes() == before


@pytest.mark.long
def test_the_chat_template_and_end_tokens_of_the_training_are_in_it(tmp_path, tiny_folder):
    from mlx_lm import load

    template = CHAT_TEMPLATE.replace("<|end|>", "<|end|>!")
    run = trained_run(tmp_path / "run", tiny_folder, chat_template=template)
    run.tokenizer.add_eos_token("<|user|>")
    run.fuse(tmp_path / "fused")
    _, tokenizer = load(str(tmp_path / "fused"))
    messages = [{"role": "user", "content": "say red"}]
    rendered = [one.apply_chat_template(messages, tokenize=False) for one in (run.tokenizer, tokenizer)]
    assert rendered[0] == rendered[1]
    assert "<|end|>!" in rendered[1]
    assert set(tokenizer.eos_token_ids) == set(run.tokenizer.eos_token_ids)
    assert len(set(tokenizer.eos_token_ids)) == 2


def test_without_a_folder_nothing_is_written(tmp_path, tiny_folder, monkeypatch):
    run = trained_run(tmp_path / "run", tiny_folder, load_in_bits=4)
    monkeypatch.chdir(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    report = run.fuse()
    assert (report.path, report.measured) == (None, None)
    assert {one.precision for one in report.candidates} == {"base", "mixed", "16-bit"}
    assert sorted(path for path in tmp_path.rglob("*")) == before
    with pytest.raises(CommandError, match="Did you mean 'mixed'"):
        run.fuse(precision="mixd")


@pytest.mark.long
def test_a_folder_with_other_files_is_refused_and_an_earlier_export_is_replaced(tmp_path, tiny_folder):
    run = trained_run(tmp_path / "run", tiny_folder)
    target = tmp_path / "fused"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(FolderError, match=r"notes\.txt was not written by mlx_nb.*fused-2"):
        run.fuse(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fused", "run"]
    (target / "notes.txt").unlink()
    run.fuse(target)
    first = (target / "model.safetensors").read_bytes()
    run.more(1)
    run.run()
    run.fuse(target)
    assert (target / "model.safetensors").read_bytes() != first
    assert WrittenFiles(target).kind == EXPORT
    (target / "config.json").write_text("{}")
    with pytest.raises(FolderError, match=r"config\.json was not written by mlx_nb, or it was changed"):
        run.fuse(target)
    with pytest.raises(FolderTaken, match="is the folder of the run 'run'"):
        run.fuse(run.folder)
    with pytest.raises(FolderTaken, match="lies among the files"):
        run.fuse(run.folder / "best")
    assert (target / "config.json").read_text() == "{}"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interrupt_leaves_the_folder_as_it_was(error, tmp_path, tiny_folder, monkeypatch):
    run = trained_run(tmp_path / "run", tiny_folder)
    run.fuse(tmp_path / "fused")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(*_arguments):
        raise error

    monkeypatch.setattr(fuse_module, "_write_tokenizer", fail)  # after the weights are written
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else FolderError):
        run.fuse(tmp_path / "fused")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fused", "run"]


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, tiny_folder, monkeypatch):
    run = trained_run(tmp_path / "run", tiny_folder)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(FolderError, match="its disk has 0 MB free"):
        run.fuse(tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize("moment", ["part", "old"])
def test_what_a_killed_process_left_is_cleaned_up(moment, tmp_path):
    target = tmp_path / "fused"
    code = (
        "import os, sys; from pathlib import Path; from mlx_nb.files.export_folder import replacing_folder\n"
        "target = Path(sys.argv[1])\n"
        "with replacing_folder(target, 'a', 'one') as work: (work / 'model').write_text('first')\n"
        "rename = os.rename\n"
        "def killed(*paths):\n"
        "    rename(*paths)\n"
        "    os._exit(9)\n"
        "if sys.argv[2] == 'old': os.rename = killed\n"
        "with replacing_folder(target, 'a', 'one') as work:\n"
        "    (work / 'model').write_text('second')\n"
        "    if sys.argv[2] == 'part': os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(target), moment]).returncode == 9
    assert len(list(tmp_path.iterdir())) == 2
    with replacing_folder(target, "b", "two") as work:
        assert (target / "model").read_text() == "first"
        (work / "model").write_text("third")
    assert [path.name for path in tmp_path.iterdir()] == ["fused"]
    assert (target / "model").read_text() == "third"


def candidates(*predicted, lost=(1.0, 0.3, 0.0)):
    names = ("base", "mixed", "16-bit")
    return [
        Candidate(name, 1, (ModuleLoss("layers.0.q", 1.0, share**2, "x"),), loss)
        for name, loss, share in zip(names, predicted, lost)
    ]


@pytest.mark.parametrize(
    ("predicted", "losses", "wanted"),
    [
        ((1.01, 1.0, 1.0), (1.0, 2.0), "base"),  # keeps 99% of the gain
        ((1.9, 1.02, 1.0), (1.0, 2.0), "mixed"),
        ((1.9, 1.5, 1.0), (1.0, 2.0), "16-bit"),
        ((None, None, None), (None, None), "16-bit"),  # by the weights: 100% and 30% are lost
        ((2.0, 2.0, 2.0), (2.1, 2.0), "16-bit"),  # nothing was gained, so the weights decide
    ],
)
def test_the_smallest_precision_that_keeps_the_gain_is_recommended(predicted, losses, wanted):
    assert recommended(candidates(*predicted), *losses)[0] == wanted


@pytest.mark.long
def test_the_command_reports_writes_and_says_how_to_use_it(shell, tiny_folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"say {n}", "completion": "red"}) + "\n" for n in range(8))
    )
    shell.run_cell_magic("finetune", "--wait", f"model: {tiny_folder}\ndata: rows.jsonl\niters: 1\nload_in_bits: 4")
    only_told = str(shell.run_line_magic("finetune", "fuse"))
    assert "Nothing was written" in only_told
    assert all(word in only_told for word in ("base", "mixed", "16-bit", "Recommended", "by layer"))
    reported = str(shell.run_line_magic("finetune", "fuse fused --dequantize"))
    assert "Written in 16-bit" in reported
    assert "mlx_lm.generate --model fused" in reported
    assert (tmp_path / "fused" / "config.json").exists()
    with pytest.raises(CommandError, match="--dequantize is --precision 16-bit"):
        shell.run_line_magic("finetune", "fuse other --dequantize --precision base")
