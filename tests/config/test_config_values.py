"""Values are checked and made plain when they are configured: what is kept can be written into a checkpoint."""

from __future__ import annotations

import inspect
import json
import time
import typing
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from mlx_nb import Run
from mlx_nb.config.fields import typo_of
from mlx_nb.config.optimizers import OPTIMIZERS
from mlx_nb.config.run_config import SETTINGS, RunConfig
from mlx_nb.errors import CheckpointError, ConfigError
from mlx_nb.train.optimizer import build_optimizer
from tiny import tiny_rows

# What a person may give, and what is kept of it.
PLAIN = [
    ({"iters": np.int64(3)}, 3),
    ({"iters": np.array(3)}, 3),
    ({"iters": 3.0}, 3),
    ({"learning_rate": np.float32(0.5)}, 0.5),
    ({"learning_rate": Fraction(1, 4)}, 0.25),
    ({"test": np.bool_(True)}, True),
    ({"load_in_bits": np.int32(4)}, 4),
    ({"model": Path("a/b")}, "a/b"),
    ({"model": np.str_("a")}, "a"),
    ({"target_modules": np.array(["q_proj"])}, None),
    ({"data": Path("t.jsonl")}, "t.jsonl"),
    ({"data": [Path("t.jsonl"), "u.jsonl"]}, ["t.jsonl", "u.jsonl"]),
    ({"data": [{"path": Path("t.jsonl"), "weight": np.float64(2)}]}, [{"path": "t.jsonl", "weight": 2.0}]),
    ({"optimizer_config": {"betas": np.array([0.5, 0.75])}}, {"betas": [0.5, 0.75]}),
    ({"optimizer_config": {"eps": np.float32(0.5)}}, {"eps": 0.5}),
    ({"method_options": {}}, {}),
]


@pytest.mark.parametrize(("given", "kept"), PLAIN)
def test_numbers_of_other_libraries_and_paths_become_plain_values(given, kept):
    config = RunConfig.from_dict(given)
    described = config.described()
    assert described[next(iter(given))] == kept
    assert type(described[next(iter(given))]) is type(kept)
    assert json.loads(json.dumps(described)) == described


def _endless():
    inner: list = []
    inner.append(inner)
    return inner


REFUSED = [
    ({"iters": 10**5000}, "`iters` must be at most 2147483647, not a huge int."),
    ({"iters": 2**31}, "`iters` must be at most 2147483647, not 2147483648."),
    ({"lora_parameters": {"rank": 2**40}}, "`lora_parameters.rank` must be at most 2147483647"),
    ({"learning_rate": 10**400}, "`learning_rate` cannot be"),
    ({"learning_rate": 1e300}, "`learning_rate` cannot be 1e+300. It takes a finite number."),
    ({"model": "a\0b"}, "`model` cannot be 'a\\x00b'. It takes text"),
    ({"model": "\ud800"}, "`model` cannot be '\\ud800'. It takes text"),
    ({"model": 123}, "`model` cannot be 123. It takes text. Put it in quotes: '123'."),
    ({"model": b"a"}, "`model` cannot be b'a'."),
    ({"data": 3}, "`data` cannot be 3. It takes a name, or rows."),
    ({"optimizer_config": {"eps": object()}}, "`optimizer_config.eps` cannot be <object object"),
    ({"optimizer_config": {1: 2}}, "`optimizer_config` has the key 1. Keys are text."),
    ({"optimizer_config": {"betas": _endless()}}, "`optimizer_config` is nested more than 32 levels deep."),
    ({"method_options": {"x": float("nan")}}, "`method_options.x` cannot be nan."),
    ({"method": "grpo", "rewards": [3]}, "`rewards` cannot hold 3."),
    ({"method": "grpo", "rewards": ["a"], "reward_weights": [0]}, "`reward_weights` are all 0"),
    ({1: 2}, "the name of a setting is text, not 1."),
    ({"stop": {"a": 1}}, "`stop` cannot be {'a': 1}."),
]


@pytest.mark.parametrize(("given", "words"), REFUSED)
def test_what_cannot_be_kept_is_refused_when_it_is_configured(given, words):
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict(given)
    lines = str(caught.value).splitlines()
    assert words in lines[0]
    assert all(len(line) < 300 for line in lines)


