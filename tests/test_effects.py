"""Every setting does something: changed in its context the run is another one; out of it, it is refused by name."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path

import pytest

from mlx_nb import Run, register_objective
from mlx_nb.config.methods import METHODS
from mlx_nb.config.run_config import SETTINGS, LoraParameters, LrSchedule, RunConfig
from mlx_nb.errors import MlxNbError
from mlx_nb.events import SampleGenerated
from tiny import save_tiny_model, tiny_labels, tiny_pairs, tiny_prompts, tiny_rows

TEXTS = [
    {"text": f"say {word} and again {word} and then say it once more {word}"} for word in ["red", "green", "blue"] * 4
]
SFT = {"data": tiny_rows(12), "iters": 3, "batch_size": 4, "learning_rate": 1e-2, "val_set_size": 2}
TEXT = {**SFT, "data": TEXTS}
PAIRS = {**SFT, "method": "dpo", "data": tiny_pairs(12)}
LABELS = {**SFT, "method": "kto", "data": tiny_labels(12)}
PROMPTS = {
    **SFT,
    "method": "grpo",
    "data": tiny_prompts(12),
    "rewards": ["shortness", "redness"],
    "iters": 2,
    "batch_size": 2,
    "max_completion_length": 6,
    "lora_parameters": {"rank": 4},
}
SPLIT = {
    **SFT,
    "val_set_size": 0.1,
    "data": {"train": tiny_rows(12), "valid": tiny_rows(4), "test": tiny_rows(6), "other": tiny_rows(3)},
}
MORE = {**PROMPTS, "updates_per_rollout": 2, "learning_rate": 0.3, "iters": 4}


def shortness(completion):
    return -float(len(completion))


def redness(completion):
    return float(completion.count("e"))


async def slowness(completions):
    await asyncio.sleep(0.2)
    return [1.0] * len(completions)


NAMESPACE = {"shortness": shortness, "redness": redness, "slowness": slowness}


def renamed(rows, **names):
    return [{names.get(key, key): value for key, value in row.items()} | {"spare": "say it"} for row in rows]


def with_system(rows, column):
    return [{**row, column: "speak up"} for row in rows]


# setting: (the settings around it, two values of which it is that the run differs by).
TABLE = {
    "method": ({**SFT, "data": tiny_pairs(12), "lr_schedule": "constant"}, ["orpo", "cpo"]),
    "loss": (SFT, [None, "dft"]),
    "beta": (PAIRS, [None, 2.0]),
    "label_smoothing": (SFT, [None, 0.3]),
    "z_loss": (SFT, [None, 0.3]),
    "delta": ({**PAIRS, "loss": "dpop"}, [None, 1.0]),
    "cpo_alpha": ({**PAIRS, "method": "cpo"}, [None, 0.2]),
    "simpo_gamma": ({**PAIRS, "method": "cpo", "loss": "simpo"}, [None, 3.0]),
    "desirable_weight": (LABELS, [None, 4.0]),
    "undesirable_weight": (LABELS, [None, 4.0]),
    "method_options": ({**SFT, "method": "louder"}, [{}, {"factor": 3.0}]),
    "reference_model": (PAIRS, [None, "OTHER_MODEL"]),
    "reference_adapter": ({**PAIRS, "resume_adapter_file": "ADAPTER"}, [None, "none"]),
    "reference_free": (PAIRS, [False, True]),
    "group_size": (PROMPTS, [2, 3]),
    "max_completion_length": (PROMPTS, [4, 6]),
    "temperature": (PROMPTS, [1.0, 0.3]),
    "top_p": (PROMPTS, [1.0, 0.3]),
    "top_k": (PROMPTS, [None, 2]),
    "stop": (PROMPTS, [None, ["e", "a"]]),
    "rewards": (PROMPTS, [["shortness", "redness"], ["redness", "shortness"]]),
    "reward_weights": (PROMPTS, [None, [1.0, 0.0]]),
    "reward_timeout": ({**PROMPTS, "rewards": ["slowness"]}, [60.0, 0.01]),
    "scale_rewards": (PROMPTS, [None, "none"]),
    "updates_per_rollout": (MORE, [1, 2]),
    "epsilon": (MORE, [None, 1e-4]),
    "epsilon_high": (MORE, [None, 1e-4]),
    "importance_sampling_level": (MORE, [None, "sequence"]),
    "mask_truncated_completions": (PROMPTS, [False, True]),
    "model": (SFT, ["MODEL", "OTHER_MODEL"]),
    "load_in_bits": (SFT, [None, 4]),
    "chat_template": (SFT, [None, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"]),
    "data": (SFT, [tiny_rows(12), tiny_rows(11)]),
    "train_split": (SPLIT, [None, "other"]),
    "valid_split": (SPLIT, [None, "other"]),
    "test_split": ({**SPLIT, "test": True}, [None, "other"]),
    "val_set_size": (SFT, [2, 3]),
    "chat_feature": (
        {**SFT, "data": [{**row, "more": row["messages"][:1] * 2 + row["messages"][1:]} for row in tiny_rows(12)]},
        [None, "more"],
    ),
    "prompt_feature": ({**LABELS, "data": renamed(tiny_labels(12))}, [None, "spare"]),
    "completion_feature": ({**LABELS, "data": renamed(tiny_labels(12))}, [None, "spare"]),
    "chosen_feature": ({**PAIRS, "data": renamed(tiny_pairs(12))}, [None, "spare"]),
    "rejected_feature": ({**PAIRS, "data": renamed(tiny_pairs(12))}, [None, "spare"]),
    "label_feature": (
        {**LABELS, "data": [{**row, "good": not row["label"]} for row in tiny_labels(12)]},
        [None, "good"],
    ),
    "answer_feature": (
        {**PROMPTS, "rewards": ["answered"], "data": [{**row, "right": "x"} for row in tiny_prompts(12)]},
        [None, "right"],
    ),
    "preference_score_feature": (
        {**PAIRS, "data": [{**row, "score": 0.1 + index} for index, row in enumerate(tiny_pairs(12))]},
        [None, "score"],
    ),
    "text_feature": ({**TEXT, "data": renamed(TEXTS)}, [None, "spare"]),
    "system_feature": ({**SFT, "data": with_system(tiny_rows(12), "mood")}, [None, "mood"]),
    "loss_on": (SFT, ["assistant", "all"]),
    "max_seq_length": (SFT, [2048, 12]),
    "truncate": ({**TEXT, "max_seq_length": 12}, ["right", "left"]),
    "stride": ({**TEXT, "max_seq_length": 12, "truncate": "split"}, [0, 3]),
    "fine_tune_type": (SFT, ["lora", "dora"]),
    "num_layers": (SFT, [-1, 1]),
    "lora_parameters.rank": (SFT, [8, 4]),
    "lora_parameters.scale": (SFT, [20.0, 2.0]),
    "lora_parameters.dropout": (SFT, [0.0, 0.5]),
    "lora_parameters.keys": (SFT, [None, ["q_proj"]]),
    "target_modules": (SFT, [None, ["q_proj"]]),
    "resume_adapter_file": (SFT, [None, "ADAPTER"]),
    "optimizer": (SFT, ["adamw", "lion"]),
    "optimizer_config": (SFT, [{}, {"betas": [0.5, 0.6]}]),
    "learning_rate": (SFT, [1e-2, 1e-3]),
    "lr_schedule.name": (SFT, ["cosine", "linear"]),
    "lr_schedule.arguments": ({**SFT, "learning_rate": None}, [[1e-2, 10], [1e-2, 2]]),
    "lr_schedule.warmup": (SFT, [None, 2]),
    "lr_schedule.warmup_init": ({**SFT, "lr_schedule": {"warmup": 2}}, [0.0, 5e-3]),
    "warmup": (SFT, [None, 2]),
    "weight_decay": (SFT, [0.01, 0.5]),
    "grad_clip": (SFT, [1.0, 1e-3]),
    "loss_spike": ({**SFT, "iters": 60, "learning_rate": 0.5, "loss_spike": None, "steps_per_eval": -1}, [None, 1e-3]),
    "spike_patience": (
        {**SFT, "iters": 60, "learning_rate": 0.5, "loss_spike": 1e-3, "steps_per_eval": -1},
        [8, 1],
    ),
    "iters": (SFT, [3, 2]),
    "epochs": ({**SFT, "iters": None}, [None, 2]),
    "batch_size": (SFT, [4, 2]),
    "grad_accumulation_steps": (SFT, [1, 2]),
    "seed": (SFT, [0, 1]),
    "steps_per_eval": (SFT, [None, 2]),
    "val_batches": ({**SFT, "val_set_size": 6, "batch_size": 2}, [25, 1]),
    "early_stopping_patience": ({**SFT, "iters": 8, "steps_per_eval": 1, "learning_rate": 2.0}, [None, 1]),
    "test": (SPLIT, [False, True]),
    "test_batches": ({**SPLIT, "test": True}, [-1, 1]),
    "sample_prompts": (SFT, [None, ["say red"]]),
    "sample_every": ({**SFT, "sample_prompts": ["say red"], "steps_per_eval": -1}, [None, 1]),
    "sample_tokens": ({**SFT, "sample_prompts": ["say red"]}, [2, 5]),
    "save_every": (SFT, [100, 1]),
    "autosave_minutes": (SFT, [10.0, 1e-9]),
    "keep": ({**SFT, "save_every": 1, "iters": 4}, [3, 1]),
    "snapshot_memory": ({**SFT, "steps_per_eval": -1}, [512, 0]),
    "adapter_path": (SFT, ["run", "elsewhere"]),
    "roles": (
        {
            **SFT,
            "data": [
                {"messages": [{**turn, "role": turn["role"][:4]} for turn in row["messages"]]} for row in tiny_rows(12)
            ],
        },
        [{"user": "user", "assi": "assistant"}, {"user": "assistant", "assi": "user"}],
    ),
    "prompt_format": ({**SFT, "data": [{"prompt": "say it", "completion": "red"}] * 12}, [None, "raw"]),
    "special_tokens_in_text": (
        {
            **SFT,
            "data": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b<|end|>c"}]}]
            * 12,
        },
        ["keep", "text"],
    ),
}
# Settings whose effect needs a hub dataset; out of it they are refused below.
ELSEWHERE = ("subset",)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Words of the table that stand for folders."""
    folder = tmp_path_factory.mktemp("effects")
    for name in ("model", "other"):
        (folder / name).mkdir()
        save_tiny_model(folder / name)
    config = json.loads((folder / "other" / "config.json").read_text())
    (folder / "other" / "config.json").write_text(json.dumps({**config, "rope_theta": 7.0}))
    start = Run(RunConfig(**{**SFT, "model": folder / "model", "adapter_path": folder / "adapter"}))
    start.run()
    return {"MODEL": folder / "model", "OTHER_MODEL": folder / "other", "ADAPTER": folder / "adapter"}


