"""A run folder (or a recipe, for the model as it is) and texts -> answers, read and written."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emogen import paths
from emogen.data import Rows
from emogen.errors import InputError, ModelError
from emogen.labels import LabelSet
from emogen.parse import ParsedAnswer, parse_answer
from emogen.recipe import Recipe, load_recipe
from emogen.task import load_encoder, load_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from emogen.encode import Encoder

# The files of a run folder that prediction reads.
RECIPE, PROMPT, LABELS, ADAPTER = "recipe.yaml", "prompt.jinja", "labels.yaml", "adapter"


@dataclass(frozen=True)
class Prediction:
    """What the model answered for one text, and how that was read. `n_cut` tokens of the text were left out."""

    raw: str
    parsed: ParsedAnswer
    n_cut: int


def predict_texts(
    model: "PreTrainedModel",
    encoder: "Encoder",
    texts: Sequence[str],
    *,
    decode: str = "constrained",
    batch_size: int = 32,
    progress: Callable[[int], Any] | None = None,
) -> list[Prediction]:
    """Generate and read an answer for each text.

    Args:
        progress: is told how many more questions are answered; there are `len(encoder.question_ids)` for each text.

    Returns:
        n predictions in the order of the texts.
    """
    from emogen.decode import generate

    rows = [encoder.rows(text) for text in texts]
    n_questions = len(encoder.question_ids)
    suffixes = [row.suffix_ids for questions in rows for row in questions]
    answers = generate(model, encoder, suffixes, decode=decode, batch_size=batch_size, progress=progress)
    said = [encoder.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
    predictions = []
    for i, questions in enumerate(rows):
        own = said[i * n_questions : (i + 1) * n_questions]
        if encoder.style == "yes_no":
            raw = "\n".join(f"{name}: {answer}" for name, answer in zip(encoder.label_set.names, own, strict=True))
        else:
            raw = own[0]
        parsed = parse_answer(raw, encoder.label_set, style=encoder.style)
        predictions.append(Prediction(raw, parsed, max(row.n_cut for row in questions)))
    return predictions


def pred_matrix(predictions: Sequence[Prediction]) -> np.ndarray:
    """Predictions -> int8 [n, L]."""
    return np.array([prediction.parsed.vector for prediction in predictions], dtype=np.int8)


def parse_audit(predictions: Sequence[Prediction]) -> dict[str, float]:
    """The share of answers by how they were read, and of those that could not be read (`parse_failure`)."""
    statuses = [prediction.parsed.status for prediction in predictions]
    shares = {status: statuses.count(status) / len(statuses) for status in dict.fromkeys(statuses)}
    return shares | {"parse_failure": sum(prediction.parsed.failed for prediction in predictions) / len(statuses)}


# ---------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to predict, and what it was trained with."""

    recipe: Recipe
    label_set: LabelSet
    encoder: "Encoder"
    model: "PreTrainedModel"


def load_run(run: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Load a run folder with its adapter; or, given a recipe file, the base model without any tuning.

    Raises:
        InputError, ModelError: what is missing or broken, and where.
    """
    from emogen import modeling
    from emogen.attention import share_prefix
    from emogen.linear import use_onednn

    folder = Path(run) if Path(run).is_dir() else None
    if folder and not (folder / RECIPE).is_file():
        raise InputError(f"{folder}: not a run folder: it has no {RECIPE}")
    adapter = folder / ADAPTER if folder else None
    if adapter and not adapter.is_dir():
        raise ModelError(
            f"{folder}: it has no {ADAPTER}/: the run has not finished (resume_from_checkpoint=true goes on)"
        )
    recipe = load_recipe(folder / RECIPE if folder else run, overrides)
    task = load_task(recipe, with_rows=False)
    lm_config = recipe.lm_config()
    location = modeling.locate(recipe.model_name, lm_config.model_revision)
    encoder, _ = load_encoder(task, str(adapter) if adapter else location)
    model = modeling.load_model(location, lm_config, trust_remote_code=bool(recipe.sft_args.get("trust_remote_code")))
    model = modeling.to_device(model)
    if recipe.shared_prefix:
        share_prefix(model)
    if adapter:
        model = modeling.load_adapter(model, adapter)
    use_onednn(model)
    return Loaded(recipe, task.label_set, encoder, model)


# ---------------------------------------------------------------------------------------------- writing


def write_csv(path: Path, rows: Rows, predictions: Sequence[Prediction], label_set: LabelSet) -> None:
    """The ids and the 0/1 columns, in the form of a Kaggle submission."""
    with paths.writing(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([rows.id_column, *label_set.names])
        for row_id, prediction in zip(rows.ids, predictions, strict=True):
            writer.writerow([row_id, *prediction.parsed.vector])


def write_jsonl(path: Path, rows: Rows, predictions: Sequence[Prediction], label_set: LabelSet) -> None:
    """One object a row: id, text, raw answer, how it was read, labels, and the gold labels where they are known."""
    with paths.writing(path) as file:
        for i, prediction in enumerate(predictions):
            parsed = prediction.parsed
            record: dict[str, Any] = {
                "id": rows.ids[i],
                "text": rows.texts[i],
                "raw": prediction.raw,
                "status": parsed.status,
                "unknown": parsed.unknown,
                "labels": parsed.labels,
            }
            if prediction.n_cut:
                record["tokens_cut"] = prediction.n_cut
            if rows.gold is not None:
                record["gold"] = label_set.names_of(rows.gold[i])
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
