"""TRL's keys: which of them a run obeys, which it refuses and why, and the values that make sense.

Every field of `SFTConfig` and `ModelConfig` is in exactly one of three lists. A field that a newer TRL or transformers
adds is in none, and a recipe that sets it is an error, because nobody has checked yet that a run obeys it.
"""

from collections.abc import Callable
from typing import Any

from annotated_types import Ge, Gt, Interval
from pydantic import AfterValidator

Recipe = Any  # `recipe.Recipe`, whose file imports this one

# --------------------------------------------------------------------------------------------- the three lists

_NO_LOGITS = "an evaluation computes the loss and generates answers; no logits are gathered"
_NO_UPLOAD = "a run folder contains examples and predictions, so emogen uploads nothing; `hf upload` does"
_NO_LIGER = "emogen does not support Liger's kernels, which its shared prefixes were not checked with"
_NOT_PACKED = "rows share their instruction instead (`shared_prefix`)"
_COMMANDS = "the command decides: `emogen train`, `emogen predict`, `emogen score`"

# Fields that have no effect in a run, or that emogen decides itself. A recipe that sets one would expect an effect.
SETTLED = {
    "packing": _NOT_PACKED,
    "packing_strategy": _NOT_PACKED,
    "eval_packing": _NOT_PACKED,
    "padding_free": _NOT_PACKED,
    "pad_to_multiple_of": "rows that share their instruction are not padded",
    "pad_token": "the padding token of the tokenizer is used",
    "assistant_only_loss": "the loss is always computed on the answer",
    "completion_only_loss": "the loss is always computed on the answer",
    "router_aux_loss_coef": "the loss is that of the answer alone; routers get none of their own",
    "dataset_text_field": "use `text_column`",
    "dataset_kwargs": "emogen encodes the rows itself",
    "dataset_num_proc": "emogen encodes the rows itself, in one process",
    "truncation_mode": "a text that is too long is shortened inside the prompt",
    "chat_template_path": "the chat template of the model is used, or a plain one for a base model",
    "eos_token": "the chat template determines the end of an answer",
    "label_names": "use `labels` to name the label set",
    "length_column_name": "the length of a row is the number of its tokens",
    "remove_unused_columns": "emogen encodes the rows itself",
    "model_init_kwargs": "use the keys of ModelConfig, such as `dtype` and `attn_implementation`",
    "lora_task_type": "it follows from `answer`",
    "hub_token": "a recipe is no place for secrets, as run folders keep it; set HF_TOKEN, or run `hf auth login`",
    "push_to_hub": _NO_UPLOAD,
    "hub_model_id": _NO_UPLOAD,
    "hub_strategy": _NO_UPLOAD,
    "hub_always_push": _NO_UPLOAD,
    "hub_revision": _NO_UPLOAD,
    "prediction_loss_only": _NO_LOGITS,
    "eval_do_concat_batches": _NO_LOGITS,
    "eval_use_gather_object": _NO_LOGITS,
    "eval_accumulation_steps": _NO_LOGITS,
    "include_for_metrics": _NO_LOGITS,
    "batch_eval_metrics": _NO_LOGITS,
    "bf16_full_eval": "evaluations compute in the precision of the training (`bf16`)",
    "fp16_full_eval": "evaluations compute in the precision of the training (`fp16`)",
    "use_liger_kernel": _NO_LIGER,
    "liger_kernel_config": _NO_LIGER,
    "use_cache": "training keeps no keys and values, and generation always does",
    "accelerator_config": "emogen makes the batches itself; use `accelerate launch --config_file`",
    "parallelism_config": "use `accelerate launch --config_file`",
    "restore_callback_states_from_checkpoint": "a resumed run restores everything that it needs",
    "local_rank": "`accelerate launch` sets it",
    "do_train": _COMMANDS,
    "do_eval": "use `eval_strategy`",
    "do_predict": _COMMANDS,
}

# Fields that emogen's own code reads, beside the trainer or instead of it.
OBEYED_BY_EMOGEN = {
    *("output_dir", "resume_from_checkpoint", "seed", "use_cpu", "max_length", "per_device_eval_batch_size"),
    *("eval_strategy", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "trust_remote_code"),
    *("loss_type", "label_smoothing_factor", "average_tokens_across_devices"),
    *("model_name_or_path", "model_revision", "dtype", "attn_implementation", "use_peft"),
}

