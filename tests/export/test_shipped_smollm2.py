"""The real SmolLM2, fine-tuned, answers in llama.cpp and in mlx-lm as it does in the run that trained it."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_nb import Run, RunConfig
from mlx_nb.export import gguf as gguf_module
from mlx_nb.export.llama_cpp import run_llama_cpp
from mlx_nb.run.model_exports import inputs_of_run

pytestmark = [pytest.mark.real_model, pytest.mark.xdist_group("shipped_smollm2")]
MOST = 16  # tokens of an answer
SUBJECTS = (
    *("cat", "dog", "cow", "hen", "pig", "duck", "goat", "owl", "bee", "fox"),
    *("wolf", "bear", "crow", "frog", "hare", "lion", "mouse", "seal", "swan", "toad"),
)
QUESTIONS = [f"What does a {subject} say?" for subject in SUBJECTS]


@pytest.fixture(scope="module")
def pirate(tmp_path_factory):
    """A run that has learned to answer like a pirate."""
    rows = [{"prompt": ask, "completion": f"Arr, the {one} says nothing!"} for ask, one in zip(QUESTIONS, SUBJECTS)]
    values = {"model": "smollm2-135m", "data": {"train": rows, "valid": rows[::4]}, "iters": 20, "batch_size": 4}
    values |= {"learning_rate": 1e-3, "steps_per_eval": -1, "save_every": -1}
    run = Run(RunConfig.from_dict({**values, "adapter_path": str(tmp_path_factory.mktemp("pirate") / "run")}))
    run.run()
    return run


@pytest.fixture(scope="module")
def answers(pirate):
    """Its greedy answers to 20 questions."""
    return pirate.generate(QUESTIONS, max_tokens=MOST)


@pytest.mark.parametrize("kind", ["f16", "q8_0", "adapter"])
def test_llama_cpp_gives_the_same_greedy_answers(kind, pirate, answers, tmp_path, real_llama_cpp):
    if kind == "adapter":
        base = tmp_path / "base.gguf"
        gguf_module._write_base(inputs_of_run(pirate), base)
        written = pirate.gguf(tmp_path / "out", adapter=True, base=base)
        job = {"model": str(base), "adapter": str(written.path)}
    else:
        written = pirate.gguf(tmp_path / "out", type=kind)
        job = {"model": str(written.path)}
    fast, ends = pirate.tokenizer._tokenizer, set(pirate.tokenizer.eos_token_ids)
    prompts = [
        fast.apply_chat_template([{"role": "user", "content": one}], add_generation_prompt=True, return_dict=False)
        for one in QUESTIONS
    ]
    found = run_llama_cpp({**job, "prompts": prompts, "most": MOST})
    texts = [
        fast.decode([token for token in found[f"answer-{number}"].tolist() if token not in ends])
        for number in range(len(prompts))
    ]
    flips = [(mlx, llama) for mlx, llama in zip(answers, texts) if mlx != llama]
    print(f"{kind}: {written.checked}; {len(prompts) - len(flips)} of {len(prompts)} answers are the same; {flips}")
    assert len(flips) <= 1
    assert len(set(answers)) > 10


def test_a_fused_model_is_as_good_as_predicted_and_answers_alike_in_mlx_lm(pirate, answers, tmp_path):
    from mlx_lm import load
    from mlx_lm.generate import generate

    report = pirate.fuse(tmp_path / "fused", precision="16-bit")
    print(report)
    base, half = report.candidate("base"), report.candidate("16-bit")
    assert base.lost > half.lost
    assert half.predicted == pytest.approx(report.measured, rel=0.1, abs=0.01)
    assert report.measured == pytest.approx(report.measured_adapter, rel=0.1, abs=0.01)
    model, tokenizer = load(str(tmp_path / "fused"))
    reported = []
    for question in QUESTIONS[:3]:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        reported.append(generate(model, tokenizer, prompt, max_tokens=MOST))
    assert reported == answers[:3]


def test_a_base_of_4_bits_would_lose_what_the_report_says(pirate, tmp_path):
    report = pirate.fuse(tmp_path / "fused", precision="base")
    print(report)
    chosen = report.candidate("base")
    assert chosen.predicted == pytest.approx(report.measured, rel=0.1)
    assert report.measured > report.measured_adapter
    assert np.mean(list(chosen.layers.values())) > 0.3
    assert report.recommended != "base"
