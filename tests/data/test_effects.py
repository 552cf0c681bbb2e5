"""Every setting does something: changed in its context the run is another one; out of it, it is refused by name."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path

import pytest

from effect_table import ELSEWHERE, PAIRS, PROMPTS, SFT, SPLIT, TABLE, TEXT, TEXTS
from mlx_nb import Run, register_objective
from mlx_nb.config.methods import METHODS
from mlx_nb.config.run_config import SETTINGS, RunConfig
from mlx_nb.config.settings import LoraParameters, LrSchedule
from mlx_nb.errors import MlxNbError
from mlx_nb.events import SampleGenerated
from tiny import save_tiny_model, tiny_rows


def shortness(completion):
    return -float(len(completion))


def redness(completion):
    return float(completion.count("e"))


async def slowness(completions):
    await asyncio.sleep(0.2)
    return [1.0] * len(completions)


NAMESPACE = {"shortness": shortness, "redness": redness, "slowness": slowness}


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
    for _ in range(2 if "keep_previous" in settings else 0):
        Run(RunConfig.from_dict(settings)).run()
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


@pytest.fixture(scope="module")
def known():
    """Outcomes of runs before a setting is changed, by all their settings: many are changed in the same context."""
    return {}


@pytest.mark.usefixtures("louder")
@pytest.mark.parametrize("name", TABLE)
@pytest.mark.matrix(every=11)
def test_a_setting_changes_the_run_in_its_context(name, tmp_path, monkeypatch, places, known):
    around, (value, other) = TABLE[name]
    before, after = (settings_with(around, name, one, places) for one in (value, other))
    key = (json.dumps(RunConfig.from_dict(before).to_dict(), default=str), "snapshot_memory" in before)
    for folder in ("before", "after"):
        (tmp_path / folder).mkdir()
    if key not in known:
        known[key] = outcome(before, tmp_path / "before", monkeypatch)
    assert known[key] != outcome(after, tmp_path / "after", monkeypatch)


@pytest.mark.parametrize(
    "name", ["seed", "rewards", "save_every", "epsilon", "beta", "label_feature", "test", "stride"]
)
@pytest.mark.matrix(every=8)
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


@pytest.mark.long
def test_without_validation_samples_come_at_the_start_and_the_end(tmp_path, monkeypatch, places):
    monkeypatch.chdir(tmp_path)
    run = Run(RunConfig.from_dict({**SFT, "model": places["MODEL"], "sample_prompts": ["a"], "steps_per_eval": -1}))
    run.run()
    assert [event.step for event in run.history.events if isinstance(event, SampleGenerated)] == [0, 3]


def test_an_unknown_reward_is_named_before_a_model_is_loaded():
    text = "method: grpo\nmodel: no/such/model\ndata: rows\nrewards: [shortnes]\n"
    with pytest.raises(MlxNbError, match="reward 'shortnes' is neither a function of yours nor built in"):
        Run.from_yaml(text, namespace=NAMESPACE)