@pytest.fixture
def louder():
    @register_objective("louder")
    def louder(tokens, *, factor=1.0):
        return -factor * tokens.logprob_S

    yield
    del METHODS["louder"]


def settings_with(around, name, value, places):
    outer, _, inner = name.partition(".")
    settings = {"model": "MODEL", **around}
    settings = {key: value for key, value in settings.items() if value is not None or key != "learning_rate"}
    settings[outer] = {**settings.get(outer, {}), inner: value} if inner else value
    return {key: places.get(value, value) if isinstance(value, str) else value for key, value in settings.items()}


def outcome(settings, folder, monkeypatch):
    """All that a person could tell two runs apart by: rows, events, weights, files; or how it was refused."""
    monkeypatch.chdir(folder)
    answered = {"answered": lambda completion, answer: float(len(completion) * (len(answer or "") - 2))}
    run = Run(RunConfig.from_dict(settings), namespace=NAMESPACE | answered)
    try:
        run.run()
    except MlxNbError as error:
        return type(error).__name__, str(error)
    events = [
        {key: value for key, value in json.loads(event.to_json()).items() if key not in _TIMES}
        for event in run.history.events
    ]
    rows = [
        (list(example.tokens), list(example.loss_mask))
        for example in run.trainer.examples.train
        if hasattr(example, "loss_mask")
    ]
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    reached = reaches(run, 1) if "snapshot_memory" in settings else None
    return json.dumps(events, default=str), str(rows), files, run.adapter_bytes(), reached