@pytest.mark.long
def test_a_run_with_values_of_numpy_and_paths_writes_its_checkpoints(tmp_path, tiny_folder):
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, tiny_rows(8))))
    run = Run(
        RunConfig(
            model=tiny_folder,
            data=[{"path": tmp_path / "t.jsonl", "weight": np.float32(1)}],
            optimizer_config={"betas": np.array([0.9, 0.99])},
            iters=np.int64(2),
            save_every=1,
            val_set_size=0,
            adapter_path=tmp_path / "out",
        )
    )
    assert run.run().step == 2
    assert Run.resume(tmp_path / "out", step=1).run().step == 2


# Optimizers


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_table_of_optimizer_arguments_is_that_of_mlx(name):
    taken = dict(inspect.signature(type(OPTIMIZERS[name].made({"learning_rate": 1e-3})).__init__).parameters)
    for ours in ("self", "learning_rate", "weight_decay"):
        taken.pop(ours, None)
    assert list(OPTIMIZERS[name].arguments) == list(taken)
    for argument, parameter in taken.items():
        if argument not in ("relative_step", "warmup_init"):
            default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
            assert OPTIMIZERS[name].arguments[argument].fits(default), argument


OTHER = {
    "betas": [0.5, 0.75],
    "momentum": 0.5,
    "nesterov": False,
    "bias_correction": False,
    "clip_threshold": 0.5,
    "decay_rate": -0.5,
    "beta_1": 0.5,
    "scale_parameter": True,
    "ns_steps": 2,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_argument_of_an_optimizer_arrives(name):
    for argument in OPTIMIZERS[name].arguments:
        value = OTHER.get(argument, [1e-20, 1e-2] if name == "adafactor" else 1e-3)
        given = {argument: value}
        if argument in ("relative_step", "warmup_init"):
            continue
        if (name, argument) in (("sgd", "dampening"), ("sgd", "nesterov")):
            given = {"momentum": 0.5, argument: value}
        flat = build_optimizer(RunConfig.from_dict({"optimizer": name, "optimizer_config": given}))
        nested = RunConfig.from_dict(
            {"optimizer": name, "optimizer_config": {name: given, "adam": {}, "sgd": None} | {name: given}}
        )
        for optimizer in (flat, build_optimizer(nested)):
            assert getattr(optimizer, argument) == value, argument
        assert nested.optimizer_config == given


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer_config": {"learning_rate": 5}}, "the rate is `learning_rate`, with `lr_schedule`. Set that."),
        ({"optimizer_config": {"betas": [0.9]}}, "`optimizer_config.betas` cannot be [0.9]. It takes two numbers"),
        ({"optimizer_config": {"betas": [0.9, 1]}}, "It takes two numbers of at least 0 and below 1"),
        ({"optimizer_config": {"eps": "small"}}, "`optimizer_config.eps` cannot be 'small'. It takes a number"),
        ({"optimizer_config": {"esp": 1}}, "`optimizer_config.esp` is not an argument of adamw. Did you mean 'eps'?"),
        (
            {"optimizer_config": {"momentum": 0.9}},
            "not an argument of adamw. It is one of `sgd`, `muon`. It takes: betas",
        ),
        (
            {"optimizer_config": {"sgd": {"momentum": 0.9}}},
            "`optimizer_config.sgd` has no effect with `optimizer: adamw`.",
        ),
        ({"optimizer_config": {"adamw": 3}}, "`optimizer_config.adamw` must be a mapping, not 3."),
        (
            {"optimizer_config": {"adamw": {}, "eps": 1}},
            "`optimizer_config.eps` is not an optimizer. Put it inside `adamw`.",
        ),
        (
            {"weight_decay": 0.3, "optimizer_config": {"weight_decay": 0.1}},
            "`weight_decay` and `optimizer_config.weight_decay` differ. Give one of them.",
        ),
        ({"optimizer": "adam", "optimizer_config": {"weight_decay": 0.1}}, "Use `optimizer: adamw`."),
        (
            {"optimizer": "adafactor", "optimizer_config": {"relative_step": True}},
            "`optimizer_config.relative_step` would take the place of `learning_rate` and `lr_schedule`. Remove it.",
        ),
        (
            {"optimizer": "adafactor", "optimizer_config": {"warmup_init": True}},
            "`optimizer_config.warmup_init` has no effect without `relative_step`. Use `warmup`.",
        ),
        ({"optimizer": "sgd", "optimizer_config": {"nesterov": True}}, "has no effect without `momentum`."),
        (
            {"optimizer": "sgd", "optimizer_config": {"momentum": 0.9, "nesterov": True, "dampening": 0.1}},
            "exclude each other",
        ),
        ({"optimizer": "muon", "optimizer_config": {"ns_steps": 2**40}}, "It takes a whole number from 1 to 100."),
    ],
)
def test_a_wrong_or_ineffective_argument_of_the_optimizer_is_refused_when_it_is_configured(settings, words):
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict(settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_decay_of_mlx_lms_form_is_the_weight_decay():
    config = RunConfig.from_yaml("optimizer: adamw\noptimizer_config:\n  adamw: {weight_decay: 0.5, eps: 1e-6}\n")
    assert (config.weight_decay, config.optimizer_config) == (0.5, {"eps": 1e-6})
    assert build_optimizer(config).weight_decay == 0.5
    assert RunConfig.from_dict(config.to_dict()) == config


# Names


def test_a_suggestion_is_a_slip_of_the_pen_and_no_other_word():
    known = list(SETTINGS)
    slips = {
        "modle": "model",
        "lerning_rate": "learning_rate",
        "learningrate": "learning_rate",
        "learning-rate": "learning_rate",
        "batchsize": "batch_size",
        "iter": "iters",
        "epoch": "epochs",
        "lr_scheduler": "lr_schedule",
        "sample_prompt": "sample_prompts",
        "max_seq_lenght": "max_seq_length",
    }
    assert {word: typo_of(word, known) for word in slips} == slips
    others = ("text", "min_seq_length", "loss_fn", "top_n", "num_layer_groups", "report", "memory", "bits", "step")
    assert {word: typo_of(word, known) for word in others} == dict.fromkeys(others)


def test_an_unknown_keyword_in_python_is_answered_as_one_in_yaml():
    with pytest.raises(ConfigError) as caught:
        RunConfig(lr=1e-3, iters=0)
    assert str(caught.value).splitlines() == [
        "unknown setting `lr`. Here it is `learning_rate`: write `learning_rate: 0.001`.",
        "`iters` must be at least 1, not 0. null = as many as epochs take.",
    ]
    assert list(inspect.signature(RunConfig).parameters) == list(SETTINGS)


# Second words


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "adam", "weight_decay": 0.01}, "`weight_decay` has no effect with `optimizer: adam`."),
        (
            {"learning_rate": 1e-4, "lr_schedule": {"name": "cosine", "arguments": [1e-5, 10]}},
            "`learning_rate: 0.0001` has no effect",
        ),
    ],
)
def test_a_setting_that_is_given_at_its_default_and_has_no_effect_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        RunConfig.from_dict(settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adam"},
        {"optimizer": "adam", "weight_decay": 0},
        {"lr_schedule": {"name": "cosine", "arguments": [1e-5, 10]}},
        {"optimizer_config": {"weight_decay": 0.3, "eps": 1e-6}},
        {"data": [{"path": "a", "weight": 2}]},
        {"method": "grpo", "rewards": [{"length": {"max": 80}}], "beta": 0},
    ],
)
def test_what_is_kept_of_settings_is_read_back_as_the_same(settings):
    config = RunConfig.from_dict(settings)
    assert RunConfig.from_dict(config.to_dict()) == config
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_another_optimizer_takes_its_own_decay():
    adam = RunConfig(optimizer="adam")
    assert adam.replace(optimizer="adamw").weight_decay == 0.01
    assert RunConfig(weight_decay=0.3).replace(optimizer="adam").weight_decay == 0
    assert RunConfig(weight_decay=0.3).replace(optimizer="lion").weight_decay == 0.3


