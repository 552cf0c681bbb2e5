"""Lanes on a CPU: LoRA updates of SmolLM2-135M with a batch in one part and in one part a core, in one run.

    python benchmarks/lanes.py [--rows 4] [--widths 8 16 32 64 128 256] [--rounds 5] [--model smollm2-135m]

For each width a batch of random rows of that many tokens, all trained, goes through the same update both ways in turn.
Printed are the median seconds, the median ratio and the peak memory of each; JSON comes last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="smollm2-135m")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(report(chosen, folder)))


def report(chosen: argparse.Namespace, folder: str) -> dict:
    from mlx_nb import Run, RunConfig

    settings = {"model": chosen.model, "data": [{"text": "A row."}] * 2, "val_set_size": 0, "iters": 1}
    run = Run(RunConfig.from_dict({**settings, "adapter_path": folder}))
    import mlx.core as mx

    from mlx_nb.model.lanes import lane_count

    lanes = {"one": 1, "each": lane_count()}
    found = {}
    for width in chosen.widths:
        seconds: dict[str, list[float]] = {name: [] for name in lanes}
        peaks = {}
        for turn in range(chosen.rounds + 1):
            batch = random_batch(run.trainer.next_batches()[0], chosen.rows, width)
            for name, count in lanes.items():
                mx.clear_cache()
                mx.reset_peak_memory()
                took = timed_update(run.trainer.stepper, batch, count)
                peaks[name] = mx.get_peak_memory() / 1e9
                if turn:
                    seconds[name].append(took)
        ratio = statistics.median(a / b for a, b in zip(seconds["one"], seconds["each"], strict=True))
        found[width] = {"ratio": ratio, "seconds": {n: statistics.median(s) for n, s in seconds.items()}, "gb": peaks}
        print(
            f"{chosen.rows} rows of {width:4}: one part {found[width]['seconds']['one']:.3f} s, {peaks['one']:.2f} GB; "
            f"{lanes['each']} lanes {found[width]['seconds']['each']:.3f} s, {peaks['each']:.2f} GB; ratio {ratio:.2f}"
        )
    return found


def random_batch(like, rows: int, width: int):
    """A batch of random tokens, of the kind of `like`."""
    tokens_BT = np.random.default_rng(width).integers(0, 40000, (rows, width)).astype(np.int32)
    loss_mask_BT = np.ones((rows, width), np.float32)
    loss_mask_BT[:, 0] = 0
    return like._replace(
        tokens_BT=tokens_BT, loss_mask_BT=loss_mask_BT, rows=tuple(range(rows)), lengths=(width,) * rows
    )


def timed_update(stepper, batch, lanes: int) -> float:
    stepper.lanes = lanes
    started = time.perf_counter()
    stepper.update([batch], learning_rate=0.0, grad_clip=1.0, seed=0, rows=(), judge=lambda loss, norm: None)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