def reaches(run, step):
    """Whether a run can go back to that update."""
    try:
        run.rewind(to=step)
    except MlxNbError:
        return False
    return True


_TIMES = (
    "seconds",
    "tokens_per_second",
    "peak_memory",
    "memory",
    "eta",
    "time",
    "at",
    "peak_bytes",
    "path",
    "reward_seconds",
)


def test_the_table_has_every_setting():
    inner = [f"{outer}.{one.name}" for outer, group in _GROUPS.items() for one in dataclasses.fields(group)]
    names = [*(name for name in SETTINGS if name not in _GROUPS), *inner]
    assert sorted(names) == sorted([*TABLE, *ELSEWHERE])


_GROUPS = {"lora_parameters": LoraParameters, "lr_schedule": LrSchedule}


@pytest.mark.usefixtures("louder")
@pytest.mark.parametrize("name", TABLE)
def test_a_setting_changes_the_run_in_its_context(name, tmp_path, monkeypatch, places):
    around, values = TABLE[name]
    outcomes = []
    for index, value in enumerate(values):
        folder = tmp_path / str(index)
        folder.mkdir()
        outcomes.append(outcome(settings_with(around, name, value, places), folder, monkeypatch))
    assert outcomes[0] != outcomes[1]


@pytest.mark.parametrize(
    "name", ["seed", "rewards", "save_every", "epsilon", "beta", "label_feature", "test", "stride"]
)
def test_the_same_settings_give_the_same_outcome(name, tmp_path, monkeypatch, places):
    around, values = TABLE[name]
    outcomes = []
    for index in range(2):
        folder = tmp_path / str(index)
        folder.mkdir()
        outcomes.append(outcome(settings_with(around, name, values[0], places), folder, monkeypatch))
    assert outcomes[0] == outcomes[1]


