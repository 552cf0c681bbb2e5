"""What people bring from other programs: files and commands of their documents, and their words."""

from __future__ import annotations

COMMAND = (
    "is a command, not a setting. `%finetune import` translates it; or write each option as a line: `iters: 600` for "
    "`--iters 600`."
)
TEST_COMMAND = f"{COMMAND} To test an adapter, name it in `resume_adapter_file` and use `%finetune eval test`."
TRAIN = "unknown setting `train`. A run always trains. Remove it."

# (text, lines): settings and commands as the documents of other programs have them.
TEXTS = {
    "LoRA-Studio, sft": (
        """train_mode: sft
model: mlx-community/Meta-Llama-3-8B-Instruct-4bit
dataset:
  - mlx-community/JOSIE-v2-Instruct-5K
adapter:
  type: lora
  rank: 16
  alpha: 32
  dropout: 0.05
  target_modules: [q_proj, k_proj, v_proj, o_proj]
optim:
  learning_rate: 2.0e-4
  schedule: cosine
  warmup_steps: 20
  weight_decay: 0.0
  grad_accumulation_steps: 8
train:
  max_steps: 1000
  batch_size: 2
  max_seq_len: 2048
  save_every: 200
output:
  adapter_path: ~/Library/Application Support/MLXLoRAStudio/runs/<id>/adapter
""",
        [
            "line 1, column 1: unknown setting `train_mode`. Here it is `method`: write `method: sft`.",
            "line 3, column 1: unknown setting `dataset`. Here it is `data`: write "
            '`data: ["mlx-community/JOSIE-v2-Instruct-5K"]`.',
            "line 6, column 3: unknown setting `adapter.type`. Here it is `fine_tune_type`: write "
            "`fine_tune_type: lora`.",
            "line 7, column 3: unknown setting `adapter.rank`. It belongs inside: `lora_parameters: {rank: ...}`, here "
            "`lora_parameters: {rank: 16}`.",
            "line 8, column 3: unknown setting `adapter.alpha`. Here it is `lora_parameters: {scale: 2}` "
            "(alpha / rank).",
            "line 9, column 3: unknown setting `adapter.dropout`. It belongs inside: "
            "`lora_parameters: {dropout: ...}`, here `lora_parameters: {dropout: 0.05}`.",
            "line 10, column 3: unknown setting `adapter.target_modules`. Here it is `target_modules`: write "
            '`target_modules: ["q_proj", "k_proj", "v_proj", "o_proj"]`.',
            "line 12, column 3: unknown setting `optim.learning_rate`. Here it is `learning_rate`: write "
            "`learning_rate: 0.0002`.",
            "line 13, column 3: unknown setting `optim.schedule`. Here it is `lr_schedule`: write "
            "`lr_schedule: cosine`.",
            "line 14, column 3: unknown setting `optim.warmup_steps`. Here it is `warmup`: write `warmup: 20`.",
            "line 15, column 3: unknown setting `optim.weight_decay`. Here it is `weight_decay`: write "
            "`weight_decay: 0`.",
            "line 16, column 3: unknown setting `optim.grad_accumulation_steps`. Here it is "
            "`grad_accumulation_steps`: write `grad_accumulation_steps: 8`.",
            "line 18, column 3: unknown setting `train.max_steps`. Here it is `iters`: write `iters: 1000`.",
            "line 19, column 3: unknown setting `train.batch_size`. Here it is `batch_size`: write `batch_size: 2`.",
            "line 20, column 3: unknown setting `train.max_seq_len`. Here it is `max_seq_length`: write "
            "`max_seq_length: 2048`.",
            "line 21, column 3: unknown setting `train.save_every`. Here it is `save_every`: write `save_every: 200`.",
            "line 23, column 3: unknown setting `output.adapter_path`. Here it is `adapter_path`: write "
            '`adapter_path: "~/Library/Application Support/MLXLoRAStudio/runs/<id>/adapter"`.',
        ],
    ),
    "mlx-bun, the body of a request": (
        """{
  "model_dir": "/path/to/snapshot",
  "data_dir": "/path/to/dataset",
  "adapter_path": "/path/to/output-adapter",
  "method": "sft",
  "rank": 16, "iters": 300, "learning_rate": 2e-4, "max_seq_length": 2048
}
""",
        [
            "line 2, column 3: unknown setting `model_dir`. Here it is `model`: write `model: /path/to/snapshot`.",
            "line 3, column 3: unknown setting `data_dir`. Here it is `data`: write `data: /path/to/dataset`.",
            "line 6, column 3: unknown setting `rank`. It belongs inside: `lora_parameters: {rank: ...}`, here "
            "`lora_parameters: {rank: 16}`.",
        ],
    ),
    "mlx-lm, basic": (
        """mlx_lm.lora --model mlx-community/Llama-3.2-3B-Instruct-4bit \\
    --train \\
    --data ./data \\
    --iters 1000
""",
        [f"line 1, column 1: `mlx_lm.lora` {COMMAND}", f"line 2, column 5: {TRAIN}"],
    ),
    "mlx-lm, with all options": (
        """mlx_lm.lora --model mlx-community/Llama-3.2-3B-Instruct-4bit \\
    --train \\
    --data ./data \\
    --iters 1000 \\
    --batch-size 4 \\
    --lora-rank 8 \\
    --lora-layers 16 \\
    --learning-rate 1e-5 \\
    --adapter-path ./my-adapters \\
    --save-every 100 \\
    --val-batches 25
""",
        [
            f"line 1, column 1: `mlx_lm.lora` {COMMAND}",
            f"line 2, column 5: {TRAIN}",
            "line 6, column 5: unknown setting `lora_rank`. It belongs inside: `lora_parameters: {rank: ...}`, here "
            "`lora_parameters: {rank: 8}`.",
            "line 7, column 5: unknown setting `lora_layers`. Here it is `num_layers`: write `num_layers: 16`.",
        ],
    ),
    "mlx-lm, resume": (
        """mlx_lm.lora --model mlx-community/Llama-3.2-3B-Instruct-4bit \\
    --train \\
    --data ./data \\
    --resume-adapter-file ./my-adapters/adapters.safetensors \\
    --iters 500  # Additional iterations
""",
        [f"line 1, column 1: `mlx_lm.lora` {COMMAND}", f"line 2, column 5: {TRAIN}"],
    ),
    "mlx-lm, QLoRA": (
        """# Using quantized model = QLoRA
mlx_lm.lora --model mlx-community/Llama-3.2-3B-Instruct-4bit \\
    --train \\
    --data ./data \\
    --iters 1000
""",
        [f"line 2, column 1: `mlx_lm.lora` {COMMAND}", f"line 3, column 5: {TRAIN}"],
    ),
    "mlx-lm, full": (
        """mlx_lm.lora --model mlx-community/Llama-3.2-1B-Instruct \\
    --train \\
    --data ./data \\
    --fine-tune-type full \\
    --iters 1000 \\
    --batch-size 1 \\
    --learning-rate 1e-6
""",
        [f"line 1, column 1: `mlx_lm.lora` {COMMAND}", f"line 2, column 5: {TRAIN}"],
    ),
    "mlx-lm, test": (
        """mlx_lm.lora --model mlx-community/Llama-3.2-3B-Instruct-4bit \\
    --adapter-path ./adapters \\
    --test \\
    --data ./data
""",
        [f"line 1, column 1: `mlx_lm.lora` {TEST_COMMAND}"],
    ),
    "mlx-lm, generate": (
        """mlx_lm.generate --model mlx-community/Llama-3.2-3B-Instruct-4bit \\
    --adapter-path ./adapters \\
    --prompt "Your test prompt"
""",
        ['line 1, column 1: `mlx_lm.generate` is a command, not a setting: ask a run with `%finetune generate "..."`.'],
    ),
    "mlx-lm, fuse": (
        """mlx_lm.fuse --model mlx-community/Llama-3.2-3B-Instruct-4bit \\
    --adapter-path ./adapters \\
    --export-gguf \\
    --gguf-path ./model.gguf
""",
        [
            "line 1, column 1: `mlx_lm.fuse` is a command, not a setting: `%finetune fuse FOLDER` writes the model of "
            "a run, `%finetune gguf FOLDER` its GGUF file."
        ],
    ),
    "mlx-lm, gradient checkpointing": (
        "# Enable gradient checkpointing\nmlx_lm.lora --model ... --train --grad-checkpoint\n",
        [
            f"line 2, column 1: `mlx_lm.lora` {COMMAND}",
            f"line 2, column 25: {TRAIN}",
        ],
    ),
    "mlx-lm, lower rank": (
        "# Reduce LoRA rank\nmlx_lm.lora --model ... --train --lora-rank 4\n",
        [
            f"line 2, column 1: `mlx_lm.lora` {COMMAND}",
            f"line 2, column 25: {TRAIN}",
            "line 2, column 33: unknown setting `lora_rank`. It belongs inside: `lora_parameters: {rank: ...}`, here "
            "`lora_parameters: {rank: 4}`.",
        ],
    ),
    "mlx-lm-lora, a file": (
        "mlx_lm_lora.train --config /path/to/config.yaml\n",
        [
            f"line 1, column 1: `mlx_lm_lora.train` {COMMAND}",
            "line 1, column 19: unknown setting `config`. Write the lines of that file here, or use "
            "`mlx-nb train FILE`.",
        ],
    ),
    "mlx-lm-lora, sft with a masked prompt": (
        """mlx_lm_lora.train \\
    --model <path_to_model> \\
    --train \\
    --data <path_to_data> \\
    --use-chat-template True \\
    --mask-prompt
""",
        [
            f"line 1, column 1: `mlx_lm_lora.train` {COMMAND}",
            f"line 3, column 5: {TRAIN}",
            "line 5, column 5: unknown setting `use_chat_template`. Conversations always get the chat template. For "
            "strings it is `prompt_format: chat` or `prompt_format: raw`.",
            "line 6, column 5: unknown setting `mask_prompt`. Here it is `loss_on: assistant` (the default) or "
            "`loss_on: all`.",
        ],
    ),
    "mlx-lm-lora, orpo": (
        """mlx_lm_lora.train \\
 --model <path_to_model> \\
 --train \\
 --train-mode orpo \\
 --data <path_to_data> \\
 --beta 0.1
""",
        [
            f"line 1, column 1: `mlx_lm_lora.train` {COMMAND}",
            f"line 3, column 2: {TRAIN}",
            "line 4, column 2: unknown setting `train_mode`. Here it is `method`: write `method: orpo`.",
        ],
    ),
    "mlx-lm-lora, dpo": (
        """mlx_lm.lora \\
    --model <path_to_model> \\
    --train \\
    --train-mode dpo \\
    --data <path_to_data> \\
    --beta 0.1
""",
        [
            f"line 1, column 1: `mlx_lm.lora` {COMMAND}",
            f"line 3, column 5: {TRAIN}",
            "line 4, column 5: unknown setting `train_mode`. Here it is `method`: write `method: dpo`.",
        ],
    ),
    "mlx-lm-lora, grpo with full options": (
        """mlx_lm.lora \\
    --model <path_to_model> \\
    --train \\
    --data <path_to_data> \\
    --fine-tune-type grpo \\
    --group-size 4 \\
    --beta 0.1 \\
    --epsilon 1e-4 \\
    --max-completion-length 512 \\
    --reference-model-path <optional_path_to_reference_model> \\
    --temperature 1.0 \\
    --reward-weights 1.0 1.0 \\
    --use-chat-template False \\
    --use-prompt False \\
    --batch-size 4 \\
    --learning-rate 1e-5 \\
    --num-epochs 3
""",
        [
            f"line 1, column 1: `mlx_lm.lora` {COMMAND}",
            f"line 3, column 5: {TRAIN}",
            "line 5, column 5: `fine_tune_type` cannot be 'grpo'. Choose one of: lora, dora, full. grpo is a method: "
            "write `method: grpo`.",
            "line 8, column 5: `epsilon` has no effect with `updates_per_rollout: 1`, where every ratio is 1. Raise "
            "that, or remove `epsilon`.",
            "line 10, column 5: unknown setting `reference_model_path`. Here it is `reference_model`: write "
            '`reference_model: "<optional_path_to_reference_model>"`.',
            "line 13, column 5: unknown setting `use_chat_template`. Conversations always get the chat template. For "
            "strings it is `prompt_format: chat` or `prompt_format: raw`.",
            "line 14, column 5: unknown setting `use_prompt`. mlx_nb has no switch for the prompt yet. Remove it.",
            "line 17, column 5: unknown setting `num_epochs`. Here it is `epochs`: write `epochs: 3`.",
            "`method: grpo` needs `rewards`: a list of functions in the notebook or built-in rewards, for instance "
            "[number_match].",
        ],
    ),
    "mlx-lm-lora, test": (
        """mlx_lm_lora.train \\
    --model <path_to_model> \\
    --adapter-path <path_to_adapters> \\
    --data <path_to_data> \\
    --test
""",
        [f"line 1, column 1: `mlx_lm_lora.train` {TEST_COMMAND}"],
    ),
    "mlx-lm, its example of a configuration": (
        """model: mlx_model
train: true
fine_tune_type: lora
optimizer: adamw
data: /path/to/training/data
seed: 0
num_layers: 16
batch_size: 4
iters: 1000
val_batches: 25
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 200
resume_adapter_file: null
adapter_path: adapters
save_every: 100
test: false
test_batches: 100
max_seq_length: 2048
grad_checkpoint: false
lora_parameters:
  keys: [self_attn.q_proj, self_attn.v_proj]
  rank: 8
  scale: 20.0
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 100
  warmup_init: 1e-7
  arguments: [1e-5, 1000, 1e-7]
""",
        [
            f"line 2, column 1: {TRAIN}",
            "line 12, column 1: unknown setting `steps_per_report`. Every update is reported. Remove it.",
            "line 18, column 1: `test_batches` has no effect without `test: true`.",
        ],
    ),
    "TRL and PEFT": (
        """model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: trl-lib/Capybara
num_train_epochs: 1
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
optim: adamw_torch
lr_scheduler_type: cosine
warmup_ratio: 0.1
max_grad_norm: 1.0
logging_steps: 25
eval_strategy: steps
eval_steps: 100
lora_r: 32
lora_alpha: 16
report_to: wandb
output_dir: out
""",
        [
            "line 1, column 1: unknown setting `model_name_or_path`. Here it is `model`: write "
            "`model: Qwen/Qwen2.5-0.5B`.",
            "line 2, column 1: unknown setting `dataset_name`. Here it is `data`: write `data: trl-lib/Capybara`.",
            "line 3, column 1: unknown setting `num_train_epochs`. Here it is `epochs`: write `epochs: 1`.",
            "line 4, column 1: unknown setting `per_device_train_batch_size`. Here it is `batch_size`: write "
            "`batch_size: 2`.",
            "line 5, column 1: unknown setting `gradient_accumulation_steps`. Here it is `grad_accumulation_steps`: "
            "write `grad_accumulation_steps: 8`.",
            "line 6, column 1: unknown setting `gradient_checkpointing`. Here it is `grad_checkpoint: true`.",
            "line 7, column 1: unknown setting `optim`. Here it is `optimizer`: write `optimizer: adamw`.",
            "line 8, column 1: unknown setting `lr_scheduler_type`. Here it is `lr_schedule`: write "
            "`lr_schedule: cosine`.",
            "line 9, column 1: unknown setting `warmup_ratio`. Here it is `warmup`, counted in updates. null = 5% of "
            "iters, at most 100.",
            "line 10, column 1: unknown setting `max_grad_norm`. Here it is `grad_clip`: write `grad_clip: 1`.",
            "line 11, column 1: unknown setting `logging_steps`. Every update is reported. Remove it.",
            "line 12, column 1: unknown setting `eval_strategy`. Here it is `steps_per_eval: N`, or -1 for never.",
            "line 13, column 1: unknown setting `eval_steps`. Here it is `steps_per_eval`: write "
            "`steps_per_eval: 100`.",
            "line 14, column 1: unknown setting `lora_r`. It belongs inside: `lora_parameters: {rank: ...}`, here "
            "`lora_parameters: {rank: 32}`.",
            "line 15, column 1: unknown setting `lora_alpha`. Here it is `lora_parameters: {scale: 0.5}` "
            "(alpha / rank).",
            "line 17, column 1: unknown setting `output_dir`. Here it is `adapter_path`: write `adapter_path: out`.",
        ],
    ),
    "axolotl": (
        """base_model: NousResearch/Llama-3.2-1B
adapter: qlora
load_in_4bit: true
datasets:
  - path: mhenrichsen/alpaca_2k_test
    type: alpaca
sequence_len: 2048
sample_packing: true
micro_batch_size: 2
lora_target_linear: true
val_set_size: 0.05
train_on_inputs: false
bf16: auto
rl: dpo
""",
        [
            "line 1, column 1: unknown setting `base_model`. Here it is `model`: write "
            "`model: NousResearch/Llama-3.2-1B`.",
            "line 2, column 1: unknown setting `adapter`. Here it is `fine_tune_type: lora`, or `resume_adapter_file` "
            "for the path of one to start from.",
            "line 3, column 1: unknown setting `load_in_4bit`. Here it is `load_in_bits: 4`.",
            "line 4, column 1: unknown setting `datasets`. Here it is `data`: a name, or a list of "
            "`{path: ..., weight: ...}` to mix.",
            "line 7, column 1: unknown setting `sequence_len`. Here it is `max_seq_length`: write "
            "`max_seq_length: 2048`.",
            "line 8, column 1: unknown setting `sample_packing`. Here it is `packing`: write `packing: true`.",
            "line 9, column 1: unknown setting `micro_batch_size`. Here it is `batch_size`: write `batch_size: 2`.",
            "line 10, column 1: unknown setting `lora_target_linear`. Every linear layer is adapted unless "
            "`target_modules` says others. Remove it.",
            "line 12, column 1: unknown setting `train_on_inputs`. Here it is `loss_on: all` (true) or "
            "`loss_on: assistant` (false, the default).",
            "line 13, column 1: unknown setting `bf16`. Weights keep the type that the model has. Remove it.",
            "line 14, column 1: unknown setting `rl`. Here it is `method`: write `method: dpo`.",
        ],
    ),
}