def test_all_live_changes_are_answered_at_once_and_taken_together():
    run = Run(RunConfig(iters=5))
    with pytest.raises(ConfigError) as caught:
        run.set(lr=1e-3, max_grad_norm=1)
    assert str(caught.value).splitlines() == [
        "unknown setting `lr`. Here it is `learning_rate`: write `learning_rate: 0.001`.",
        "unknown setting `max_grad_norm`. Here it is `grad_clip`: write `grad_clip: 1`.",
    ]
    run.set(sample_every=2, sample_prompts=["a"], epochs=2)
    assert (run.config.sample_every, run.config.sample_prompts, run.config.epochs, run.config.iters) == (
        2,
        ("a",),
        2,
        None,
    )
    run.set(sample_prompts=None)
    assert (run.config.sample_every, run.config.sample_prompts) == (None, None)
    with pytest.raises(ConfigError, match="`sample_tokens` has no effect without `sample_prompts`"):
        run.set(sample_tokens=3)
    with pytest.raises(ConfigError) as caught:
        run.fork(model="x", data="y", lr=3)
    assert len(str(caught.value).splitlines()) == 3


# Numbers as arrays hold them

FLOATS = {
    **dict.fromkeys(("learning_rate", "grad_clip", "weight_decay", "loss_spike", "epochs", "val_set_size"), 1e-50),
    "lora_parameters": {"scale": 1e-39},
    "lr_schedule": {"name": "cosine_decay", "arguments": [1e-4, 100, 1e-50]},
    "optimizer_config": {"eps": 1e-60},
}