NONE = {**SFT, "val_set_size": 0}
# (settings, the setting that has no effect with them)
INEFFECTIVE = [
    *(
        (SFT, name, value)
        for name, value in {
            "beta": 0.2,
            "delta": 1.0,
            "cpo_alpha": 0.2,
            "simpo_gamma": 1.0,
            "desirable_weight": 2.0,
            "undesirable_weight": 2.0,
            "reference_model": "x",
            "reference_adapter": "x",
            "reference_free": True,
            "group_size": 3,
            "max_completion_length": 6,
            "temperature": 0.5,
            "top_p": 0.5,
            "top_k": 3,
            "stop": ["a"],
            "rewards": ["a"],
            "reward_weights": [1.0],
            "reward_timeout": 3.0,
            "scale_rewards": "none",
            "updates_per_rollout": 2,
            "epsilon": 0.1,
            "epsilon_high": 0.1,
            "importance_sampling_level": "sequence",
            "mask_truncated_completions": True,
            "chosen_feature": "x",
            "rejected_feature": "x",
            "label_feature": "x",
            "answer_feature": "x",
            "preference_score_feature": "x",
            "subset": "x",
            "train_split": "x",
            "valid_split": "x",
            "test_split": "x",
            "stride": 3,
            "sample_every": 2,
            "sample_tokens": 9,
            "test_batches": 3,
        }.items()
    ),
    (PAIRS, "text_feature", "x"),
    (PAIRS, "chat_feature", "x"),
    (PAIRS, "loss_on", "all"),
    (PAIRS, "truncate", "split"),
    (PROMPTS, "loss_on", "final"),
    ({**PROMPTS, "beta": 0}, "reference_model", "x"),
    (PROMPTS, "epsilon", 0.1),
    (PROMPTS, "epsilon_high", 0.1),
    ({**SFT, "loss": "dft"}, "label_smoothing", 0.1),
    ({**SFT, "fine_tune_type": "full"}, "lora_parameters", {"rank": 4}),
    ({**SFT, "fine_tune_type": "full"}, "target_modules", ["q_proj"]),
    ({**SFT, "optimizer": "adam"}, "weight_decay", 0.01),
    ({**SFT, "lr_schedule": {"name": "cosine", "arguments": [1e-3, 9]}}, "learning_rate", 1e-4),
    ({**SFT, "warmup": 0}, "lr_schedule", {"warmup_init": 1e-5}),
    ({**SFT, "warmup": 1}, "lr_schedule", {"warmup_init": 1e-5}),
    (SFT, "lr_schedule", {"warmup_init": 1e-5}),
    ({**SFT, "loss_spike": None}, "spike_patience", 3),
    (NONE, "steps_per_eval", 2),
    (NONE, "early_stopping_patience", 2),
    ({**SFT, "steps_per_eval": -1}, "early_stopping_patience", 2),
    (NONE, "test", True),
    (SPLIT, "val_set_size", 3),
]


