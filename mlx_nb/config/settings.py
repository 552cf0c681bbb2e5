"""Every setting of a run, declared once with its default, bounds and help.

The declaration is the source of the YAML keys of a `%%finetune` cell, validation, `%%finetune?` and the reference page
in docs. Keys are those of mlx-lm's and mlx-lm-lora's YAML where they have one; `iters` counts optimizer updates. A new
setting is one field of DeclaredSettings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mlx_nb.config.fields import Settings, setting
from mlx_nb.config.optimizers import OptimizerName


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
class DeclaredSettings(Settings):
    """The fields of RunConfig, in the order of the reference page."""

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
            "help": "Options of a user-defined method: keyword-only parameters of its loss function.",
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
        "A variable of the notebook, a folder with train/valid/test files, a jsonl, json, parquet or csv file, or a "
        "hub id. A variable is a list of dicts, a DataFrame or a Dataset. A list of {path, weight} mixes several.",
        group="rows",
    )
    subset: str | None = setting(None, "Subset (configuration name) of a hub dataset.", group="rows")
    train_split: str | None = setting(None, "Name of the training split. null = train.", group="rows")
    valid_split: str | None = setting(
        None, "Name of the validation split. null = valid, validation, val, dev or test file.", group="rows"
    )
    test_split: str | None = setting(None, "Name of the test split. null = test.", group="rows")
    leave_out: tuple[int, ...] | None = setting(
        None, "Numbers of the training rows to leave out, as shown in the row views. null = none.", group="rows"
    )
    down_weight: tuple[int, ...] | None = setting(
        None,
        "Numbers of the training rows to give less weight, as shown in the row views. null = none.",
        group="rows",
        only_for=("tokens", "pairs"),
    )
    down_weight_factor: float = setting(
        0.5,
        "Weight of the rows in down_weight; other rows have weight 1.",
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
            "help": "Role names in your data and what they mean, such as {speaker_a: user, speaker_b: assistant}.",
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
    loraplus_lr_ratio: float | None = setting(
        None,
        "LoRA+: the B matrices of the adapter learn at this many times the learning rate, often 16. null = as the "
        "others.",
        group="optimizer",
        above=0,
    )
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
        "Report an update whose loss is this many deviations (robust, at least 0.1 nats each) above the median of the "
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
        "Length of lr_schedule in updates; later updates keep its last rate. null = the whole run: if the run gets "
        "longer, the schedule is stretched.",
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
        "Keep only the input of each layer, and compute the rest again for the gradient: the same numbers in a "
        "fraction of the memory, but in more time.",
        group="training",
    )
    segment_size: int = setting(
        0,
        "Keep only what goes into every N-th layer, and compute N layers again together for the gradient. With "
        "grad_checkpoint each of them is then computed again by itself. 0 = off.",
        group="training",
        at_least=0,
    )
    efficient_long_context: bool = setting(
        False,
        "For long rows: compute MLPs and experts seq_step_size tokens at a time, and again for the gradient: the same "
        "numbers to rounding in less memory. Attention sees the whole row.",
        group="training",
    )
    seq_step_size: int = setting(
        512, "Tokens that efficient_long_context computes at a time.", group="training", at_least=1
    )
    packing: Literal["auto", True, False] = setting(
        "auto",
        "Compute the rows of a batch as one long row, without padding, and a common beginning only once: the same "
        "numbers to rounding. auto = where that saves enough.",
        group="training",
    )
    memory_limit: str = setting(
        "auto",
        "Memory that the run may use, such as 12GB: a run whose plan exceeds it is refused before the model is loaded, "
        "and an update before it is computed. auto = what is available, off = no check.",
        group="training",
        live=True,
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
    metrics: Any = setting(
        None,
        "Functions that judge the model's greedy answers to the validation and test rows, by name: exact_match, "
        "{regex: ...}, or one in the notebook.",
        group="validation",
    )
    metric_tokens: int = setting(128, "Longest answer in tokens that metrics judge.", group="validation", at_least=1)
    best_by: str | None = setting(
        None,
        "What decides the best adapter and early stopping: one of metrics, of which higher is better, or a metric of "
        "the method. null = the validation loss.",
        group="validation",
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
        100,
        "Save the adapter and an exact checkpoint every N updates. -1 = never; both are still written at the end.",
        group="saving",
        at_least=-1,
        live=True,
    )
    autosave_minutes: float | None = setting(
        10.0,
        "Write an exact checkpoint when the last one is this old, and sooner where writing takes under 1% of the "
        "time since. null = none by time.",
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
    report_to: tuple[str, ...] | None = setting(
        None,
        "Send losses and metrics to wandb, trackio, tensorboard, mlflow or swanlab, one or several, whose package is "
        "installed. null = none.",
        group="reports",
    )
    project_name: str | None = setting(
        None, "Project or experiment under which the run is reported there. null = mlx_nb.", group="reports"
    )
