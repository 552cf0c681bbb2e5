"""What the background and its panel cost: the same updates in a blocking cell and in the background, in one run.

    python benchmarks/panel_cost.py [--rounds 6] [--updates 5] [--model smollm2-135m | FOLDER]

A real ipykernel holds two runs of the same settings. They take turns, so many updates each: one by `run.run()`, the
other by `run.start()` with an open panel that is redrawn as for a person who looks. Medians of the rounds, JSON last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

EXAMPLE_ROWS = Path(__file__).parent.parent / "example_notebooks" / "home_requests"
SETUP = """
%load_ext mlx_nb
import statistics, time
from mlx_nb import Run, RunConfig
def new(name):
    return Run(RunConfig.from_dict({{"model": {model!r}, "data": {data!r}, "batch_size": 4, "iters": 100000,
        "learning_rate": 1e-5, "steps_per_eval": -1, "save_every": -1, "autosave_minutes": None, "loss_spike": None,
        "adapter_path": {folder!r} + "/" + name}}), name=name)
straight, panelled = new("straight"), new("panelled")
panel = panelled.panel()
panel._on_message(None, {{"do": "open"}}, None)  # as a browser says that shows it
_ = straight.step(3); _ = panelled.step(3)
blocking, background = [], []
"""
TURN = """
for turn in range(2):
    started = time.perf_counter()
    if turn == {first}:
        _ = straight.run(until=straight.step_count + {updates})
        blocking.append((time.perf_counter() - started) / {updates})
    else:
        panelled.start({updates})
        _ = await panelled
        background.append((time.perf_counter() - started) / {updates})
"""
RESULT = """
ratio = statistics.median(b / a for a, b in zip(blocking, background))
extra = statistics.median(b - a for a, b in zip(blocking, background))
same = straight.history["loss"] == panelled.history["loss"]
print(f"{statistics.median(blocking)} {statistics.median(background)} {ratio} {extra} {same}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--updates", type=int, default=5, help="in one turn")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default=str(EXAMPLE_ROWS))
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(report(chosen, folder)))


def report(chosen: argparse.Namespace, folder: str) -> dict:
    """Take turns in a kernel. Returns seconds an update, their ratio, and whether the losses are the same."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    try:
        execute(client, SETUP.format(model=chosen.model, data=chosen.data, folder=folder))
        for round_number in range(chosen.rounds):
            execute(client, TURN.format(first=round_number % 2, updates=chosen.updates))
        text = execute(client, RESULT)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    blocking, background, ratio, extra, same = text.split()
    return {
        "blocking_seconds": round(float(blocking), 5),
        "background_seconds": round(float(background), 5),
        "background_over_blocking": round(float(ratio), 4),
        "extra_milliseconds": round(1000 * float(extra), 3),
        "same_losses": same == "True",
    }


def execute(client, code: str) -> str:
    """Run a cell and return what it printed. Raises RuntimeError with the cell's error."""
    printed: list[str] = []

    def heard(message: dict) -> None:
        if message["msg_type"] == "stream":
            printed.append(message["content"]["text"])

    reply = client.execute_interactive(code, output_hook=heard, timeout=600)
    if reply["content"]["status"] != "ok":
        raise RuntimeError("\n".join(reply["content"].get("traceback", [])))
    return "".join(printed).strip()


if __name__ == "__main__":
    main()