@pytest.mark.parametrize(("around", "name", "value"), INEFFECTIVE)
def test_a_setting_without_effect_is_refused_by_name_before_a_model_is_loaded(
    around, name, value, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    settings = {"model": "no/such/model", **around, name: value}
    with pytest.raises(MlxNbError) as caught:
        Run(RunConfig.from_dict(settings), namespace=NAMESPACE).run()
    assert "\n" not in str(caught.value)
    assert f"`{name}" in str(caught.value)
    assert not list(Path().iterdir())


def test_settings_about_validation_without_rows_for_it_are_refused_all_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run(RunConfig.from_dict({**NONE, "steps_per_eval": 2, "early_stopping_patience": 2, "test": True}))
    with pytest.raises(MlxNbError) as caught:
        run.run()
    lines = str(caught.value).splitlines()
    assert [line.split("`")[1] for line in lines] == ["steps_per_eval", "early_stopping_patience", "test: true"]


def test_turns_are_not_asked_of_plain_text(tmp_path, monkeypatch, places):
    monkeypatch.chdir(tmp_path)
    settings = {**TEXT, "model": places["MODEL"]}
    for loss_on in ("final", "completion"):
        with pytest.raises(MlxNbError, match=f"`loss_on: {loss_on}` has no effect: every row is plain text"):
            Run(RunConfig.from_dict({**settings, "loss_on": loss_on})).run()
    mixed = {**settings, "data": [*TEXTS, *tiny_rows(2)], "loss_on": "final"}
    assert Run(RunConfig.from_dict(mixed)).run().step == 3


def test_without_validation_samples_come_at_the_start_and_the_end(tmp_path, monkeypatch, places):
    monkeypatch.chdir(tmp_path)
    run = Run(RunConfig.from_dict({**SFT, "model": places["MODEL"], "sample_prompts": ["a"], "steps_per_eval": -1}))
    run.run()
    assert [event.step for event in run.history.events if isinstance(event, SampleGenerated)] == [0, 3]


def test_an_unknown_reward_is_named_before_a_model_is_loaded():
    text = "method: grpo\nmodel: no/such/model\ndata: rows\nrewards: [shortnes]\n"
    with pytest.raises(MlxNbError, match="reward 'shortnes' is neither a function of yours nor built in"):
        Run.from_yaml(text, namespace=NAMESPACE)
