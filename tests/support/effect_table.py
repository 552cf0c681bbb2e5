"""For each setting that changes a run: another value of it, and where the difference appears."""

from __future__ import annotations

from tiny import tiny_labels, tiny_pairs, tiny_prompts, tiny_rows

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
    "leave_out": (SFT, [None, [0, 1, 2]]),
    "down_weight": (PAIRS, [None, [0, 1, 2]]),
    "down_weight_factor": ({**SFT, "down_weight": [0, 1, 2]}, [0.5, 0.1]),
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
    "loraplus_lr_ratio": (SFT, [None, 4.0]),
    "lr_schedule.name": (SFT, ["cosine", "linear"]),
    "lr_schedule.arguments": ({**SFT, "learning_rate": None}, [[1e-2, 10], [1e-2, 2]]),
    "lr_schedule.warmup": (SFT, [None, 2]),
    "lr_schedule.warmup_init": ({**SFT, "lr_schedule": {"warmup": 2}}, [0.0, 5e-3]),
    "warmup": (SFT, [None, 2]),
    "schedule_iters": (SFT, [None, 2]),
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
    "metrics": (SFT, [None, ["exact_match"]]),
    "metric_tokens": ({**SFT, "metrics": ["shortness"]}, [4, 6]),
    "best_by": ({**SFT, "metrics": ["redness"], "metric_tokens": 6, "steps_per_eval": 1}, [None, "redness"]),
    "test": (SPLIT, [False, True]),
    "test_batches": ({**SPLIT, "test": True}, [-1, 1]),
    "sample_prompts": (SFT, [None, ["say red"]]),
    "sample_every": ({**SFT, "sample_prompts": ["say red"], "steps_per_eval": -1}, [None, 1]),
    "sample_tokens": ({**SFT, "sample_prompts": ["say red"]}, [2, 5]),
    "save_every": (SFT, [100, 1]),
    "autosave_minutes": (SFT, [10.0, 1e-9]),
    "keep": ({**SFT, "save_every": 1, "iters": 4}, [3, 1]),
    "keep_previous": (SFT, [2, 1]),
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


# Settings whose effect needs a hub dataset, and is refused below out of it; or is of memory or time alone, and tried
# where that is measured: tests/model/test_layer_checkpoints.py, tests/model/test_token_chunks.py,
# tests/train/test_packed_runs.py, tests/run/test_memory_limit.py.
OF_MEMORY = ("grad_checkpoint", "segment_size", "efficient_long_context", "seq_step_size", "packing", "memory_limit")
# tests/export/test_trackers.py
OF_REPORTS = ("report_to", "project_name")
ELSEWHERE = ("subset", *OF_MEMORY, *OF_REPORTS)
