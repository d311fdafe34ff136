"""A classification head as an ONNX file: token ids -> the probability of each label, in onnxruntime.

FOLDER/model.onnx        inputs input_ids and attention_mask, int64 [n, tokens]; outputs prob and logits, float32 [n, L]
FOLDER/tokenizer.json    for the library `tokenizers`, or JavaScript's
FOLDER/                  labels.yaml, thresholds.json, README.md, export.json
"""

import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_outputs import SequenceClassifierOutput

from emogen.distribution import install_hint
from emogen.errors import InputError, ModelError
from emogen.evaluation.run_folder import CARD, LABELS, MODEL, THRESHOLDS
from emogen.model.loading import load_head_model
from emogen.model.plain_rows import evaluating
from emogen.prediction.head import HeadClassifier

ONNX = "model.onnx"
INPUTS = ("input_ids", "attention_mask")


def require_onnx() -> None:
    """Check that the libraries are installed.

    Raises:
        InputError: one is not.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise InputError(f"--to onnx needs ONNX: {install_hint('onnx')}") from None


def write_onnx(head: HeadClassifier, merged: Path, folder: Path) -> HeadClassifier:
    """Write the model of a head as ONNX, in float32, with what another program needs to use it.

    Args:
        head: the classifier.
        merged: its run folder, without an adapter.
        folder: a new folder.

    Returns:
        The same classifier, whose model is computed by onnxruntime.

    Raises:
        ModelError: PyTorch cannot write the model as ONNX.
    """
    folder.mkdir()
    # Loaded again: that of the classifier may compute by oneDNN, which is not part of ONNX.
    plain = load_head_model(str(merged / MODEL), head.recipe, head.label_set, head.tokenizer).float()
    model = _WithProbabilities(plain, exactly_one=head.label_set.exactly_one)
    ids = torch.full((2, 4), 5)
    dynamic = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:  # they speak of vision operators and of their own passes
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), evaluating(model):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model, (ids, torch.ones_like(ids)), dynamo=True, verbose=False, input_names=INPUTS,
                output_names=("prob", "logits"), dynamic_shapes=dict.fromkeys(INPUTS, dynamic),
            )  # fmt: skip
        program.save(folder / ONNX)
    except Exception as error:  # the exporter raises anything
        raise ModelError(f"this {plain.config.model_type} model cannot be written as ONNX: {error}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    shutil.copyfile(merged / MODEL / "tokenizer.json", folder / "tokenizer.json")
    for name in (LABELS, THRESHOLDS, CARD):
        if (merged / name).is_file():
            shutil.copyfile(merged / name, folder / name)
    return HeadClassifier(head.recipe, head.label_set, head.tokenizer, _OnnxModel(folder / ONNX))


class _WithProbabilities(torch.nn.Module):
    """A model with a head, whose outputs are probabilities and logits."""

    def __init__(self, model: Any, *, exactly_one: bool):
        super().__init__()
        self.model, self.exactly_one = model, exactly_one

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits.float()
        return logits.softmax(1) if self.exactly_one else logits.sigmoid(), logits


class _OnnxModel(torch.nn.Module):
    """An ONNX file in the place of a transformers model."""

    device = torch.device("cpu")

    def __init__(self, file: Path):
        import onnxruntime

        super().__init__()
        self._session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **unused: Any) -> SequenceClassifierOutput:
        inputs = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return SequenceClassifierOutput(logits=torch.from_numpy(self._session.run(["logits"], inputs)[0]))


def usage(head: HeadClassifier, folder: Path) -> str:
    """How another program uses the folder, as Markdown."""
    tokenizer = head.tokenizer
    if head.label_set.exactly_one:
        decision = "The label of a text is the most probable one."
    elif (folder / THRESHOLDS).is_file():
        decision = f"`{THRESHOLDS}` has the threshold of each label."
    else:
        decision = "A label is given if its probability is above 0.5."
    limit = min(head.recipe.max_length or tokenizer.model_max_length, tokenizer.model_max_length)
    spelt = (
        "\nemogen replaces a symbol that the tokenizer does not know, such as an emoji, by its Unicode name in lower "
        "case with a blank on each side (`unicodedata.name`); do the same.\n"
        if tokenizer.unk_token_id is not None
        else ""
    )
    if not tokenizer("")["input_ids"]:
        spelt += "\nA text without tokens, such as an empty one, is computed as a blank; do the same.\n"
    return f"""
`{ONNX}` computes the probability of each label in onnxruntime:

```python
import numpy as np, onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_truncation({limit})
tokenizer.enable_padding(pad_id={tokenizer.pad_token_id}, pad_token={tokenizer.pad_token!r})
tokenizer.encode_special_tokens = True  # what looks like a special token in a text is text
rows = tokenizer.encode_batch(["so happy for you!!"])
inputs = {{"input_ids": [row.ids for row in rows], "attention_mask": [row.attention_mask for row in rows]}}
session = onnxruntime.InferenceSession("{ONNX}")
(prob,) = session.run(["prob"], {{name: np.array(values, dtype=np.int64) for name, values in inputs.items()}})
```

The columns are, in this order: {", ".join(head.label_set.names)}. {decision}
{spelt}"""
