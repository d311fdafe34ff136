"""The scores of prompt templates: computed row by row, kept, and ranked.

`emogen prompts compare` and the lab share one store, whatever the number of rows: a row that was scored once with a
template is not computed again, and what is interrupted goes on. The store is beside the folders of `prompts`:

runs/NAME-prompts/scores-1a2b3c4d/     one folder per model, decoding and label set (named by a digest of them)
    list-5e6f7a8b/                     a template, named as there: prompt.jinja, and rows.jsonl with a line for each row
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from emogen import paths
from emogen.claims import claim_folder
from emogen.console import Bar, no_bar
from emogen.errors import InputError, ModelError
from emogen.evaluation import results
from emogen.evaluation.caveats import caveats, reference_line
from emogen.evaluation.metrics import check_prob, evaluate
from emogen.evaluation.results import Prediction, parse_audit, pred_matrix
from emogen.evaluation.run_folder import (
    LABELS,
    METRICS,
    PREDICTIONS,
    PROMPT,
    PROMPTS,
    label_set_of,
    read_json,
    write_manifest,
)
from emogen.experiments.prompts import PromptBenchmark, Template
from emogen.model.encode import Encoder, Row
from emogen.prediction.classifier import Classifier, prob_of
from emogen.prediction.generator import GenerativeClassifier
from emogen.prediction.remote import RemoteClassifier
from emogen.report.compare import System, compare, decision_title, with_interval
from emogen.task.labels import LabelSet
from emogen.task.parse import parse_answer
from emogen.task.rows import Rows
from emogen.task.splits import make_folds

ROWS = "rows.jsonl"
PART = 32  # rows that are scored between two looks at whether to stop; a batch


@dataclass(frozen=True)
class RowScore:
    """What a model said about a row with a template.

    Attributes:
        row: names the text and its gold labels; see `row_key`.
        raw: the answer.
        n_cut: tokens that were cut from the text to fit `max_length`.
        prob: the probability of each label, L values.
        log_likelihood: of the true answer, in nats (with `yes_no`, the sum of all questions); None for the model of an
            endpoint.
        seconds: that the answer and the probabilities took, as a part of those of its batch.
    """

    row: str
    raw: str
    n_cut: int
    prob: list[float]
    log_likelihood: float | None
    seconds: float


def row_key(text: str, gold: Sequence[int]) -> str:
    """The name of a row in the store: a digest of its text and of its gold labels, [L]."""
    return hashlib.sha256(json.dumps([text, [int(value) for value in gold]]).encode()).hexdigest()[:16]


def row_keys(rows: Rows) -> list[str]:
    """The names of n rows."""
    return [row_key(text, gold) for text, gold in zip(rows.texts, rows.truth.tolist(), strict=True)]


@dataclass
class KeptScores:
    """The scores of one template in the store, which may be growing.

    Attributes:
        folder: of the template.
        of_row: the score of each row, by its name, in the order in which they were made.
    """

    folder: Path
    of_row: dict[str, RowScore] = field(default_factory=dict)
    _n_bytes: int = 0  # of the file, that have been read

    def read(self) -> "KeptScores":
        """Read what was added to the file since the last call. A line that is still being written is left out.

        Raises:
            InputError: a line is not a score.
        """
        path = self.folder / ROWS
        if not path.is_file():
            return self
        with path.open("rb") as file:
            file.seek(self._n_bytes)
            added = file.read()
        added = added[: added.rfind(b"\n") + 1]
        for line in added.split(b"\n")[:-1]:
            try:
                score = RowScore(**json.loads(line))
                is_valid = isinstance(score.raw, str) and all(isinstance(value, float | int) for value in score.prob)
            except (ValueError, TypeError, RecursionError):
                is_valid = False
            if not is_valid:
                raise InputError(f"{path}: a line is not a score; was the file changed? Remove it to score again")
            self.of_row[score.row] = score
        self._n_bytes += len(added)
        return self

    def write(self, scores: Sequence[RowScore]) -> None:
        """Append scores to the file. Half a line, of a process that was killed, is overwritten."""
        with (self.folder / ROWS).open("ab") as file:
            file.truncate(self._n_bytes)
            file.write("".join(json.dumps(asdict(score)) + "\n" for score in scores).encode())
            file.flush()
            os.fsync(file.fileno())
        self.read()


def score_template(
    benchmark: PromptBenchmark, template: Template, generator: GenerativeClassifier | None, bar: Bar
) -> dict[str, Any]:
    """Score a template, and keep its metrics and predictions in its folder. A second call only reads them.

    Args:
        generator: what `load_generator` returned; None will do if the template is done.

    Returns:
        The metrics of `evaluate`; `texts_per_second`, with their probabilities; and `parse`. Beside them, but not for
        the model of an endpoint: `log_likelihood`, of the true answers, in nats, the mean over the texts (with
        `yes_no`, the sum of all questions of a text); and `tokens`, of the instruction (`shared`) and the mean of what
        follows it per question (`row`).

    Raises:
        ModelError: a probability or a likelihood is not a number, or the endpoint fails.
    """
    if not template.done:
        with bar(template.name, len(benchmark.rows)) as advance:
            for n_rows in score_rows(benchmark, template, generator):
                advance(n_rows)
        _keep_metrics(benchmark, template)
    return read_metrics(template.folder)


def score_rows(
    benchmark: PromptBenchmark, template: Template, generator: GenerativeClassifier | None
) -> Generator[int, None, None]:
    """Score the rows of a benchmark that are not in the store yet, part by part, and keep each part at once.

    The rows come in a random order that is the same for all templates: what is interrupted leaves a fair sample, and
    the same one.

    Args:
        generator: what `load_generator` returned.

    Yields:
        The number of rows that were done since the last time, of those of the benchmark; first those of the store.

    Raises:
        InputError: another process scores this template.
        ModelError: as `score_template`.
    """
    rows = benchmark.rows
    with claim_folder(template.store):
        with paths.writing(template.store / PROMPT) as file:
            file.write(template.prompt.source)
        kept = KeptScores(template.store).read()
        keys = row_keys(rows)
        n_equal = Counter(keys)
        order = np.random.default_rng(benchmark.recipe.seed).permutation(len(rows))
        missing = list({keys[i]: i for i in order if keys[i] not in kept.of_row}.values())
        yield len(rows) - sum(n_equal[keys[i]] for i in missing)
        if not missing:
            return
        classifier: Classifier
        if template.encoder is None:
            classifier = RemoteClassifier(template.task, benchmark.train_rows, benchmark.endpoint)
            size = 8 * benchmark.recipe.api_requests  # the last answers of a part keep some requests waiting
        else:
            assert generator is not None
            classifier, size = replace(generator, encoder=template.encoder), PART
        for start in range(0, len(missing), size):
            part = missing[start : start + size]
            kept.write(_score_part(classifier, rows.take(part), template.name))
            yield sum(n_equal[keys[i]] for i in part)


def _score_part(classifier: Classifier, rows: Rows, name: str) -> list[RowScore]:
    """Ask a model about some rows with the template of a name."""
    started = time.perf_counter()
    predictions = classifier.predict(rows.texts, with_prob=True)
    seconds = (time.perf_counter() - started) / len(rows)
    likelihoods: list[float] | list[None] = [None] * len(rows)
    if isinstance(classifier, GenerativeClassifier):
        prob = prob_of(classifier, rows.texts, predictions, no_bar, "")
        likelihoods = likelihood(classifier, rows, name).tolist()
    else:
        prob = pred_matrix(predictions).astype(np.float32)
    check_prob(prob)
    return [
        RowScore(key, prediction.raw, prediction.n_cut, row_prob, likelihood, seconds)
        for key, prediction, row_prob, likelihood in zip(
            row_keys(rows), predictions, prob.tolist(), likelihoods, strict=True
        )
    ]


def likelihood(generator: GenerativeClassifier, rows: Rows, name: str, *, among_valid: bool = False) -> np.ndarray:
    """The log-likelihood of the true answers to n rows, float64 [n], in nats; of `yes_no`, of all questions of a text.

    Args:
        name: of the template, for messages.
        among_valid: see `model.probabilities.log_likelihood`.

    Raises:
        ModelError: a likelihood is not a number.
    """
    from emogen.model.probabilities import log_likelihood

    true_answers = _true_answers(generator.encoder, rows)
    found = log_likelihood(generator.model, generator.encoder, true_answers, among_valid=among_valid).reshape(
        len(rows), -1
    )
    if not np.isfinite(found).all():
        n_wrong = (~np.isfinite(found)).sum()
        raise ModelError(f"{name}: the likelihood of {n_wrong} true answers is not a number")
    return found.sum(axis=1, dtype=np.float64)


def _true_answers(encoder: Encoder, rows: Rows) -> list[Row]:
    """The true answer of each question, in tokens."""
    return [
        row
        for text, truth in zip(rows.texts, rows.truth, strict=True)
        for row in encoder.rows(text, encoder.label_set.names_of(truth))
    ]


def predictions_of(
    kept: KeptScores, rows: Rows, label_set: LabelSet, style: str
) -> tuple[list[Prediction], np.ndarray]:
    """The predictions for n rows that are in the store, and the probabilities, float32 [n, L]."""
    scores = [kept.of_row[key] for key in row_keys(rows)]
    predictions = [
        Prediction(score.raw, parse_answer(score.raw, label_set, style=style), score.n_cut) for score in scores
    ]
    return predictions, np.array([score.prob for score in scores], dtype=np.float32)


def _keep_metrics(benchmark: PromptBenchmark, template: Template) -> None:
    """Write the folder of a template all of whose rows are in the store."""
    rows, label_set, encoder = benchmark.rows, benchmark.task.label_set, template.encoder
    kept = KeptScores(template.store).read()
    predictions, prob = predictions_of(kept, rows, label_set, template.task.recipe.answer)
    pred, folds = pred_matrix(predictions), folds_of(benchmark)
    scores = [kept.of_row[key] for key in row_keys(rows)]
    single, tune = label_set.exactly_one, benchmark.recipe.tune
    metrics = evaluate(rows.truth, pred, prob, folds, label_set.names, tune, exactly_one=single) | {
        "texts_per_second": len(rows) / sum(score.seconds for score in scores),
        "parse": parse_audit(predictions),
    }
    if encoder is not None:
        lengths = [len(row) for row in _true_answers(encoder, rows)]
        metrics["log_likelihood"] = float(np.mean([score.log_likelihood for score in scores]))
        metrics["tokens"] = {"shared": len(encoder.prefix_ids), "row": float(np.mean(lengths))}
    with claim_folder(template.folder):
        for name, text in {PROMPT: template.prompt.source, LABELS: label_set.to_yaml()}.items():
            with paths.writing(template.folder / name) as file:
                file.write(text)
        results.write_jsonl(template.folder / PREDICTIONS, rows, pred, prob, label_set, predictions, folds)
        write_manifest(template.folder, PROMPTS, model=benchmark.recipe.model_name)
        paths.write_json(template.folder / METRICS, metrics)  # last: a template with metrics is done


def folds_of(benchmark: PromptBenchmark) -> np.ndarray | None:
    """The folds of nested thresholds, int64 [n]; None if there are too few rows for them."""
    try:
        return make_folds(benchmark.rows, 5, benchmark.recipe.seed)
    except ValueError:
        return None


def read_metrics(folder: Path) -> dict[str, Any]:
    """The metrics of a scored template or of a run.

    Raises:
        InputError: the file is not valid.
    """
    metrics = read_json(folder / METRICS)
    if "f1_macro" not in metrics:
        raise InputError(f"{folder / METRICS}: it has no f1_macro; was the file changed? Remove it to score again")
    return metrics


def ranking(folders: Sequence[Path], by: str) -> tuple[list[int], list[System]]:
    """Rank templates by macro-F1, the best first.

    Args:
        folders: the folder of each template, or of its run.
        by: `thresholds` (nested) or `answer`.

    Returns:
        The positions of the folders in that order, and their systems in the same order, with the difference of each to
        the best one.
    """
    label_set = label_set_of(folders[0])
    f1 = [system.metrics["f1_macro"] for system in compare(folders, label_set, by=by)]
    order = sorted(range(len(folders)), key=lambda k: -f1[k])
    return order, compare([folders[k] for k in order], label_set, by=by)


def ranking_table(templates: Sequence[Template], folders: Sequence[Path], by: str) -> tuple[Table, list[str]]:
    """Rank templates, the best first. A difference is real if its 95 % interval excludes 0.

    Returns:
        A table, and what a reader has to know about it, in sentences.
    """
    order, systems = ranking(folders, by)
    metrics = [read_metrics(folders[k]) for k in order]
    has_likelihood = all("log_likelihood" in template_metrics for template_metrics in metrics)
    view = Table(box=None, pad_edge=False)
    view.add_column("template", overflow="fold")
    for heading in ("macro-F1, 95 %", "to the best"):
        view.add_column(heading, justify="right")
    for heading in ("real", "tokens", *(("ln P", "texts/s") if has_likelihood else ())):
        view.add_column(heading, justify="right", no_wrap=True)
    for k, system, template_metrics in zip(order, systems, metrics, strict=True):
        cells = [with_interval(system.metrics["f1_macro"], system.interval), "", ""]
        if system is not systems[0]:
            ends = system.difference_interval
            is_real = "?" if ends is None else "yes" if ends[1] < 0 else "no"
            cells[1:] = [with_interval(system.difference, ends, "+z"), is_real]
        encoder, tokens = templates[k].encoder, template_metrics.get("tokens")
        n_shared = str(len(encoder.prefix_ids)) if encoder else ""
        cells.append(f"{n_shared} + {tokens['row']:.0f}" if tokens else n_shared)
        if has_likelihood:
            cells += [f"{template_metrics['log_likelihood']:.2f}", f"{template_metrics['texts_per_second']:.1f}"]
        view.add_row(templates[k].name, *cells)
    notes = caveats([(templates[k].name, system.metrics) for k, system in zip(order, systems, strict=True)])
    return view, [reference_line(systems[0].metrics), *notes]


def difference_in_words(folders: Sequence[Path], names: Sequence[str], by: str) -> str:
    """Whether the second of two templates is better than the first one, for people who do not know intervals.

    Args:
        folders: of the two templates, scored on the same rows.
        by: see `ranking`.
    """
    label_set = label_set_of(folders[0])
    first, second = compare(folders, label_set, by=by)
    n, ends, change = first.metrics["n"], second.difference_interval, second.difference
    found = (
        f"On the same {n:,} rows, by {decision_title(by, label_set)}: macro-F1 {first.metrics['f1_macro']:.3f} of "
        f"{names[0]}, {second.metrics['f1_macro']:.3f} of {names[1]}, a difference of {change:+z.3f}. "
    )
    if ends is None:
        return found + "That is too few rows, or too few answers that differ, to tell it from chance."
    found += f"Its 95 % interval over the rows (paired bootstrap) is {ends[0]:+z.3f} to {ends[1]:+z.3f}. "
    if ends[0] <= 0 <= ends[1]:
        return found + "The interval has 0 in it: the difference may be chance; more rows would tell."
    return (
        found
        + f"0 is outside the interval: the difference is real, {names[1]} is {'better' if change > 0 else 'worse'}."
    )
