"""RunConfig: every setting, declared once with its default, bounds and help.

The declaration is the source of the YAML keys of a `%%finetune` cell, validation, `%%finetune?` and the reference page
in docs. Keys are those of mlx-lm's and mlx-lm-lora's YAML where they have one; `iters` counts optimizer updates. A new
setting is one field of RunConfig.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePath
from typing import Any, ClassVar, Literal

import yaml

from mlx_nb.config.checks import problems_of
from mlx_nb.config.command_lines import read_command
from mlx_nb.config.fields import SettingError, SettingErrors, Settings, coerce, kinds_of, names_given, plain, setting
from mlx_nb.config.hints import foreign_settings, inner_hint, value_hint
from mlx_nb.config.methods import METHODS
from mlx_nb.config.mixture_sources import is_mixture, is_source, source_problem
from mlx_nb.config.optimizers import OptimizerName, arguments_of, has_no_decay
from mlx_nb.config.yaml_text import Document, load_mapping, read_yaml_file
from mlx_nb.errors import ConfigError, listed_problems, shown


@dataclass(frozen=True)
class LoraParameters(Settings):
    """Settings of the adapter. `scale` multiplies the adapter's output and is never divided by the rank."""

    rank: int = setting(8, "Rank R of the adapter matrices.", group="adapter", at_least=1)
    scale: float = setting(20.0, "Factor on the adapter's output; PEFT's lora_alpha / r.", group="adapter", above=0)
    dropout: float = setting(
        0.0, "Probability of dropping an adapter input while training.", group="adapter", at_least=0, below=1
    )
    keys: tuple[str, ...] | None = setting(
        None,
        "Modules to adapt: full paths inside a layer (self_attn.q_proj) or short names (q_proj). "
        "null = every linear layer.",
        group="adapter",
    )


@dataclass(frozen=True)
class LrSchedule(Settings):
    """The learning rate as a function of the update, before warm-up is prepended."""

    short_form: ClassVar[str] = "name"

    name: Literal["constant", "cosine_decay", "linear_schedule", "exponential_decay", "step_decay"] = setting(
        "cosine_decay",
        "A schedule of mlx.optimizers (or cosine, linear, exponential for short), or constant.",
        group="optimizer",
        synonyms={"cosine": "cosine_decay", "linear": "linear_schedule", "exponential": "exponential_decay"},
    )
    arguments: tuple[float, ...] | None = setting(
        None,
        "The schedule's own arguments in mlx's order, the first being the initial learning rate. "
        "null = from learning_rate down to 0 over the updates after warm-up.",
        group="optimizer",
    )
    warmup: int | None = setting(
        None, "Updates of linear warm-up. null = 5% of iters, at most 100.", group="optimizer", at_least=0
    )
    warmup_init: float = setting(0.0, "Learning rate at update 0 of the warm-up.", group="optimizer", at_least=0)


