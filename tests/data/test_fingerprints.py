"""What a run was made from is fingerprinted when it is read: what happens to it later is told, and never swallowed."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from mlx_nb import Run, RunConfig
from mlx_nb.errors import CheckpointError, DataError, MlxNbError
from mlx_nb.events import DataChanged
from tiny import CHAT_TEMPLATE, save_tiny_model, tiny_pairs, tiny_rows

SETTINGS = {"iters": 8, "batch_size": 2, "val_set_size": 0, "save_every": 2, "lora_parameters": {"rank": 2}}


def new_run(folder, model, data, **settings):
    values = {**SETTINGS, "model": str(model), "data": data, "adapter_path": str(folder / "a"), **settings}
    return Run(RunConfig.from_dict(values))


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write(path, kind, rows):
    """The rows as a file of a kind."""
    import gzip

    if kind == "jsonl":
        jsonl(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "splits":
        path.write_text(json.dumps({"train": rows}))
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


FILES = {"jsonl": "rows.jsonl", "json": "rows.json", "splits": "rows.json", "gz": "rows.jsonl.gz"}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.matrix(every=2)
def test_a_file_that_changes_after_it_was_read_is_reported_once_and_refused_by_a_resume(tmp_path, tiny_folder, kind):
    file = tmp_path / FILES[kind]
    write(file, kind, tiny_rows())
    run = new_run(tmp_path, tiny_folder, str(file))
    run.step()
    write(file, kind, tiny_rows(30))
    happened = list(run.events())
    assert [event.path for event in happened if isinstance(event, DataChanged)] == [str(file)]
    assert run.finished
    assert len(run.checkpoints()) == 3
    with pytest.raises(CheckpointError, match="changed since the checkpoint of step 8: data"):
        Run.resume(tmp_path / "a")
    write(file, kind, tiny_rows())
    assert Run.resume(tmp_path / "a").step_count == 8


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.matrix(every=2)
def test_a_file_that_was_only_touched_has_not_changed(tmp_path, tiny_folder, kind):
    file = tmp_path / FILES[kind]
    write(file, kind, tiny_rows())
    run = new_run(tmp_path, tiny_folder, str(file))
    run.step()
    os.utime(file, (1, 1))
    assert not [event for event in run.events() if isinstance(event, DataChanged)]
    assert "say red 0" in run.rows("train").examples.view(0).conversation.text
    assert Run.resume(tmp_path / "a").step_count == 8


def test_every_file_of_a_mixture_is_watched(tmp_path, tiny_folder):
    one, two = jsonl(tmp_path / "one.jsonl", tiny_rows(12)), jsonl(tmp_path / "two.jsonl", tiny_rows(12))
    run = new_run(tmp_path, tiny_folder, [{"path": str(one), "weight": 1}, {"path": str(two), "weight": 2}])
    run.step()
    two.unlink()
    assert [event.path for event in run.events() if isinstance(event, DataChanged)] == [str(two)]


def test_a_row_in_memory_that_changes_before_the_first_checkpoint_is_refused_by_a_resume(tmp_path, tiny_folder):
    rows = tiny_rows()
    run = new_run(tmp_path, tiny_folder, rows)
    run.step()
    rows[3]["messages"][1]["content"] = "something else"
    run.checkpoint()
    with pytest.raises(CheckpointError, match="changed since the checkpoint of step 1: data"):
        Run.resume(tmp_path / "a", data=rows)
    assert Run.resume(tmp_path / "a", data=tiny_rows()).step_count == 1


@pytest.mark.long
def test_a_base_that_is_replaced_before_the_first_checkpoint_is_refused_by_a_resume(tmp_path, tiny_folder):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    run = new_run(tmp_path, model, tiny_rows())
    run.step()
    original = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(original[:-4] + b"\0\0\0\x3f")
    run.checkpoint()
    run.save()
    with pytest.raises(CheckpointError, match="changed since the checkpoint of step 1: model"):
        Run.resume(tmp_path / "a", data=tiny_rows())
    (model / "model.safetensors").write_bytes(original)
    assert Run.resume(tmp_path / "a", data=tiny_rows()).adapter_bytes() == run.adapter_bytes()


def test_a_template_file_that_changes_after_it_was_read_is_refused_by_a_resume(tmp_path, tiny_folder):
    template = tmp_path / "template.jinja"
    template.write_text(CHAT_TEMPLATE)
    run = new_run(tmp_path, tiny_folder, tiny_rows(), chat_template=str(template))
    run.step()
    template.write_text(CHAT_TEMPLATE.replace("<|end|>", "<|end|> "))
    run.checkpoint()
    with pytest.raises(CheckpointError, match="changed since the checkpoint of step 1: template"):
        Run.resume(tmp_path / "a", data=tiny_rows())
    template.write_text(CHAT_TEMPLATE)
    assert Run.resume(tmp_path / "a", data=tiny_rows()).step_count == 1


def test_a_new_run_has_the_template_that_its_file_has_now_although_an_earlier_run_shares_the_base(
    tmp_path, tiny_folder
):
    template = tmp_path / "template.jinja"
    rows = {}
    runs = []  # the earlier run stays in memory
    for name, text in (("a", CHAT_TEMPLATE), ("b", CHAT_TEMPLATE.replace("<|end|>", "<|end|> "))):
        template.write_text(text)
        runs.append(
            new_run(tmp_path, tiny_folder, tiny_rows(), chat_template=str(template), adapter_path=str(tmp_path / name))
        )
        runs[-1].step()
        assert runs[-1].tokenizer.chat_template == text
        rows[name] = runs[-1].inputs.examples.train[0].tokens.tolist()
    assert rows["a"] != rows["b"]
    assert runs[0].tokenizer.chat_template == CHAT_TEMPLATE


def test_a_reference_that_changes_before_it_is_read_is_refused(tmp_path, tiny_folder):
    earlier = new_run(tmp_path, tiny_folder, tiny_rows(), adapter_path=str(tmp_path / "earlier"))
    earlier.run()
    run = new_run(tmp_path, tiny_folder, tiny_pairs(), method="dpo", reference_adapter=str(tmp_path / "earlier"))
    assert run.trainer
    earlier.rewind(to=6)
    earlier.save()
    with pytest.raises(MlxNbError, match=r"reference_adapter.*changed between the start of the run"):
        run.step()


def test_a_file_that_changes_while_it_is_being_read_is_refused(tmp_path, tiny_folder):
    file = jsonl(tmp_path / "rows.jsonl", tiny_rows())
    run = new_run(tmp_path, tiny_folder, str(file))
    assert run.splits
    content = file.read_text()
    file.write_text(content.replace("red", "RED"))
    with pytest.raises(DataError, match="was changed while it was open"):
        run.step()


def test_the_fingerprint_of_a_file_is_that_of_all_its_bytes(tmp_path):
    import hashlib

    from mlx_nb.data.sources.files import open_file

    for start in (b"", b"\xef\xbb\xbf"):
        file = tmp_path / "rows.jsonl"
        file.write_bytes(start + b'{"text": "a"}\n\n{"text": "b"}')
        assert open_file(file).fingerprint() == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_model_folder_saved_again_with_the_same_bytes_is_the_same_base(tmp_path, tiny_folder):
    model = save_tiny_model(tmp_path)
    run = new_run(tmp_path / "run", model, tiny_rows())
    run.step()
    run.checkpoint()
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").write_bytes(content)
    assert Run.resume(tmp_path / "run" / "a", data=tiny_rows()).step_count == 1
