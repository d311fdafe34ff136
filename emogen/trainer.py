"""TRL's `SFTTrainer`, with the instruction computed once a batch, logits on the answers alone, and generated scores.

Loss and gradients equal those of plain training on the same rows; `attention.py` says why.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from trl import SFTTrainer

from emogen.attention import PackedRows, forward
from emogen.linear import use_onednn


class PrefixCollator:
    """B rows that begin with the same P tokens -> one packed row of T = P + sum of what is left of each.

    The rows are sorted by length, and their last tokens left out, which nothing is to follow.

    Returns:
        `lengths` int64 [B]: how much of the packed row each row takes, after the prefix. It comes first because the
            trainer reads the number of rows off the first entry.
        `input_ids`: int64 [T].
        `labels`: int64 [T], the token that is to follow each one, or -100 where none is learnt.
    """

    def __init__(self, n_prefix: int):
        self.n_prefix = n_prefix

    def __call__(self, examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        n = self.n_prefix
        examples = sorted(examples, key=lambda example: len(example["input_ids"]))
        prefix = examples[0]["input_ids"][:n]
        ids, labels = list(prefix), [-100] * n
        for example in examples:
            row = example["input_ids"]
            if row[:n] != prefix or example["labels"][n] != -100:
                raise ValueError("the rows of a batch do not share their prefix")
            ids += row[n:-1]
            labels += example["labels"][n + 1 :]
        return {
            "lengths": torch.tensor([len(example["input_ids"]) - 1 - n for example in examples]),
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
        }


class EmogenTrainer(SFTTrainer):
    """`SFTTrainer` on rows that share a prefix. Everything but loss, batches and evaluation is TRL's.

    Args:
        n_prefix: how many tokens all rows share, if `attention.share_prefix` allows; or 0 to train on plain rows, as
            TRL does.
        score: called with the model at each evaluation; the figures that it returns are logged as `eval_...` beside
            the loss, and any of them can be `metric_for_best_model`.
    """

    def __init__(
        self, *args: Any, n_prefix: int = 0, score: Callable[[Any], dict[str, float]] | None = None, **kwargs: Any
    ):
        self.n_prefix = n_prefix
        self.score = score
        if n_prefix:
            kwargs["data_collator"] = PrefixCollator(n_prefix)
        super().__init__(*args, **kwargs)
        if self.model.dtype == torch.float32:
            # TRL casts the adapter of a quantised model to bf16, as wide as such a model computes on a GPU. Where it
            # computes in float32, that would only round the adapter, and lose small updates altogether.
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        use_onednn(self.model)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean negative log-likelihood of the answers' tokens, as in TRL."""
        if not self.n_prefix:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        supervised = (labels != -100).nonzero()[:, 0]  # [A], where the next token is part of an answer
        target = labels[supervised]
        layout = PackedRows(self.n_prefix, inputs["lengths"].tolist())
        outputs = forward(model, layout, inputs["input_ids"], logits_to_keep=supervised)
        logits = outputs.logits[0].float()  # [A, V]
        total = functional.cross_entropy(logits, target, reduction="sum")
        loss = total / (len(target) if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        self._note_metrics(logits.detach(), target, inputs["input_ids"].numel())
        return (loss, outputs) if return_outputs else loss

    def _note_metrics(self, logits: torch.Tensor, target: torch.Tensor, n_tokens: int) -> None:
        """What TRL logs beside the loss."""
        mode = "train" if self.model.training else "eval"
        sums = torch.stack([(logits.argmax(1) == target).sum(), torch.tensor(len(target), device=logits.device)])
        correct, n, tokens = self.accelerator.reduce(torch.cat([sums, sums.new_tensor([n_tokens])])).tolist()
        self._metrics[mode]["mean_token_accuracy"].append(correct / max(n, 1))
        if mode == "train":
            self._total_train_tokens += tokens
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The loss on the evaluation rows, then the score of what the model generates, logged together."""
        output = super().evaluation_loop(*args, **kwargs)
        if self.score is not None:
            prefix = kwargs.get("metric_key_prefix", "eval")
            figures = self.score(self.accelerator.unwrap_model(self.model))
            output.metrics.update({f"{prefix}_{name}": value for name, value in figures.items()})
        return output