@dataclass(frozen=True, init=False)
class RunConfig(Settings):
    """All settings of a run. Frozen; `replace` gives a changed, checked copy.

    Relative paths in it are relative to `working_folder`, None = the process's working folder. Raises ConfigError if a
    setting is unknown, of the wrong type, out of bounds, or would have no effect.
    """

    working_folder: ClassVar[Path | None] = None

    method: str = setting(
        "sft",
        "Training method: sft (rows to imitate), dpo, cpo, orpo (pairs of answers), kto (answers labeled good or "
        "bad), grpo (rewards of what the model writes), or a name given to register_objective.",
        group="method",
    )
    loss: str | None = setting(
        None, "Variant of the method's loss, listed on its page. null = the first one there.", group="method"
    )
    beta: float | None = setting(
        None,
        "How closely the policy stays to the reference (dpo, kto: 0.1; normalized: 2; grpo, weight of the KL: 0.04), "
        "the slope of the preference (cpo: 0.1, simpo: 2), or its weight (orpo: 0.1). null = the number in brackets.",
        group="method",
        at_least=0,
        only_for="option",
    )
    label_smoothing: float | None = setting(
        None,
        "sft: share of probability spread over the vocabulary. dpo, cpo: rate of flipped preferences. null = 0.",
        group="method",
        at_least=0,
        below=1,
        only_for="option",
    )
    z_loss: float | None = setting(
        None, "Weight of log(Z)^2, which keeps logits small. null = 0.", group="method", at_least=0, only_for="option"
    )
    delta: float | None = setting(
        None,
        "dpop: weight of the penalty on chosen answers that became less likely. null = 50.",
        group="method",
        at_least=0,
        only_for="option",
    )
    cpo_alpha: float | None = setting(
        None,
        "cpo: weight of the likelihood of chosen answers. null = 1, and 0 for simpo.",
        group="method",
        at_least=0,
        only_for="option",
    )
    simpo_gamma: float | None = setting(
        None, "simpo: target margin. null = 0.5.", group="method", at_least=0, only_for="option"
    )
    desirable_weight: float | None = setting(
        None, "kto: weight of answers labeled true. null = 1.", group="method", above=0, only_for="option"
    )
    undesirable_weight: float | None = setting(
        None, "kto: weight of answers labeled false. null = 1.", group="method", above=0, only_for="option"
    )
    method_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Options of a method of your own: keyword-only parameters of its loss function.",
            "group": "method",
            "live": False,
            "bounds": {},
            "synonyms": {},
            "only_for": None,
        },
    )
    reference_model: str | None = setting(
        None,
        "Another model as the reference: alias, hub id, folder or .gguf with the same vocabulary. "
        "null = the model as it is when training starts, which takes no memory with lora and dora.",
        group="method",
        only_for="reference",
    )
    reference_adapter: str | None = setting(
        None,
        "Adapter folder of the reference, or `none` for the bare base. null = what training starts from: "
        "resume_adapter_file if there is one.",
        group="method",
        only_for="reference",
    )
    reference_free: bool = setting(
        False,
        "Pairs only: take the reference to be uniform, so that it drops out.",
        group="method",
        only_for="reference",
    )
    group_size: int = setting(4, "Completions of each prompt.", group="rollouts", at_least=2, only_for="prompts")
    max_completion_length: int = setting(
        256, "Longest completion in tokens.", group="rollouts", at_least=1, only_for="prompts"
    )
    temperature: float = setting(
        1.0, "Temperature that completions are sampled at.", group="rollouts", above=0, only_for="prompts"
    )
    top_p: float = setting(
        1.0,
        "Sample from the most likely tokens whose probabilities add up to this. 1 = off.",
        group="rollouts",
        above=0,
        at_most=1,
        only_for="prompts",
    )
    top_k: int | None = setting(
        None, "Sample from the K most likely tokens. null = off.", group="rollouts", at_least=1, only_for="prompts"
    )
    stop: tuple[str, ...] | None = setting(None, "Texts that end a completion.", group="rollouts", only_for="prompts")
    rewards: Any = setting(
        None,
        "List of functions in the notebook, by name, and built-in rewards such as number_match or {regex: ...}.",
        group="rollouts",
        only_for="prompts",
    )
    reward_weights: tuple[float, ...] | None = setting(
        None, "Weight of each reward. null = 1 each.", group="rollouts", only_for="prompts"
    )
    reward_timeout: float = setting(
        60.0,
        "Seconds that a reward function may take for a batch; an async one is cancelled then.",
        group="rollouts",
        above=0,
        only_for="prompts",
    )
    scale_rewards: Literal["group", "batch", "none"] | None = setting(
        None,
        "Divide advantages by the deviation of rewards in the group, in the batch, or not at all. "
        "null = group, and none for dr_grpo.",
        group="rollouts",
        only_for="prompts",
    )
    updates_per_rollout: int = setting(
        1, "Optimizer updates made with one set of completions.", group="rollouts", at_least=1, only_for="prompts"
    )
    epsilon: float | None = setting(
        None,
        "Ratios below 1 - epsilon are clipped, with updates_per_rollout of 2 or more. null = 0.2 (3e-4 for sequence "
        "ratios).",
        group="rollouts",
        above=0,
        only_for="option",
    )
    epsilon_high: float | None = setting(
        None,
        "Ratios above 1 + epsilon_high are clipped, likewise. null = as epsilon (dapo: 0.28; sequence ratios: 4e-4).",
        group="rollouts",
        above=0,
        only_for="option",
    )
    importance_sampling_level: Literal["token", "sequence"] | None = setting(
        None, "Ratios of tokens, or of whole completions (GSPO). null = token.", group="rollouts", only_for="option"
    )
    mask_truncated_completions: bool = setting(
        False, "Do not train on completions cut at max_completion_length.", group="rollouts", only_for="prompts"
    )
    model: str = setting(
        "smollm2-135m",
        "An alias (smollm2-135m), hub id, local folder, or .gguf file. A quantized model gives QLoRA by itself.",
        group="model",
    )
    load_in_bits: Literal[2, 3, 4, 6, 8] | None = setting(
        None, "Quantize the base to this many bits on load. null = as it is.", group="model"
    )
    chat_template: str | None = setting(
        None,
        "chatml, llama3, gemma or mistral, Jinja text, or a file with it, in place of the model's own chat template.",
        group="model",
    )
    data: Any = setting(
        "data",
        "A folder with train/valid/test files, a jsonl, json, parquet or csv file, a hub id, the name of a variable "
        "in the notebook (list of dicts, DataFrame, datasets.Dataset), or a list of {path, weight} to mix.",
        group="rows",
    )
    subset: str | None = setting(None, "Subset (configuration name) of a hub dataset.", group="rows")
    train_split: str | None = setting(None, "Name of the training split. null = train.", group="rows")
    valid_split: str | None = setting(
        None, "Name of the validation split. null = valid, validation, val, dev or test file.", group="rows"
    )
    test_split: str | None = setting(None, "Name of the test split. null = test.", group="rows")
    leave_out: tuple[int, ...] | None = setting(
        None, "Training rows that are not trained, by number, as the row views count them. null = none.", group="rows"
    )
    down_weight: tuple[int, ...] | None = setting(
        None,
        "Training rows that count less than the others, by number, as the row views count them. null = none.",
        group="rows",
        only_for=("tokens", "pairs"),
    )
    down_weight_factor: float = setting(
        0.5,
        "What a row of down_weight counts; any other counts 1.",
        group="rows",
        above=0,
        below=1,
        only_for=("tokens", "pairs"),
    )
    val_set_size: float = setting(
        0.1,
        "Rows to hold out for validation if there is no validation split, as a share of the training rows (at most "
        "200 rows) or a number of 1 or more. 0 = none.",
        group="rows",
        at_least=0,
    )
    chat_feature: str | None = setting(
        None, "Column with the messages. null = messages.", group="rows", only_for=("tokens", "labels")
    )
    prompt_feature: str | None = setting(None, "Column with the prompt. null = prompt.", group="rows")
    completion_feature: str | None = setting(
        None, "Column with the completion. null = completion.", group="rows", only_for=("tokens", "labels")
    )
    chosen_feature: str | None = setting(
        None, "Column with the better answer. null = chosen.", group="rows", only_for="pairs"
    )
    rejected_feature: str | None = setting(
        None, "Column with the worse answer. null = rejected.", group="rows", only_for="pairs"
    )
    label_feature: str | None = setting(
        None, "Column that says whether an answer is good. null = label.", group="rows", only_for="labels"
    )
    answer_feature: str | None = setting(
        None, "Column with the right answer to a prompt, for rewards. null = answer.", group="rows", only_for="prompts"
    )
    preference_score_feature: str | None = setting(
        None, "Column with the weight of a pair. null = preference_score.", group="rows", only_for="pairs"
    )
    text_feature: str | None = setting(None, "Column with plain text. null = text.", group="rows", only_for="tokens")
    system_feature: str | None = setting(None, "Column with a system prompt. null = system.", group="rows")
    roles: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "Your data's own words for who speaks, such as {speaker_a: user, speaker_b: assistant}.",
            "group": "rows",
            "live": False,
            "synonyms": {},
            "bounds": {},
            "only_for": None,
        },
    )
    loss_on: Literal["assistant", "final", "completion", "all"] = setting(
        "assistant",
        "Which tokens are trained: every assistant turn, only the last message, the assistant's turns after the last "
        "user message, or everything.",
        group="rows",
    )
    prompt_format: Literal["chat", "raw"] | None = setting(
        None,
        "How strings are written for the model, in rows with prompts and completions and at inference: as a "
        "user and an assistant turn of the chat template (chat), or unchanged, one directly after the other (raw). "
        "null = chat if there is a template; a model trained on plain text gets raw text.",
        group="rows",
    )
    special_tokens_in_text: Literal["keep", "text"] = setting(
        "keep",
        "What control tokens such as <|im_end|> become in your own text: control tokens, as in mlx-lm "
        "(keep), or ordinary characters (text).",
        group="rows",
    )
    max_seq_length: int = setting(2048, "Longest row in tokens; see truncate.", group="rows", at_least=2)
    truncate: Literal["right", "left", "drop", "error", "split"] = setting(
        "right",
        "What to do with a row longer than max_seq_length: cut its end, cut its start, leave it out, stop, or train "
        "a plain text in several pieces.",
        group="rows",
    )
    stride: int = setting(
        0,
        "Tokens that a piece of a text repeats from the one before, as context that is not trained (truncate: split).",
        group="rows",
        at_least=0,
    )
    fine_tune_type: Literal["lora", "dora", "full"] = setting(
        "lora", "Train low-rank adapters, weight-decomposed ones, or the weights themselves.", group="adapter"
    )
    num_layers: int = setting(
        -1, "Train the last N layers. -1 = all; with full, embeddings, norm and head too.", group="adapter", at_least=-1
    )
    lora_parameters: LoraParameters = setting(LoraParameters(), "Shape of the adapter.", group="adapter")
    target_modules: tuple[str, ...] | None = setting(None, "Another word for lora_parameters.keys.", group="adapter")
    resume_adapter_file: str | None = setting(
        None,
        "Start from this adapter, a folder or its adapters.safetensors. Settings of this group that are not given are "
        "then the adapter's own.",
        group="adapter",
    )
    optimizer: OptimizerName = setting(
        "adamw",
        "An optimizer of mlx.optimizers. muon orthogonalizes every matrix, as in mlx-lm; with fine_tune_type: full and "
        "num_layers: -1 also embeddings and head, which its author leaves to AdamW.",
        group="optimizer",
    )
    optimizer_config: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Further arguments of the optimizer, such as {betas: [0.9, 0.98]}; also in mlx-lm's form, by name.",
            "group": "optimizer",
            "live": False,
            "bounds": {},
            "synonyms": {},
            "only_for": None,
        },
    )
    learning_rate: float = setting(1e-4, "Peak learning rate.", group="optimizer", above=0, live=True)
    lr_schedule: LrSchedule = setting(
        LrSchedule(),
        "cosine, linear, constant, or {name, arguments, warmup, warmup_init} as in mlx-lm.",
        group="optimizer",
    )
    warmup: int | None = setting(None, "Another word for lr_schedule.warmup.", group="optimizer", at_least=0)
    weight_decay: float = setting(
        0.01,
        "Decoupled weight decay (adamw, lion, muon, adafactor) or L2 penalty (sgd); adam has none.",
        group="optimizer",
        at_least=0,
    )
    grad_clip: float | None = setting(
        1.0,
        "Largest L2 norm of the whole gradient. null = no clipping.",
        group="optimizer",
        above=0,
        live=True,
    )
    loss_spike: float | None = setting(
        10.0,
        "Name an update whose loss is this many deviations (robust, at least 0.1 nats each) above the median of the "
        "last 32 with rows of about its length; see spike_patience. null = never.",
        group="training",
        above=0,
        live=True,
    )
    spike_patience: int = setting(
        8,
        "Pause before the update that would be this many spikes in a row. 1 = before the first.",
        group="training",
        at_least=1,
        live=True,
    )
    iters: int | None = setting(
        None,
        "Optimizer updates in the run. null = as many as epochs take.",
        group="training",
        at_least=1,
        live=True,
    )
    epochs: float | None = setting(
        None,
        "Passes over the training rows. null = 1 when iters is not given.",
        group="training",
        above=0,
        live=True,
    )
    schedule_iters: int | None = setting(
        None,
        "Updates that lr_schedule is for; the rate of the last of them stays for all after it. null = the whole run: "
        "the schedule of one that gets longer is stretched.",
        group="optimizer",
        at_least=1,
        live=True,
    )
    batch_size: int = setting(4, "Rows, pairs or prompts in one forward pass.", group="training", at_least=1)
    grad_accumulation_steps: int = setting(
        1,
        "Forward passes in one update; weighted by token, so the same as one large batch.",
        group="training",
        at_least=1,
    )
    grad_checkpoint: bool = setting(
        False,
        "Keep of each layer only what goes into it, and compute the rest again for the gradient: the same numbers in a "
        "fraction of the memory, for more time.",
        group="training",
    )
    packing: Literal["auto", True, False] = setting(
        "auto",
        "Compute the rows of a batch one after the other in one row, without padding, and what they begin with in "
        "common once: the same numbers to rounding. auto = where that saves enough.",
        group="training",
    )
    seed: int = setting(
        0, "Decides row order, adapter start and dropout.", group="training", at_least=0, at_most=2**63 - 1
    )
    steps_per_eval: int | None = setting(
        None,
        "Validate every N updates, and at the start and the end. null = five times a run, -1 = never.",
        group="validation",
        at_least=-1,
        live=True,
    )
    val_batches: int = setting(
        25,
        "Batches in one validation, always the same rows. -1 = all.",
        group="validation",
        at_least=-1,
    )
    early_stopping_patience: int | None = setting(
        None,
        "Stop after N validations in a row without a new best. null = never stop early.",
        group="validation",
        at_least=1,
    )
    test: bool = setting(False, "Measure loss and perplexity on the test split at the end.", group="validation")
    test_batches: int = setting(-1, "Batches of the test split to measure. -1 = all.", group="validation", at_least=-1)
    sample_prompts: tuple[str, ...] | None = setting(
        None, "Prompts that the model answers during training, shown side by side.", group="samples", live=True
    )
    sample_every: int | None = setting(
        None,
        "Answer them every N updates, and at the start and the end. null = at each validation.",
        group="samples",
        at_least=1,
        live=True,
    )
    sample_tokens: int = setting(64, "Longest answer in tokens.", group="samples", at_least=1, live=True)
    save_every: int = setting(
        100, "Save the adapter every N updates. -1 = only at the end.", group="saving", at_least=-1, live=True
    )
    autosave_minutes: float | None = setting(
        10.0,
        "Write an exact checkpoint when the last one is this old, and sooner where writing takes under 1% of the "
        "time since. null = only when something else asks for it.",
        group="saving",
        above=0,
        live=True,
    )
    keep: int = setting(
        3,
        "How many exact checkpoints to keep, besides the best, and how many numbered adapters of this run.",
        group="saving",
        at_least=1,
    )
    keep_previous: int | None = setting(
        2,
        "How many earlier runs of the same folder to keep in NAME.previous-1, -2, ... Older ones are removed when a "
        "run begins, unless something in them was not written by mlx_nb. null = all.",
        group="saving",
        at_least=1,
    )
    snapshot_memory: int = setting(
        512,
        "Memory for the last updates, kept to rewind to, in MB; on disk once the run ends. 0 = only checkpoints.",
        group="saving",
        at_least=0,
        live=True,
    )
    adapter_path: str | None = setting(
        None, "Folder for the adapter. null = adapters/<name of the run>.", group="saving"
    )

    @property
    def given(self) -> frozenset[str]:
        """Names of the settings that were given; synonyms count as the settings they stand for."""
        return frozenset(".".join(_OTHER_NAMES.get((name,), (name,))) for name in super().given)

    def __init__(self, **values: Any) -> None:
        kinds = kinds_of(RunConfig)
        foreign = list(foreign_settings(values, SETTINGS, _GROUPS, _fits))
        errors, refused = [], set()
        # A setting given under another program's name is checked together with the others.
        meant = {one.meant: one.value for one in foreign if one.meant and one.meant not in values}
        named = {one.meant: one for one in foreign if one.meant in meant}
        if str(values.get("fine_tune_type")) in METHODS and "method" not in values:
            meant["method"] = values["fine_tune_type"]
        for name, declared in SETTINGS.items():
            value, default = values.get(name, _MISSING), _default_of(declared)
            if name in meant:
                fits = meant[name] is not None and _fits(name, meant[name])
                value = meant[name] if fits else _MISSING
                refused |= set() if fits else {name}
            try:
                taken = default if value is _MISSING else _converted(name, value, declared, kinds[name])
            except SettingErrors as several:
                errors += [inner_hint(one, values, SETTINGS, _fits) for one in several.errors]
            except SettingError as error:
                error = SettingError(error.path, f"{error}{value_hint(name, value)}")
                errors.append(inner_hint(error, values, SETTINGS, _fits))
            else:
                object.__setattr__(self, name, taken)
                continue
            refused.add(name)
            object.__setattr__(self, name, default)
        problems = [*_merge_synonyms(self), *problems_of(self, refused, set(values))]
        errors += [problem for problem in problems if problem.path[0] not in named]
        for one in foreign:
            own = [problem for problem in problems if named.get(problem.path[0]) is one]
            errors.append(one.with_problems(own))
        if errors:
            order = {key: index for index, key in enumerate(map(str, values))}
            errors.sort(key=lambda error: order.get(error.path[0], len(order)))
            raise errors[0] if len(errors) == 1 else SettingErrors(errors)
        _resolve_overlaps(self)

    @classmethod
    def from_dict(cls, values: Mapping[Any, Any], document: Document | None = None) -> RunConfig:
        """From a flat dict of settings. Raises ConfigError with one line for each that is unknown or wrong.

        `document` is the text that they were read from: each line then begins with file, line and column.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"settings are a dict such as {{'iters': 100}}, not {shown(values)}.")
        document = document or Document({})
        problems: list[tuple[tuple[int, int] | None, str]] = list(document.problems)
        unnamed = [key for key in values if not isinstance(key, str)]
        problems += [(document.mark(str(key)), f"the name of a setting is text, not {shown(key)}.") for key in unnamed]
        try:
            config = cls(**{key: value for key, value in values.items() if isinstance(key, str)})
        except (SettingError, SettingErrors) as error:
            errors = error.errors if isinstance(error, SettingErrors) else (error,)
            problems += [(_mark_of(document, one.path), str(one)) for one in errors]
        if problems:
            problems.sort(key=lambda problem: problem[0] or _AT_THE_END)
            raise ConfigError(listed_problems([document.located(mark, message) for mark, message in problems]))
        return config

    @classmethod
    def from_yaml(cls, source: str | Path, **overrides: Any) -> RunConfig:
        """From YAML text or the path of a YAML file; `overrides` take precedence over the file.

        Raises ConfigError in one line for text that is not YAML, otherwise with one line for each mistake.
        """
        if not isinstance(source, str | Path):
            way = " A dict of settings is for `RunConfig.from_dict`." if isinstance(source, Mapping) else ""
            raise ConfigError(f"settings are read from YAML text or the path of a YAML file, not {shown(source)}.{way}")
        name = ""
        if isinstance(source, Path) or _looks_like_path(source):
            path = Path(source).expanduser()
            source, name = read_yaml_file(path), str(path)
        document = read_command(source, name) or load_mapping(source, name)
        marks = {path: mark for path, mark in document.marks.items() if path[0] not in overrides}
        given = {key: value for key, value in document.values.items() if key not in overrides}
        return cls.from_dict({**given, **overrides}, dataclasses.replace(document, marks=marks))

    def replace(self, **changes: Any) -> RunConfig:
        """A changed, checked copy with the same working folder. What was given before still counts as given."""
        kept = {**self.to_dict(), "rewards": self.rewards}
        other = changes.get("optimizer")
        if other not in (None, self.optimizer) and (has_no_decay(self.optimizer) or has_no_decay(other)):
            del kept["weight_decay"]  # the new optimizer has none, and the old one's is not a choice for the new one
        given = {name for name in self.given if name.partition(".")[0] not in changes} | names_given(changes)
        result: RunConfig = RunConfig.from_dict({**kept, **changes}).with_given(given).at(self.working_folder)
        return result

    def at(self, working_folder: Path | None) -> RunConfig:
        """A copy whose relative paths are relative to `working_folder`, wherever the process changes to."""
        other = copy.copy(self)
        object.__setattr__(other, "working_folder", working_folder)
        return other

    def located(self, name: str) -> str | None:
        """The setting `name`, made absolute if it is a relative path of something that exists."""
        return located(getattr(self, name), self.working_folder)

    def with_live(self, **changes: Any) -> RunConfig:
        """A copy with live settings changed, and settings that depend on them.

        A new `learning_rate` also becomes the start of the schedule's arguments; `iters` and `epochs` replace each
        other; without `sample_prompts` or `loss_spike` the settings about them return to their defaults.
        """
        further: dict[str, Any] = {}
        for name, other in (("iters", "epochs"), ("epochs", "iters")):
            if changes.get(name) is not None:
                further[other] = None
        for name, others in _SWITCHES.items():
            if name in changes and changes[name] is None:
                further |= {other: SETTINGS[other].default for other in others}
        if "learning_rate" in changes and self.lr_schedule.arguments:
            schedule = dataclasses.asdict(self.lr_schedule)
            arguments = [changes["learning_rate"], *self.lr_schedule.arguments[1:]]
            further["lr_schedule"] = {**schedule, "arguments": arguments}
        return self.replace(**{**further, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML or JSON; `from_dict` reads them back."""
        values = {name: getattr(self, name) for name in SETTINGS}
        for name, value in values.items():
            if name == "rewards" and value is not None:
                values[name] = [reward_name(reward) if callable(reward) else reward for reward in value]
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                values[name] = {key: _plain(item) for key, item in dataclasses.asdict(value).items()}
            else:
                values[name] = _plain(value)
        return values

    def to_yaml(self) -> str:
        """The settings that differ from their defaults, as the body of a `%%finetune` cell.

        Rows in memory are only mentioned.
        """
        changed = self.changed()
        unnamed = "" if "data" in self.described() else "# data: rows in memory; write the name of their variable\n"
        return unnamed + (yaml.safe_dump(changed, sort_keys=False, allow_unicode=True) if changed else "")

    def described(self) -> dict[str, Any]:
        """Every setting as a plain value, without the rows themselves if `data` is an object in memory."""
        return {name: value for name, value in self.to_dict().items() if name != "data" or _names_files(value)}

    def changed(self) -> dict[str, Any]:
        """The settings of `described` that differ from their defaults."""
        standard = _defaults()
        return {name: value for name, value in self.described().items() if value != standard[name]}