@pytest.mark.parametrize("name", FLOATS)
def test_a_number_that_is_0_in_32_bits_is_refused(name):
    with pytest.raises(ConfigError, match=r"that is 0 in 32-bit floats, the smallest of which is 1\.2e-38\.$") as error:
        RunConfig.from_dict({name: FLOATS[name]})
    assert "\n" not in str(error.value)


def float_settings():
    """(name, method that has it, whether it is a list) of every setting that is a number or a list of numbers."""
    for name, kind in typing.get_type_hints(RunConfig).items():
        options = [option for option in (typing.get_args(kind) or (kind,)) if option is not type(None)]
        if float in options or tuple[float, ...] in options or kind == tuple[float, ...]:
            yield name, tuple[float, ...] in options


@pytest.mark.parametrize(("name", "is_list"), [*float_settings()])
@pytest.mark.parametrize("tiny", [1e-50, -1e-40, 5e-324, np.float64(1e-46)])
def test_no_setting_takes_a_number_that_is_0_in_32_bits(name, is_list, tiny):
    with pytest.raises(ConfigError) as error:
        RunConfig(**{name: [tiny] if is_list else tiny})
    assert "that is 0 in 32-bit floats" in str(error.value)


def test_every_kind_of_number_was_tried():
    assert {"learning_rate", "grad_clip", "temperature", "beta", "reward_weights"} <= {
        name for name, _ in float_settings()
    }


def test_0_and_the_smallest_numbers_that_arrays_hold_are_taken():
    config = RunConfig(weight_decay=0, learning_rate=1.2e-38, optimizer_config={"betas": [0, 0.9]})
    assert (config.weight_decay, config.learning_rate) == (0, 1.2e-38)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lora_parameters": {"dropout": 1 - 1e-12}}, "`lora_parameters.dropout` must be below 1, not 0.999999999999."),
        ({"label_smoothing": 1 - 1e-12}, "`label_smoothing` must be below 1"),
        ({"optimizer_config": {"betas": [0.9, 1 - 1e-12]}}, "It takes two numbers of at least 0 and below 1"),
        (
            {"optimizer": "sgd", "optimizer_config": {"momentum": 1 - 1e-12}},
            "It takes a number of at least 0 and below",
        ),
    ],
)
def test_a_number_that_reaches_its_bound_in_32_bits_is_refused(given, words):
    with pytest.raises(ConfigError) as error:
        RunConfig.from_dict(given)
    assert words in str(error.value)


def test_a_live_change_to_a_number_that_is_0_in_32_bits_is_refused():
    with pytest.raises(ConfigError, match="that is 0 in 32-bit floats"):
        RunConfig().with_live(learning_rate=1e-50)


# What only a later stage refused

