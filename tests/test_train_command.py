"""`mlx-nb train`: how it ends, how it goes on, and its events as JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from mlx_nb.cli import main
from mlx_nb.events import RunFinished, StepCompleted, event_from_json
from mlx_nb.train.checkpoint_store import CheckpointStore
from mlx_nb.train.trainer import Trainer
from tiny import tiny_prompts, tiny_rows


@pytest.fixture
def config(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows()))
    (tmp_path / "run.yaml").write_text(f"model: {tiny_folder}\ndata: rows.jsonl\niters: 6\nval_set_size: 0\n")
    return "run.yaml"


def signal_at(monkeypatch, step, number):
    real = Trainer._update

    def update(self):
        if self.state.step == step:
            os.kill(os.getpid(), number)
        return real(self)

    monkeypatch.setattr(Trainer, "_update", update)


def test_an_interrupted_run_is_status_130_and_resume_continues(config, capsys, monkeypatch):
    signal_at(monkeypatch, 2, signal.SIGINT)
    assert main(["train", config]) == 130
    assert "--resume continues" in capsys.readouterr().out
    monkeypatch.undo()


def test_resume_continues_and_settings_may_be_options(config, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        signal_at(patched, 2, signal.SIGINT)
        assert main(["train", config, "--set", "seed=3"]) == 130
    capsys.readouterr()
    assert main(["train", config, "--resume", "--set", "seed=3", "--json"]) == 0
    events = [event_from_json(line) for line in capsys.readouterr().out.splitlines()]
    assert [event.step for event in events if isinstance(event, StepCompleted)] == [4, 5, 6]
    assert isinstance(events[-1], RunFinished)


TERMINATED = """
import os, signal, sys
from mlx_nb.cli import main
from mlx_nb.train.trainer import Trainer
real = Trainer._update
def update(self):
    if self.state.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(self)
Trainer._update = update
sys.exit(main(["train", "run.yaml"]))
"""


@pytest.mark.long
def test_a_run_that_receives_a_signal_to_end_is_saved_and_is_status_143(config, tmp_path):
    ended = subprocess.run([sys.executable, "-c", TERMINATED], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 143, ended.stderr
    assert "Traceback" not in ended.stderr
    assert [info.step for info in CheckpointStore(tmp_path / "adapters/run/checkpoints").list()][-1] == 2


def test_rewards_come_from_a_file(config, tmp_path, tiny_folder, capsys):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_prompts()))
    (tmp_path / "scores.py").write_text("def e_share(completion):\n    return completion.count('e') / 9\n")
    settings = ["method=grpo", "data=prompts.jsonl", "rewards=[e_share]", "group_size=2", "max_completion_length=4"]
    assert main(["train", config, *settings, "--rewards", "scores.py"]) == 0
    (tmp_path / "scores.py").write_text("1 / 0")
    assert main(["train", config, *settings, "--rewards", "scores.py"]) == 1
    assert "--rewards scores.py: ZeroDivisionError" in capsys.readouterr().err
    assert main(["train", config, *settings, "--rewards", "scorse.py"]) == 1
    missing = "--rewards scorse.py: no such file. Give a Python file that defines the functions."
    assert missing in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("output", ["full", "closed"])
@pytest.mark.parametrize("words", [["train", "run.yaml"], ["train", "run.yaml", "--json"]], ids=" ".join)
@pytest.mark.matrix(every=4)
def test_a_log_that_cannot_be_written_ends_no_training(words, output, config, tmp_path):
    command = [sys.executable, "-m", "mlx_nb", *words]
    with open("/dev/full", "w") as full:
        closed = {"preexec_fn": lambda: os.close(1)} if output == "closed" else {"stdout": full}
        ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, check=False, **closed)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr
    said = "mlx-nb: the output cannot be written (No space left on device); the command continues without it."
    assert ended.stderr.count(said) == (output == "full")
    assert CheckpointStore(tmp_path / "adapters/run/checkpoints").list()[-1].kind == "final"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--help"],
        ["settings"],
        ["settings", "--markdown"],
        ["doctor"],
        ["check", "rows.jsonl", "--rows"],
        ["check", "rows.jsonl", "--json"],
        ["check", "rows.jsonl"],
        ["train", "run.yaml", "--json"],
        ["train", "run.yaml"],
        ["check", "nothing.jsonl"],
    ],
    ids=" ".join,
)
@pytest.mark.matrix(every=11)
def test_a_command_whose_output_is_closed_ends_silently(words, config, tiny_folder):
    model = ["--model", str(tiny_folder)] if words[:1] == ["check"] else []
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "mlx_nb", *words, *model]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert "BrokenPipe" not in ended.stderr
    assert "Traceback" not in ended.stderr
    # argparse itself takes no notice of a help that nobody reads.
    status = {"": 2, "--help": 0, "check nothing.jsonl": 1}
    assert ended.returncode == status.get(" ".join(words), 141)


INTERRUPTED_IN_AN_IMPORT = """
import sys
class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("mlx_nb.") and name not in ("mlx_nb.cli", "mlx_nb.errors"):
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupts())
from mlx_nb.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("arguments", [["train", "run.yaml"], ["check", "rows.jsonl"], ["settings"], ["runs"]])
def test_an_interrupt_while_a_command_is_imported_is_one_line(config, arguments):
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED_IN_AN_IMPORT, *arguments], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "mlx-nb: interrupted\n")
