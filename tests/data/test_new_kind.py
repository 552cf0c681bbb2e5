"""A kind of row from outside the package: three records and a reader, and it trains, shows, checks and resumes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import mlx_nb
from mlx_nb import Run, RunConfig
from mlx_nb.config.methods import METHODS
from mlx_nb.config.row_kinds import ROW_KINDS as FACTS
from mlx_nb.config.row_kinds import KindFacts
from mlx_nb.data.examples.kinds import ROW_KINDS, RowKind
from mlx_nb.data.rows.imitation import PromptCompletionRow
from mlx_nb.errors import DataError
from mlx_nb.objectives.kinds import LOSS_KINDS
from mlx_nb.train.memory_plan import sequences_in
from mlx_nb.train.update_memory import BatchShape, planned_batch
from tiny import tiny_rows


@dataclasses.dataclass(frozen=True)
class RatedRow(PromptCompletionRow):
    """An answer with stars, from 0 to 5: as many fifths of its loss count."""

    stars: float = 5.0
    shape = "rated answer"

    def ratings(self):
        return {"stars": self.stars}


def read(record, columns):
    if not 0 <= record.get("stars", -1) <= 5:
        raise DataError("`stars` must be a number from 0 to 5.")
    return RatedRow(record["prompt"], record["completion"], record["stars"])


def cut(content, conversations, row, settings):
    (example,) = ROW_KINDS["tokens"].cut(content, conversations, row, settings)
    return [dataclasses.replace(example, loss_mask=example.loss_mask * np.float32(content.stars / 5))]


@pytest.fixture(autouse=True)
def rated(monkeypatch):
    monkeypatch.setitem(FACTS, "rated", KindFacts("answers with stars", loss_of_row="weighted by its stars"))
    monkeypatch.setitem(ROW_KINDS, "rated", RowKind(read, ROW_KINDS["tokens"].tokenize, cut, unit="answer"))
    monkeypatch.setitem(LOSS_KINDS, "rated", LOSS_KINDS["tokens"])

    @mlx_nb.register_objective("stars", rows="rated")
    def stars(targets):
        return -targets.logprob_S

    yield
    METHODS.pop("stars")


def rated_rows():
    said = [[message["content"] for message in row["messages"]] for row in tiny_rows(24)]
    return [
        {"prompt": prompt, "completion": completion, "stars": 1 + number % 5}
        for number, (prompt, completion) in enumerate(said)
    ]


def rated_run(folder, model, data):
    settings = {"model": str(model), "data": data, "method": "stars", "batch_size": 4, "val_set_size": 0}
    return Run(RunConfig.from_dict({**settings, "iters": 12, "learning_rate": 1e-2, "adapter_path": str(folder / "a")}))


def test_it_trains_by_its_stars_and_resumes_bit_for_bit(tmp_path, tiny_folder):
    straight = rated_run(tmp_path / "one", tiny_folder, rated_rows())
    straight.run()
    assert straight.history["loss"][-1] < straight.history["loss"][0]
    weights = {
        example.row: set(example.loss_mask[example.loss_mask > 0].tolist())
        for example in straight.trainer.examples.train
    }
    assert weights[0] == {np.float32(0.2)}
    assert weights[4] == {1.0}
    stopped = rated_run(tmp_path / "two", tiny_folder, rated_rows())
    stopped.step(5)
    stopped.checkpoint()
    resumed = Run.resume(tmp_path / "two" / "a", namespace={}, data=rated_rows())
    resumed.run()
    assert resumed.history["loss"] == straight.history["loss"]
    assert resumed.adapter_bytes() == straight.adapter_bytes()


def test_it_shows_its_stars_and_the_check_names_a_bad_row(tmp_path, tiny_folder):
    rows = rated_rows()
    rows[7]["stars"] = 9
    run = rated_run(tmp_path, tiny_folder, rows)
    assert "stars: 3" in repr(run.rows("train")[2])
    assert "`stars` must be a number from 0 to 5" in run.rows("train")[7].error
    check = run.check()
    assert check.splits[0].shapes == {"rated answer": 23}
    (found,) = [one for one in check.findings if one.kind == "unreadable"]
    assert [row for row, _ in found.examples] == [7]
    run.step()
    assert [left.row for left in run.left_out["train"]] == [7]


def test_every_kind_has_its_three_entries():
    assert list(FACTS) == list(ROW_KINDS) == list(LOSS_KINDS)


@pytest.mark.parametrize("like", ["tokens", "pairs", "labels"])
def test_the_memory_of_a_new_kind_is_planned_like_that_of_the_kind_with_the_same_entries(like, monkeypatch):
    for table in (FACTS, ROW_KINDS, LOSS_KINDS):
        monkeypatch.setitem(table, "new", table[like])
    known = next(method for method in METHODS.values() if method.row_kind == like)
    monkeypatch.setitem(METHODS, "new", dataclasses.replace(known, name="new", row_kind="new"))
    config = {"model": "smollm2-135m", "data": [{"text": "any row"}]}
    batches = [
        planned_batch(RunConfig.from_dict({**config, "method": name}), 100, BatchShape(4, 8, 3))
        for name in (known.name, "new")
    ]
    assert batches[0].tokens_BT.tolist() == batches[1].tokens_BT.tolist()
    assert set(batches[0].row_values) == set(batches[1].row_values)
    assert len({sequences_in(RunConfig.from_dict({**config, "method": name}), 3) for name in (known.name, "new")}) == 1


def test_its_losses_obey_the_laws():
    assert len(mlx_nb.check_objective("stars")) >= 6