@functools.cache
def _defaults() -> Mapping[str, Any]:
    """Every setting at its default, as `to_dict` gives it."""
    return types.MappingProxyType(RunConfig().to_dict())


def located(text: str | None, working_folder: Path | None) -> str | None:
    """`text`, made absolute if it is a relative path of something that exists in `working_folder`."""
    if not text or working_folder is None:
        return text
    try:
        path = working_folder / Path(text).expanduser()
        return str(path) if path.exists() else text
    except (OSError, ValueError, RuntimeError):  # a template, or other text that cannot be a path
        return text


def reward_name(function: Any) -> str:
    """The name of a reward function: its own, that of the function in a functools.partial, or its class's."""
    inner = getattr(function, "func", function)
    return getattr(inner, "__name__", type(inner).__name__)


def _names_files(data: Any) -> bool:
    """Whether `data` is a name, or a mixture of names."""
    if isinstance(data, list):
        return all(isinstance(one, str) or (is_source(one) and isinstance(one["path"], str)) for one in data)
    return isinstance(data, str)


def _converted(name: str, value: Any, declared: dataclasses.Field[Any], kind: Any) -> Any:
    """The value of a setting as it is stored. Raises SettingError or SettingErrors."""
    if name == "data":
        return _data(value)
    if name == "rewards" and value is not None:
        return _rewards(value)
    return coerce(value, declared, kind)


