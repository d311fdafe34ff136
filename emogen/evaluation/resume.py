"""What a run, a cross-validation or a sweep depends on: it can be resumed only if nothing of that has changed."""

import hashlib
import json
from typing import Any

from emogen.task.recipe import default_values
from emogen.task.rows import Rows

# Keys that no result depends on, beyond rounding. All others have to be the same when a run is resumed.
MAY_CHANGE = {
    # where the files are; their contents are compared
    *("output_dir", "train_file", "eval_file", "prompt", "labels", "init_adapter", "model_name_or_path"),
    # the log and the checkpoints
    *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_on_each_node"),
    *("log_level", "log_level_replica", "disable_tqdm", "include_num_input_tokens_seen", "skip_memory_metrics"),
    *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("save_strategy", "save_steps", "save_total_limit", "save_on_each_node", "enable_jit_checkpoint"),
    *("resume_from_checkpoint", "debug"),
    # memory and speed
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing"),
    *("activation_checkpointing_kwargs", "activation_offloading", "per_device_eval_batch_size"),
    *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory"),
    *("dataloader_persistent_workers", "ddp_timeout", "trust_remote_code"),
    *("api_requests", "api_prices", "max_dollars"),
    # what is done with a finished run
    *("predict_by", "hub_private_repo"),
}


def changed_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The keys that a result depends on and whose values differ, each with both values.

    A key that is missing has its default.

    Args:
        before, now: resolved recipes, as `Recipe.to_yaml` writes them.
    """
    defaults = default_values()
    found = []
    for key in sorted((before.keys() | now.keys()) - MAY_CHANGE):
        old, new = (values.get(key, defaults.get(key)) for values in (before, now))
        if old != new:
            found.append(f"{key} ({old} before, {new} now)")
    return found


def digest_of(rows: Rows) -> str:
    """The sha256 of the ids, texts and labels of rows, in their order."""
    labels = rows.truth if rows.prob is None else rows.prob
    content = [list(rows.ids), list(rows.texts), labels.tolist()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