LATER = [
    ({"val_set_size": 1.5}, "`val_set_size: 1.5` is neither a share below 1 nor a whole number of rows."),
    *[
        (
            {"data": [{"path": "a.jsonl", "weight": weight}, "b.jsonl"]},
            f"weight of source 1 of data must be a number {rest}",
        )
        for weight, rest in [
            (-1, "above 0, not -1."),
            (0, "above 0, not 0."),
            (float("nan"), "above 0, not nan."),
            (float("inf"), "above 0, not inf."),
            (1e-50, "above 0, not 1e-50."),
            ("2", "above 0, not '2'."),
            (True, "above 0, not True."),
            (10**400, "above 0, not "),
        ]
    ],
    (
        {"data": ["a.jsonl", {"path": "b", "wieght": 2}]},
        "source 2 of data has the unknown key 'wieght'. Did you mean 'weight'?",
    ),
    ({"data": ["a.jsonl", {"weight": 2}]}, "source 2 of data needs a path, such as {path: other.jsonl, weight: 2}:"),
    ({"data": ["a.jsonl", 3]}, "source 2 of data needs a path"),
    ({"data": ["a.jsonl", " "]}, "source 2 of data is empty."),
    ({"data": [{"path": ""}]}, "path of source 1 of data cannot be ''."),
    ({"data": [{"path": None}]}, "path of source 1 of data cannot be None."),
    ({"data": [{"path": "a", "train_split": 3}]}, "train_split of source 1 of data must be text, not 3."),
    ({"data": ""}, "`data` is empty."),
    *[
        ({name: " "}, f"`{name}` is empty. It takes text.")
        for name in ("model", "subset", "valid_split", "prompt_feature", "adapter_path", "resume_adapter_file")
    ],
    ({"target_modules": ["q_proj", ""]}, "`target_modules` has an empty name. Remove it."),
    ({"lora_parameters": {"keys": [""]}}, "`lora_parameters.keys` has an empty name. Remove it."),
    ({"chat_template": ""}, "`chat_template` is empty."),
    ({"chat_template": "vicuna"}, "`chat_template: vicuna` is the name of a template of other programs."),
    ({"chat_template": "tokenizer_default"}, "is the default here: the model's own. Remove it."),
    ({"chat_template": "{{"}, "`chat_template` is not valid Jinja at line 1: unexpected 'end of template'."),
    ({"chat_template": "{% for m in messages %}\n{{ m }}"}, "`chat_template` is not valid Jinja at line 2: "),
    (
        {"chat_template": "{{ messages|tojsn }}"},
        "`chat_template` is not valid Jinja at line 1: No filter named 'tojsn'.",
    ),
    ({"chat_template": "{bos}{text}"}, "`chat_template` never reads `messages`: every conversation would be the same"),
]


@pytest.mark.parametrize(("given", "words"), LATER, ids=lambda value: str(value)[:60])
def test_what_no_run_can_use_is_refused_when_it_is_configured(given, words):
    with pytest.raises(ConfigError) as error:
        RunConfig.from_dict(given)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mixture_in_yaml_is_refused_with_its_line():
    with pytest.raises(ConfigError) as error:
        RunConfig.from_yaml("data:\n  - a.jsonl\n  - path: b.jsonl\n    weight: -2\n")
    assert str(error.value) == "line 4, column 5: weight of source 2 of data must be a number above 0, not -2."


def test_a_template_is_text_or_a_file_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    assert RunConfig(chat_template=text).chat_template == text
    (tmp_path / "good.jinja").write_text(text)
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}")
    (tmp_path / "chatml").write_text(text)
    for name in ("good.jinja", "chatml", str(tmp_path / "good.jinja")):
        assert Run(RunConfig(chat_template=name)).config.chat_template == name
    for name, words in [
        ("bad.jinja", "`chat_template`: bad.jinja is not valid Jinja at line 1: "),
        ("lost.jinja", "`chat_template`: 'lost.jinja' cannot be read as a file: No such file or directory. It takes"),
        ("mine", "`chat_template`: 'mine' cannot be read as a file"),
        (".", "`chat_template`: '.' cannot be read as a file: Is a directory."),
        ("x" * 5000, "File name too long"),
    ]:
        for make in (lambda: Run(RunConfig(chat_template=name)), lambda: Run.from_yaml(f"chat_template: {name}")):  # noqa: B023
            with pytest.raises(ConfigError) as error:
                make()
            assert words in str(error.value)
            assert "\n" not in str(error.value)
            assert len(str(error.value)) < 300


# Sizes

CROWDS = {
    "settings": {f"key{index}": index for index in range(20_000)},
    "a group": {"lora_parameters": {f"key{index}": index for index in range(20_000)}},
    "optimizer_config": {"optimizer_config": {f"key{index}": index for index in range(20_000)}},
    "method_options": {"method_options": {f"key{index}": index for index in range(20_000)}},
    "roles": {"roles": {f"key{index}": "user" for index in range(20_000)}},
    "a long name": {"x" * 10_000_000: 1},
    "a long name in a group": {"lora_parameters": {"x" * 10_000_000: 1}},
}


@pytest.mark.parametrize("case", CROWDS)
def test_many_wrong_settings_are_reported_briefly_and_quickly(case):
    began = time.process_time()
    with pytest.raises(ConfigError) as error:
        RunConfig.from_dict(CROWDS[case])
    assert time.process_time() - began < 2
    assert len(str(error.value)) < 20_000
    if case == "settings":
        lines = str(error.value).splitlines()
        assert (len(lines), lines[-1]) == (201, "and 19,800 more problems.")


