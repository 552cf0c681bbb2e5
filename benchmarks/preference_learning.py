"""What DPO, CPO and ORPO learn from a few hundred pairs: accuracy and margin on pairs that are held out.

    python benchmarks/preference_learning.py FOLDER [--pairs 200] [--held-out 60] [--figure curves.png]

FOLDER has train.jsonl and valid.jsonl with rows {prompt, chosen, rejected}. The same pairs and updates for each method.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from mlx_nb import Run, RunConfig
from mlx_nb.events import EvaluationCompleted

METHODS = {
    "dpo": {"learning_rate": 1e-4},
    "cpo": {"learning_rate": 1e-4},
    "orpo": {"learning_rate": 1e-3, "beta": 1.0},
}


def read(path: Path, count: int) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()[:count]]


def measure(method: str, folder: Path, pairs: int, held_out: int) -> list[EvaluationCompleted]:
    with tempfile.TemporaryDirectory() as work:
        data = Path(work) / "data"
        data.mkdir()
        for split, count in (("train", pairs), ("valid", held_out)):
            lines = [json.dumps(row) for row in read(folder / f"{split}.jsonl", count)]
            (data / f"{split}.jsonl").write_text("\n".join(lines))
        settings = {
            "method": method,
            "data": str(data),
            "adapter_path": f"{work}/adapter",
            "epochs": 1,
            "batch_size": 2,
            "grad_accumulation_steps": 2,
            "lora_parameters": {"rank": 16, "scale": 2.0},
            "max_seq_length": 512,
            "val_batches": -1,
            "steps_per_eval": pairs // 8,
            "save_every": -1,
            "loss_spike": None,
            **METHODS[method],
        }
        run = Run(RunConfig.from_dict(settings))
        found = []
        for event in run.events():
            if isinstance(event, EvaluationCompleted):
                found.append(event)
                shown = {name: round(value, 3) for name, value in event.metrics.items()}
                print(method, event.step, round(event.loss, 4), shown, flush=True)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--held-out", type=int, default=60)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--figure", type=Path)
    chosen = parser.parse_args()
    curves = {}
    for method in chosen.methods:
        started = time.perf_counter()
        curves[method] = measure(method, chosen.folder, chosen.pairs, chosen.held_out)
        print(f"{method}: {time.perf_counter() - started:.0f} s", flush=True)
    if chosen.figure:
        draw(curves, chosen.figure)


def draw(curves: dict[str, list[EvaluationCompleted]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, 2), ("accuracy", "margin")):
        for (method, found), (color, marker) in zip(
            curves.items(), (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"))
        ):
            first = found[0].metrics[name] if name == "margin" else 0.0
            steps = [event.step for event in found]
            axes.plot(steps, [event.metrics[name] - first for event in found], color=color, marker=marker, label=method)
        axes.set_xlabel("update")
        axes.set_title("held-out pair accuracy" if name == "accuracy" else "held-out margin, change from the start")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