# Fields that emogen hands to TRL, transformers and peft, and that work there as they do without emogen.
OBEYED_BY_TRAINER = {
    # duration, optimiser, schedule
    *("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size", "num_train_epochs"),
    *("max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args"),
    *("optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    "neftune_noise_alpha",
    # precision, memory, speed
    *("bf16", "fp16", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode"),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "activation_offloading"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_empty_cache_steps"),
    # order and loading of the rows
    *("train_sampling_strategy", "shuffle_dataset", "data_seed", "ignore_data_skip", "full_determinism"),
    *("dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
    # logs, evaluations, checkpoints
    *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_on_each_node"),
    *("log_level", "log_level_replica", "disable_tqdm", "include_num_input_tokens_seen", "skip_memory_metrics"),
    *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("hub_private_repo", "debug", "eval_steps", "eval_delay", "eval_on_start", "save_strategy", "save_steps"),
    *("save_total_limit", "save_only_model", "save_on_each_node", "enable_jit_checkpoint"),
    # several processes
    *("ddp_backend", "ddp_timeout", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
    *("ddp_static_graph", "fsdp", "fsdp_config", "deepspeed"),
    # adapter and quantisation
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save"),
    *("use_rslora", "use_dora", "load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_quant_storage"),
    "use_bnb_nested_quant",
}

# Obeyed fields that have no effect on a classification head, which transformers' own trainer trains.
SETTLED_FOR_HEADS = {
    "loss_type": "the loss of a head is binary cross-entropy",
    "label_smoothing_factor": "the loss of a head is binary cross-entropy, without smoothing",
    "average_tokens_across_devices": "the loss of a head is a mean over rows",
    "shuffle_dataset": "the rows are shuffled in each epoch anyway",
    "activation_offloading": "TRL offloads activations for generators only",
}

# Obeyed fields that would mean something else on a row that contains the rows of a whole batch.
SETTLED_FOR_SHARED_PREFIXES = {
    "neftune_noise_alpha": "the noise depends on the length of a row, so it would shrink with the size of the batch",
    "include_num_input_tokens_seen": "the instruction would be counted once for a whole batch; the log has num_tokens",
    "torch_compile": "every batch has its own layout, and would be compiled anew",
    "torch_compile_backend": "every batch has its own layout, and would be compiled anew",
    "torch_compile_mode": "every batch has its own layout, and would be compiled anew",
}

# --------------------------------------------------------------------------------------------- other names

# Names of the same settings in other tools and in older versions of TRL and transformers.
OLD_NAMES = {
    "max_seq_length": "max_length",
    "cutoff_len": "max_length",
    "torch_dtype": "dtype",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "evaluation_strategy": "eval_strategy",
    "num_epochs": "num_train_epochs",
    "micro_batch_size": "per_device_train_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "load_in_nf4": "load_in_4bit",
    "no_cuda": "use_cpu",
}

# Settings of other tools and of older versions that have no name of their own any more, and what to do instead.
REMOVED = {
    "warmup_ratio": "use `warmup_steps`, which is a share of all steps if it is below 1",
    "overwrite_output_dir": "nothing is overwritten; name another folder with `output_dir`",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "group_by_length": "use `train_sampling_strategy: group_by_length`",
    "adafactor": "use `optim: adafactor`",
    "fp16_opt_level": "it belonged to Apex; use `fp16` or `bf16`",
    "half_precision_backend": "it belonged to Apex; use `fp16` or `bf16`",
    "fp16_backend": "it belonged to Apex; use `fp16` or `bf16`",
    "use_liger": _NO_LIGER,
    "save_safetensors": "weights are always saved as safetensors",
    "include_inputs_for_metrics": _NO_LOGITS,
    "include_tokens_per_second": "the log has num_tokens",
    "predict_with_generate": "evaluations always generate answers",
    "generation_max_length": "the label set determines the length of an answer",
    "push_to_hub_token": SETTLED["hub_token"],
    "push_to_hub_model_id": _NO_UPLOAD,
    "torchdynamo": "use `torch_compile_backend`",
    "split_batches": SETTLED["accelerator_config"],
    "dispatch_batches": SETTLED["accelerator_config"],
    "jit_mode_eval": "transformers has removed it",
    "use_ipex": "transformers has removed it",
    "past_index": "transformers has removed it",
    "ray_scope": "transformers has removed it",
    "use_mps_device": "the accelerator of the machine is used, unless `use_cpu` is set",
    "val_set_size": "use `eval_fraction`, or `eval_file`",
    "quantization_bit": "use `load_in_4bit` or `load_in_8bit`",
}

# --------------------------------------------------------------------------------------------- values


def _at_least_one_or_minus_one(value: int) -> int:
    if value < 1 and value != -1:
        raise ValueError("expected at least 1, or -1 for no limit")
    return value


def _whole_or_share(value: float | None) -> float | None:
    if value is not None and value > 1 and value != int(value):
        raise ValueError("expected a whole number of steps, or a share of all steps below 1")
    return value


_POSITIVE_STEPS = (Gt(0), AfterValidator(_whole_or_share))

# The values that make sense, beside those that a field's type and its choices allow.
LIMITS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (Ge(1),)),
    **dict.fromkeys(("gradient_accumulation_steps", "lora_r", "lora_alpha", "max_length"), (Ge(1),)),
    **dict.fromkeys(("save_total_limit", "dataloader_prefetch_factor", "torch_empty_cache_steps"), (Ge(1),)),
    **dict.fromkeys(("ddp_timeout", "ddp_bucket_cap_mb"), (Ge(1),)),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "eval_delay", "adam_epsilon"), (Ge(0),)),
    **dict.fromkeys(("neftune_noise_alpha", "dataloader_num_workers"), (Ge(0),)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout", "label_smoothing_factor"), (Interval(ge=0, lt=1),)),
    **dict.fromkeys(("seed", "data_seed"), (Interval(ge=0, lt=2**32),)),
    **dict.fromkeys(("eval_steps", "save_steps", "logging_steps"), _POSITIVE_STEPS),
    "warmup_steps": (Ge(0), AfterValidator(_whole_or_share)),
    "num_train_epochs": (Gt(0),),
    "max_steps": (AfterValidator(_at_least_one_or_minus_one),),
}