# The settings of other programs, by name, as they are in the code of each.
NEIGHBORS = {
    "mlx-lm": "model train fine_tune_type optimizer optimizer_config data seed num_layers batch_size iters val_batches "
    "learning_rate steps_per_report steps_per_eval resume_adapter_file adapter_path save_every test test_batches "
    "max_seq_length grad_checkpoint grad_accumulation_steps clear_cache_threshold lr_schedule lora_parameters "
    "mask_prompt report_to project_name hf_dataset prompt_feature completion_feature text_feature chat_feature "
    "lora_layers lora_rank lora_alpha lora_dropout warmup config",
    "mlx-lm-lora": "gradient_accumulation_steps train_type train_mode num_layers epochs scale fuse load_in_4bits "
    "load_in_6bits load_in_8bits load_in_mxfp4 efficient_long_context seq_step_size beta dpo_cpo_loss_type delta "
    "reference_model_path group_size epsilon epsilon_high max_completion_length temperature reward_weights "
    "reward_functions reward_functions_file grpo_loss_type importance_sampling_level qat_enable qat_bits "
    "qat_group_size qat_start_step qat_interval lm_studio_name system_feature chosen_feature rejected_feature "
    "answer_feature preference_score_feature use_chat_template use_prompt messages_feature judge",
    "mlx-bun": "model_dir data_dir adapter_path method rank scale rank_scaling target_modules num_layers iters "
    "learning_rate max_seq_length batch_size grad_accumulation_steps seed steps_per_report steps_per_eval weight_decay "
    "grad_checkpoint segment_size save_checkpoints dpo_beta dpo_warmup_iters dpo_lr_schedule",
    "TRL, PEFT, Unsloth, axolotl": "per_device_train_batch_size num_train_epochs max_steps lr_scheduler_type "
    "warmup_steps warmup_ratio weight_decay max_grad_norm optim adam_beta1 adam_beta2 adam_epsilon logging_steps "
    "eval_steps eval_strategy save_steps save_strategy save_total_limit output_dir seed bf16 fp16 "
    "gradient_checkpointing packing dataset_text_field max_length max_prompt_length completion_only_loss "
    "assistant_only_loss loss_type beta label_smoothing num_generations num_iterations reward_funcs reward_model "
    "scale_rewards ref_model r lora_r lora_alpha lora_dropout target_modules modules_to_save use_rslora use_dora bias "
    "init_lora_weights layers_to_transform rank_pattern alpha_pattern task_type peft_type load_in_4bit load_in_8bit "
    "neftune_noise_alpha push_to_hub hub_model_id run_name resume_from_checkpoint report_to random_state "
    "full_finetuning use_gradient_checkpointing base_model datasets adapter sequence_len sample_packing "
    "micro_batch_size train_on_inputs lora_target_linear wandb_project rl trust_remote_code deepspeed fsdp",
    "LLaMA-Factory": "finetuning_type stage lora_target val_size pref_beta pref_loss pref_ftx quantization_bit "
    "kto_chosen_weight kto_rejected_weight dpo_label_smoothing mask_history neat_packing template cutoff_len",
    "axolotl and TRL, further": "rl_beta roles_to_train lora_modules_to_save excess_length_strategy "
    "lr_scheduler_kwargs truncation_mode steps_per_generation",
    "LoRA-Studio": "train_mode model dataset adapter optim train output qat_enable",
}
