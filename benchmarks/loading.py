"""From starting a run in the background to its first update: time, rows a second, and how long others wait.

    python benchmarks/loading.py [--rows 20000] [--model smollm2-135m] [--data FILE.jsonl]

Without `--data` it makes chat rows of its own. Rows of a file are repeated up to `--rows`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from mlx_nb import Run, RunConfig
from mlx_nb.events import Event, Progress, StepCompleted


def made_rows(count: int) -> list[dict[str, Any]]:
    """Chat rows with a question of some ten words and an answer of some forty."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"How many apples are left of {number} when {number % 7} are eaten?"},
                {
                    "role": "assistant",
                    "content": f"There were {number} apples. " * 8 + f"{number - number % 7} are left.",
                },
            ]
        }
        for number in range(count)
    ]


def repeated(path: Path, count: int) -> list[dict[str, Any]]:
    """The rows of a file, over and over, each with a number so that they differ."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [{**row, "number": number} for number, row in enumerate(itertools.islice(itertools.cycle(rows), count))]


async def measure(run: Run) -> None:
    """Print what one start costs."""
    begun, last, waits, signs = time.perf_counter(), time.perf_counter(), [0.0], list[str]()
    tokenized = first = None

    def heard(event: Event) -> None:
        nonlocal tokenized, first
        if isinstance(event, Progress) and event.what == "tokenizing train":
            tokenized = time.perf_counter()
            signs.append(f"{event.what}: {event.done:,} of {event.total:,}")
        elif isinstance(event, StepCompleted) and first is None:
            first = time.perf_counter()

    run.listen(heard)
    run.start(1)
    while run.background.active:
        begun_to_tokenize = bool(signs)  # the model is loaded before
        await asyncio.sleep(0)
        now = time.perf_counter()
        if first is None and begun_to_tokenize and (tokenized or now) >= last:
            waits.append(now - last)
        last = now
    await run
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"signs of progress: {len(signs)}, the last: {signs[-1] if signs else 'none'}")
    print(f"tokenized after {(tokenized or begun) - begun:.1f} s, first update after {(first or begun) - begun:.1f} s")
    print(f"longest wait of another task while tokenizing: {max(waits):.2f} s")
    print(f"most memory: {peak:,.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, help="a JSONL file of real rows")
    chosen = parser.parse_args()
    rows = repeated(chosen.data, chosen.rows) if chosen.data else made_rows(chosen.rows)
    with tempfile.TemporaryDirectory() as folder:
        for what in ("for the first time", "again, the same rows"):
            settings = {"model": chosen.model, "iters": 1, "batch_size": 1, "val_set_size": 0, "max_seq_length": 512}
            config = RunConfig.from_dict({**settings, "data": "rows", "adapter_path": f"{folder}/{what[:5]}"})
            print(f"\n{len(rows):,} rows, {what}:")
            asyncio.run(measure(Run(config, namespace={"rows": rows})))


if __name__ == "__main__":
    main()