def _data(value: Any) -> Any:
    """`data` with names as text and weights as numbers; objects with rows are returned unchanged."""
    if isinstance(value, str | PurePath):
        if not str(value).strip():
            raise SettingError(("data",), "`data` is empty. It takes a name, or rows.")
        return plain(value, ("data",))
    if value is None or isinstance(value, bool | int | float):
        raise SettingError(("data",), f"`data` cannot be {shown(value)}. It takes a name, or rows.")
    if not is_mixture(value):
        return value
    for index, one in enumerate(value):
        if (problem := source_problem(one, index + 1)) is not None:
            key, message = problem
            raise SettingError(("data", str(index), *([key] if key else [])), message)
    sources: list[Any] = []
    for index, one in enumerate(value):
        path = ("data", str(index))
        if not isinstance(one, Mapping):
            sources.append(plain(one, path))
            continue
        rows = one["path"]
        rows = plain(rows, (*path, "path")) if isinstance(rows, str | PurePath) else rows
        sources.append({"path": rows, **plain({key: one[key] for key in one if key != "path"}, path)})
    return sources


def _rewards(value: Any) -> Any:
    """`rewards` as a list or tuple of names, functions and mappings of one name to plain values."""
    entries = value if isinstance(value, list | tuple) else (value,)
    for entry in entries:
        named = isinstance(entry, str) or (isinstance(entry, Mapping) and len(entry) == 1)
        if not named and not callable(entry):
            raise SettingError(
                ("rewards",),
                f"`rewards` cannot hold {shown(entry)}. It takes names, functions, and mappings with one key.",
            )
    return type(entries)(
        entry if callable(entry) else plain(entry, ("rewards", str(index))) for index, entry in enumerate(entries)
    )


