"""The example notebooks, executed on the real model as a person would, and what they claim."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import nbformat
import pytest

from mlx_nb.notebook.quickstart import run_quickstart
from places import NOTEBOOKS

pytestmark = [pytest.mark.real_model, pytest.mark.kernel]

# What is asked of the kernel of each notebook once all its cells are executed.
ROWS = """{
    "left_out": sum(len(rows) for rows in run.left_out.values()),
    "validation_loss": [round(one["loss"], 3) for one in run.history.evaluations("valid")],
    "hardest": list(run.row_losses())[:3],
}"""
RESUMED = """{
    "same_losses": same_losses,
    "same_adapter": same_adapter,
    "left": [round(row["loss"], 3) for row in whole.history.abandoned()[0]],
    "fork_megabytes": round(shared / 1e6),
    "instead": [round(loss, 3) for loss in whole.history["loss"][4:]],
}"""
BY_HAND = """{
    "updates": run.step_count,
    "learning_rate_changes": [event.new for event in run.history.events if type(event).__name__ == "SettingChanged"],
    "samples": len(answers),
    "validation_loss": [round(one["loss"], 3) for one in run.history.evaluations("valid")],
}"""
PREFERRED = """def measured(run, name):
    events = [event for event in run.history.events if type(event).__name__ == "EvaluationCompleted"]
    return [round(event.metrics[name], 3) for event in events]


{
    "dpo_accuracy": measured(dpo, "accuracy"),
    "dpo_margin": measured(dpo, "margin"),
    "first_loss": round(dpo.history["loss"][0], 4),
    "orpo_accuracy": measured(orpo, "accuracy"),
    "orpo_nll": measured(orpo, "nll"),
    "words": [len(answer.split()) for answer in orpo.generate(questions, max_tokens=32)],
    "own_gap": measured(own, "gap"),
}"""
REWARDED = """steps = [event.metrics for event in run.history.events if type(event).__name__ == "StepCompleted"]


def mean(name, part):
    return round(sum(one[name] for one in part) / len(part), 3)


{
    "reward": [mean("reward", steps[:6]), mean("reward", steps[-6:])],
    "completion_tokens": [mean("completion_tokens", steps[:6]), mean("completion_tokens", steps[-6:])],
    "largest_kl": round(max(one["kl"] for one in steps), 3),
    "validation_reward": [round(-one["loss"], 3) for one in run.history.evaluations("valid")],
    "updates": run.step_count,
}"""

SHIPPED = """{
    "lost": {one.precision: round(one.lost, 2) for one in report.candidates},
    "predicted": {one.precision: round(one.predicted, 2) for one in report.candidates},
    "base": report.base_loss,
    "recommended": report.recommended,
}"""


def executed(folder: Path, name: str, asked: str) -> nbformat.NotebookNode:
    from nbclient import NotebookClient

    for rows in ("home_requests", "short_answers"):
        shutil.copytree(NOTEBOOKS / rows, folder / rows)
    notebook = nbformat.read(NOTEBOOKS / name, 4)
    notebook.cells.append(nbformat.v4.new_code_cell(asked))
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def text_of(notebook: nbformat.NotebookNode, source: str) -> str:
    """The plain text of the first cell that begins with `source`."""
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.startswith(source))
    return "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)


def result_of(notebook: nbformat.NotebookNode) -> dict:
    """The value of the last cell."""
    return ast.literal_eval(notebook.cells[-1].outputs[-1]["data"]["text/plain"])


def test_the_quickstart_learns_its_task(tmp_path, capsys):
    assert run_quickstart(str(tmp_path / "quickstart"), as_json=True) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["before"]["exact_match"] < 0.1
    assert summary["after"]["exact_match"] > 0.9
    assert summary["after"]["validation_loss"] < summary["before"]["validation_loss"] / 10


def test_rows_and_masks_finds_what_was_broken(tmp_path):
    notebook = executed(tmp_path, "02_rows_and_masks.ipynb", ROWS)
    check = text_of(notebook, "%finetune check")
    for row in (40, 41, 42, 43, 45, 46):
        assert f"row {row}" in check, row
    assert "row 5: the same as training row 44" in check
    assert "<script>alert(1)</script>" in text_of(notebook, "%finetune row 47")
    assert "left out" in text_of(notebook, "%finetune row 40")
    result = result_of(notebook)
    assert result["left_out"] == 0
    assert result["validation_loss"][-1] < 0.5 < result["validation_loss"][0]


def test_stop_resume_rewind_ends_bit_for_bit_the_same(tmp_path):
    notebook = executed(tmp_path, "03_stop_resume_rewind.ipynb", RESUMED)
    result = result_of(notebook)
    assert result["same_losses"]
    assert result["same_adapter"]
    assert len(result["left"]) == len(result["instead"]) == 6
    assert result["left"][0] == result["instead"][0]
    assert result["left"][1:] != result["instead"][1:]
    assert result["fork_megabytes"] < 100


def test_training_under_your_hand_pauses_changes_and_ends(tmp_path):
    notebook = executed(tmp_path, "04_training_under_your_hand.ipynb", BY_HAND)
    result = result_of(notebook)
    assert result["updates"] == 16
    assert result["learning_rate_changes"] == [2e-4]
    assert result["samples"] == 3
    assert result["validation_loss"][-1] < result["validation_loss"][0] / 2
    assert (tmp_path / "hand_report.html").stat().st_size > 10_000


def test_preferences_are_told_apart_and_orpo_answers_in_a_word(tmp_path):
    notebook = executed(tmp_path, "05_preferences.ipynb", PREFERRED)
    result = result_of(notebook)
    assert result["first_loss"] == 0.6931
    assert result["dpo_accuracy"][-1] > 0.9 > result["dpo_accuracy"][0]
    assert result["dpo_margin"][-1] > 1
    assert result["orpo_accuracy"][-1] > 0.9 > result["orpo_accuracy"][0]
    assert result["orpo_nll"][-1] < result["orpo_nll"][0] / 2
    assert max(result["words"]) <= 6
    assert result["own_gap"][-1] > result["own_gap"][0] + 0.5
    assert "padding" in text_of(notebook, "import mlx.core")


def test_a_user_defined_reward_is_learned_and_a_failing_one_is_named(tmp_path):
    notebook = executed(tmp_path, "06_grpo_with_your_own_reward.ipynb", REWARDED)
    result = result_of(notebook)
    assert result["updates"] == 12
    assert result["reward"][1] > result["reward"][0] + 0.15
    # On the same held-out questions; the training reward also depends on which rows were drawn.
    assert result["validation_reward"][-1] > result["validation_reward"][0] + 0.15
    assert result["completion_tokens"][1] < result["completion_tokens"][0]
    assert result["largest_kl"] < 0.5
    assert "ValueError: no full stop" in text_of(notebook, "%finetune rollouts")


def test_a_fine_tune_is_shipped_with_what_it_learned(tmp_path):
    notebook = executed(tmp_path, "07_ship_it.ipynb", SHIPPED)
    result = result_of(notebook)
    assert result["lost"]["base"] > 0.5 > result["lost"]["16-bit"]
    assert result["predicted"]["base"] > result["predicted"]["mixed"]
    assert result["recommended"] != "base"
    assert "with the adapter" in text_of(notebook, "%finetune fuse home_fused")
    assert "all 272 tensors were read back" in text_of(notebook, "%finetune gguf home_gguf")
    assert "home-lora.gguf" in text_of(notebook, "%finetune gguf home_adapter")