@pytest.mark.parametrize(
    "text",
    [
        lambda: "model: " + "x" * 10_000_000,
        lambda: 'model: "' + "x y " * 2_500_000 + '"',
        lambda: "\n".join(f"key{index}: 1" for index in range(20_000)),
        lambda: "\n".join(f"k{index}: 1" for index in range(20_000)),
        lambda: "keys: [" + ", ".join("a" for _ in range(60_000)) + "]",
    ],
    ids=["scalar", "quoted", "long names", "names", "list"],
)
@pytest.mark.matrix(every=5)
def test_a_text_too_long_for_settings_is_one_line_at_once(text, tmp_path):
    text = text()
    (tmp_path / "run.yaml").write_text(text)
    for source in (text, tmp_path / "run.yaml"):
        began = time.process_time()
        with pytest.raises(
            ConfigError, match=r"is too long for settings|it has more than 10,000 keys and values"
        ) as error:
            RunConfig.from_yaml(source)
        assert time.process_time() - began < 4
        assert len(str(error.value)) < 400
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": f"p {index}", "completion": f"c {index}"} for index in range(5_000)],
        [{"messages": [{"role": "user", "content": "x" * 900}] * 2} for _ in range(400)],
    ],
    ids=["many", "long"],
)
@pytest.mark.matrix(every=2)
def test_rows_written_out_in_the_settings_are_read(rows):
    assert RunConfig.from_yaml(f"data: {json.dumps(rows)}\niters: 3").data == rows


@pytest.mark.long
def test_more_rows_than_are_read_from_settings_are_refused_with_what_to_do():
    with pytest.raises(
        ConfigError, match=r"more than 50,000 keys and values; put rows into a file, and name it in `data`"
    ):
        RunConfig.from_yaml("data:\n" + "- {prompt: a}\n" * 20_000)


# What the constructors take


@pytest.mark.parametrize("source", [None, {}, {"iters": 3}, b"iters: 3", 3, ["iters: 3"]], ids=repr)
def test_what_is_no_text_and_no_path_is_one_clear_error(source):
    for read in (RunConfig.from_yaml, Run.from_yaml):
        with pytest.raises(ConfigError, match="settings are read from YAML text or the path of a YAML file, not"):
            read(source)
    if not isinstance(source, dict):
        with pytest.raises(ConfigError, match=r"settings are a dict such as \{'iters': 100\}, not"):
            RunConfig.from_dict(source)
    if source is not None:
        with pytest.raises(ConfigError, match=r"config is a RunConfig, such as RunConfig\(iters=100\), not"):
            Run(source)
    with pytest.raises(CheckpointError, match="a run is resumed from its folder, such as 'adapters/run', not"):
        Run.resume(source)
    with pytest.raises(ConfigError, match="namespace is a dict such as globals"):
        Run(RunConfig(), namespace=3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("modle", "'modle' is not the name of an input or setting. Did you mean 'model'? It accepts data, "),
        (["model", "rnak"], "'rnak' is not the name of an input or setting."),
        ("m", "'m' is not the name"),
        (3, "allow_changed is a list of names, such as ['model'], not 3."),
        ([3], "allow_changed is a list of names"),
    ],
)
def test_allow_changed_takes_only_known_names(given, words, tmp_path):
    for make in (
        lambda: Run(RunConfig(), allow_changed=given),
        lambda: Run.from_yaml("iters: 3", allow_changed=given),
        lambda: Run.resume(tmp_path, allow_changed=given),
    ):
        with pytest.raises(ConfigError) as error:
            make()
        assert words in str(error.value)


def test_a_text_is_one_name_wherever_a_list_of_names_is_taken():
    assert Run(RunConfig(), allow_changed="model")._allow_changed == {"model"}
    assert RunConfig(target_modules="q_proj").lora_parameters.keys == ("q_proj",)
    assert RunConfig(lora_parameters={"keys": "q_proj"}).lora_parameters.keys == ("q_proj",)
    assert RunConfig(sample_prompts="Hello").sample_prompts == ("Hello",)
    grpo = RunConfig(method="grpo", rewards="number_match", stop="END", reward_weights=[2])
    assert (tuple(grpo.rewards), grpo.stop) == (("number_match",), ("END",))


def test_the_types_of_settings_are_worked_out_once(monkeypatch):
    values = {"lora_parameters": {"rank": 4}, "lr_schedule": {"name": "cosine_decay", "arguments": [1e-5, 10]}}
    first = RunConfig.from_dict(values)
    monkeypatch.setattr(typing, "get_type_hints", None)
    assert RunConfig.from_dict(values) == first