def _fits(name: str, value: Any) -> bool:
    """Whether the setting `name` takes `value`."""
    try:
        _converted(name, value, SETTINGS[name], kinds_of(RunConfig)[name])
    except ConfigError:
        return False
    return True


def unknown_settings(values: Mapping[str, Any]) -> list[SettingError]:
    """One error for each name in `values` that is not a setting."""
    return [one.error for one in foreign_settings(values, SETTINGS, _GROUPS, _fits)]


def _default_of(declared: dataclasses.Field[Any]) -> Any:
    if declared.default_factory is not dataclasses.MISSING:
        return declared.default_factory()
    return declared.default


def _mark_of(document: Document, path: tuple[str, ...]) -> tuple[int, int] | None:
    """Where a setting is in the text, under either of its names."""
    return document.mark(*path) or document.mark(*_OTHER_NAMES.get(path, ()))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _looks_like_path(source: str) -> bool:
    return "\n" not in source and ":" not in source[2:] and source.strip().endswith((".yaml", ".yml"))


def _merge_synonyms(config: RunConfig) -> Iterator[SettingError]:
    """Fold the synonyms `target_modules` and `warmup` into the settings they stand for."""
    if config.target_modules is not None:
        keys = config.lora_parameters.keys
        if keys is not None and keys != config.target_modules:
            yield SettingError(
                ("target_modules",), "`target_modules` and `lora_parameters.keys` differ. Give one of them."
            )
        merged = dataclasses.replace(config.lora_parameters, keys=config.target_modules)
        object.__setattr__(config, "lora_parameters", merged)
        object.__setattr__(config, "target_modules", None)
    if config.warmup is not None:
        if config.lr_schedule.warmup not in (None, config.warmup):
            yield SettingError(("warmup",), "`warmup` and `lr_schedule.warmup` differ. Give one of them.")
        object.__setattr__(config, "lr_schedule", dataclasses.replace(config.lr_schedule, warmup=config.warmup))
        object.__setattr__(config, "warmup", None)


