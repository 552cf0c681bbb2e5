"""Completions per second and peak memory of GRPO rollouts on SmolLM2-135M: mlx-lm-lora against mlx_nb, in one run.

    python benchmarks/rollout.py --peer-python PYTHON [--prompts 4] [--group-size 8] [--max-tokens 64] [--rounds 3]

PYTHON is one of an environment that has both mlx_nb and mlx-lm-lora (pip install --no-deps mlx-lm-lora==5.10.2).
Each round runs three processes in turn on the same prompts and settings, with the same BLAS and float32 base:

    peer, as it trains   mlx-lm-lora's `generate_grpo` as its trainer calls it: as many rows at once as prompts
    peer, all at once    the same function with all rows at once
    mlx_nb               `sample_groups`

A few tokens are drawn first, untimed. Lengths of completions are chance, so the rates of a round are those of its own
tokens; printed are medians of the rounds, and the ratios of tokens per second. mlx_nb's figures include the behavior
log-probabilities, which the peer's function does not return. JSON comes last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

EXAMPLE_ROWS = Path(__file__).parent.parent / "example_notebooks" / "home_requests"
VARIANTS = ("peer, as it trains", "peer, all at once", "mlx_nb")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has mlx-lm-lora and mlx_nb")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0, help="0 for all tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    print(json.dumps(measure(chosen) if chosen.child else report(chosen)))


def report(chosen: argparse.Namespace) -> dict:
    """Run the variants in processes of their own, in turn, and print the table. Returns the figures."""
    results: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
    for number in range(chosen.rounds):
        for place in range(len(VARIANTS)):
            variant = VARIANTS[(number + place) % len(VARIANTS)]
            results[variant].append(run_child(chosen, variant, chosen.seed + number))
    figures = {}
    for variant, rounds in results.items():
        figures[variant] = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
        figure = figures[variant]
        print(
            f"{variant:20} {figure['completions_per_second']:6.2f} completions/s {figure['tokens_per_second']:7.1f} "
            f"tokens/s  peak {figure['peak_gb']:.2f} GB  ({figure['tokens']:.0f} tokens in {figure['seconds']:.1f} s)",
            flush=True,
        )
    ours = results["mlx_nb"]
    ratios = {
        variant: statistics.median(
            own["tokens_per_second"] / other["tokens_per_second"]
            for own, other in zip(ours, results[variant], strict=True)
        )
        for variant in VARIANTS[:2]
    }
    for variant, ratio in ratios.items():
        print(f"mlx_nb draws {ratio:.2f} times the tokens per second of {variant}")
    return {"figures": figures, "ratios": ratios}


def run_child(chosen: argparse.Namespace, variant: str, seed: int) -> dict:
    python = sys.executable if variant == "mlx_nb" else chosen.peer_python
    command = [python, __file__, "--child", variant, "--seed", str(seed)]
    for name in ("model", "prompts", "group_size", "max_tokens", "temperature", "top_p", "top_k"):
        command += [f"--{name.replace('_', '-')}", str(getattr(chosen, name))]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def measure(chosen: argparse.Namespace) -> dict:
    """One variant in this process: a short rollout untimed, then the one that counts."""
    from mlx_nb.model.loading import load_model
    from mlx_nb.rollouts.generation import prompt_tokens

    loaded = load_model(chosen.model)
    import mlx.core as mx

    lines = (EXAMPLE_ROWS / "train.jsonl").read_text(encoding="utf-8").splitlines()[: chosen.prompts]
    questions = [json.loads(line)["messages"][0]["content"] for line in lines]
    prompts = [prompt_tokens(loaded.tokenizer, question) for question in questions]
    roll = roll_mlx_nb if chosen.child == "mlx_nb" else roll_peer
    roll(loaded, prompts, chosen, 4)
    mx.clear_cache()
    mx.reset_peak_memory()
    started = time.perf_counter()
    lengths = roll(loaded, prompts, chosen, chosen.max_tokens)
    seconds = time.perf_counter() - started
    assert len(lengths) == chosen.prompts * chosen.group_size
    return {
        "tokens": sum(lengths),
        "seconds": seconds,
        "completions_per_second": len(lengths) / seconds,
        "tokens_per_second": sum(lengths) / seconds,
        "peak_gb": mx.get_peak_memory() / 1e9,
    }


def roll_mlx_nb(loaded, prompts, chosen: argparse.Namespace, max_tokens: int) -> list[int]:
    """Lengths of the completions of `sample_groups`."""
    from mlx_nb.rollouts.sampling import SamplingSettings, sample_groups

    settings = SamplingSettings(max_tokens, chosen.temperature, chosen.top_p, chosen.top_k or None)
    steps = sample_groups(loaded.model, loaded.tokenizer, prompts, chosen.group_size, settings, chosen.seed)
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            return [len(completion.tokens) for completion in finished.value]


def roll_peer(loaded, prompts, chosen: argparse.Namespace, max_tokens: int) -> list[int]:
    """Lengths of the completions of mlx-lm-lora's `generate_grpo`."""
    import mlx.core as mx
    from mlx_lm_lora.trainer.grpo_trainer import generate_grpo

    mx.random.seed(chosen.seed)
    rows_at_once = len(prompts) * (chosen.group_size if chosen.child == "peer, all at once" else 1)
    completions, _, _ = generate_grpo(
        loaded.model,
        loaded.tokenizer,
        prompts,
        max_tokens=max_tokens,
        group_size=chosen.group_size,
        batch_size=rows_at_once,
        end_token="",
        temperature=chosen.temperature,
        top_p=chosen.top_p,
        top_k=chosen.top_k,
        min_p=0.0,
    )
    return [completion.size for completion in completions]


if __name__ == "__main__":
    main()
