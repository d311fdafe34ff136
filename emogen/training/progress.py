"""What a training shows in the terminal: a bar, and a line for each entry of the log."""

import sys
from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

# What is shown of an entry of the log, in this order: the key, its name, its format.
SHOWN = (
    ("loss", "loss", ".3f"),
    ("mean_token_accuracy", "accuracy of tokens", ".2f"),
    ("learning_rate", "learning rate", ".2g"),
    ("eval_loss", "validation loss", ".3f"),
    ("eval_f1_macro", "macro-F1", ".3f"),
    ("eval_f1_micro", "micro-F1", ".3f"),
    ("train_loss", "mean loss", ".3f"),
    ("train_samples_per_second", "rows per second", ".2f"),
)


def show_progress(trainer: Any) -> None:
    """Replace the bar of a trainer, which prints dictionaries, by one with lines of text.

    With `disable_tqdm`, there are the lines alone.
    """
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(_Bar)
    trainer.add_callback(_Lines)


class _Bar(ProgressCallback):
    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `_Lines` shows the log."""


class _Lines(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        values = [f"{name} {logs[key]:{form}}" for key, name, form in SHOWN if logs and key in logs]
        if values and state.is_world_process_zero:
            tqdm.write(f"step {state.global_step:,} of {state.max_steps:,}: {', '.join(values)}", file=sys.stderr)