# --------------------------------------------------------------------------------------------- keys without effect

_TRACKIO = ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "hub_private_repo")
_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters")
_BEST = ("metric_for_best_model", "greater_is_better")


def chooses_by_metric(recipe: Recipe) -> bool:
    """Whether the trainer reads `metric_for_best_model`."""
    args = recipe.sft_args
    by_metric = ("reduce_lr_on_plateau", "greedy")
    return bool(
        args.get("load_best_model_at_end")
        or args.get("save_strategy") == "best"
        or args.get("lr_scheduler_type") in by_metric
    )


def evaluates(recipe: Recipe) -> bool:
    """Whether there are evaluations during training."""
    return recipe.sft_args.get("eval_strategy", "no") != "no" or bool(recipe.sft_args.get("eval_on_start"))


def saves_memory(recipe: Recipe) -> bool:
    """Whether activations are computed again in the backward pass; the newer of the two names is the stronger."""
    newer = recipe.sft_args.get("activation_checkpointing")
    return bool(recipe.sft_args.get("gradient_checkpointing") if newer is None else newer)


def _only_suffixes(recipe: Recipe, *suffixes: str) -> bool:
    files = [file for file in (recipe.train_file, recipe.eval_file) if file]
    return all(file.lower().endswith(suffixes) for file in files)


# (a condition, why keys have no effect under it, these keys). What a recipe sets in vain is a warning.
IDLE: list[tuple[Callable[[Recipe], bool], str, tuple[str, ...]]] = [
    (
        lambda recipe: recipe.answer == "head",
        "a classification head reads the text alone",
        ("prompt", "order", "decode", "prob", "text_loss_weight", "shared_prefix"),
    ),
    (
        lambda recipe: not recipe.lm_args["use_peft"],
        "use_peft is false",
        (*_LORA, "lora_modules_to_save", "use_rslora", "use_dora"),
    ),
    (
        lambda recipe: not recipe.lm_args.get("load_in_4bit"),
        "load_in_4bit is not set",
        ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
    ),
    (lambda recipe: not evaluates(recipe), "eval_strategy is no", ("eval_steps", "eval_delay", "eval_samples")),
    (
        lambda recipe: recipe.sft_args.get("eval_strategy", "no") not in ("no", "steps"),
        "eval_strategy is not steps",
        ("eval_steps",),
    ),
    (
        lambda recipe: recipe.select_best is not None,
        "select_best holds out its own rows",
        ("eval_samples",),
    ),
    (lambda recipe: recipe.select_best is not None, "select_best decides", _BEST),
    (
        lambda recipe: recipe.select_best is None and not chooses_by_metric(recipe),
        "nothing is chosen by it; set load_best_model_at_end",
        _BEST,
    ),
    (lambda recipe: recipe.sft_args["save_strategy"] != "steps", "save_strategy is not steps", ("save_steps",)),
    (
        lambda recipe: recipe.sft_args["save_strategy"] == "no",
        "save_strategy is no",
        ("save_total_limit", "save_only_model", "save_on_each_node"),
    ),
    (
        lambda recipe: recipe.sft_args.get("logging_strategy", "steps") != "steps",
        "logging_strategy is not steps",
        ("logging_steps",),
    ),
    (lambda recipe: recipe.sft_args["report_to"] in ("none", ["none"], None, []), "report_to is none", ("run_name",)),
    (lambda recipe: "trackio" not in (recipe.sft_args["report_to"] or ()), "report_to is not trackio", _TRACKIO),
    (
        lambda recipe: not saves_memory(recipe),
        "gradient_checkpointing is not set",
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ),
    (lambda recipe: not recipe.sft_args.get("fsdp"), "fsdp is not set", ("fsdp_config",)),
    (
        lambda recipe: not str(recipe.sft_args.get("optim", "")).startswith(("galore", "apollo")),
        "only GaLore and APOLLO read it (`optim`)",
        ("optim_target_modules",),
    ),
    (
        lambda recipe: not recipe.sft_args.get("dataloader_num_workers"),
        "dataloader_num_workers is 0",
        ("dataloader_in_order",),
    ),
    (lambda recipe: recipe.train_file is not None, "train_file is set", ("dataset_config", "dataset_train_split")),
    (lambda recipe: _only_suffixes(recipe, ".jsonl", ".parquet"), "no file has separators", ("separator",)),
    (lambda recipe: _only_suffixes(recipe, ".parquet"), "no file is a text file", ("encoding",)),
]