def _resolve_overlaps(config: RunConfig) -> None:
    """Resolve overlapping settings into one learning rate, one weight decay and the arguments of one optimizer."""
    if has_no_decay(config.optimizer):
        object.__setattr__(config, "weight_decay", 0.0)
    if config.lr_schedule.arguments is not None:
        object.__setattr__(config, "learning_rate", config.lr_schedule.arguments[0])
    arguments = dict(arguments_of(config.optimizer, config.optimizer_config))
    if "weight_decay" in arguments:
        object.__setattr__(config, "weight_decay", float(arguments.pop("weight_decay")))
    object.__setattr__(config, "optimizer_config", arguments)


SETTINGS: dict[str, dataclasses.Field[Any]] = {declared.name: declared for declared in fields(RunConfig)}
LIVE_SETTINGS: tuple[str, ...] = tuple(name for name, declared in SETTINGS.items() if declared.metadata["live"])
RunConfig.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_default_of(declared))
        for name, declared in SETTINGS.items()
    ]
)
LENGTHS = ("iters", "epochs")  # a run has one of them
PATHS = ("data", "model", "resume_adapter_file", "reference_model", "reference_adapter", "chat_template")
# Live settings that switch something off with null, and the settings that depend on them.
_SWITCHES = {"sample_prompts": ("sample_every", "sample_tokens"), "loss_spike": ("spike_patience",)}
_MISSING = object()
_AT_THE_END = (2**31, 0)
_OTHER_NAMES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("warmup",): ("lr_schedule", "warmup"),
    ("target_modules",): ("lora_parameters", "keys"),
}
_GROUPS = {
    "lora_parameters": tuple(declared.name for declared in fields(LoraParameters)),
    "lr_schedule": tuple(declared.name for declared in fields(LrSchedule)),
}
