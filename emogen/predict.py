"""Run folders (or a recipe, for the model as it is) and texts -> answers, probabilities, labels."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from emogen import ranks, results
from emogen.answer import NO, YES, answer_text
from emogen.data import Rows, stream_rows
from emogen.errors import InputError, ModelError
from emogen.labels import LabelSet, load_label_set
from emogen.parse import ParsedAnswer, parse_answer
from emogen.recipe import Recipe, load_recipe
from emogen.score import apply_thresholds, tune_thresholds
from emogen.stack import cross_fit, fit_stack
from emogen.task import load_encoder, load_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from emogen.encode import Encoder

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], Any]]]  # makes one of a title and a number of rows

# The files of a run folder that prediction reads. MODEL in place of ADAPTER holds a model that was tuned in full.
RECIPE, PROMPT, LABELS, ADAPTER, MODEL = "recipe.yaml", "prompt.jinja", "labels.yaml", "adapter", "model"


@dataclass(frozen=True)
class Prediction:
    """What the model answered for one text, and how that was read. `n_cut` tokens of the text were left out. `prob` are
    the L probabilities that the answer was read off, where it was: see `prob_of`."""

    raw: str
    parsed: ParsedAnswer
    n_cut: int
    prob: tuple[float, ...] | None = None


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
    prob = None
    if encoder.style == "yes_no" and decode == "constrained":
        # The word that is the more probable; that way each text is computed once, not for every question anew.
        prob = predict_prob(model, encoder, texts, batch_size=batch_size, progress=progress)
        said = [YES if of_yes > 0.5 else NO for of_yes in prob.flatten()]
    else:
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
        of_row = None if prob is None else tuple(prob[i].tolist())
        predictions.append(Prediction(raw, parsed, max(row.n_cut for row in questions), of_row))
    return predictions


def predict_prob(
    model: "PreTrainedModel",
    encoder: "Encoder",
    texts: Sequence[str],
    *,
    how: str = "marginal",
    batch_size: int = 32,
    progress: Callable[[int], Any] | None = None,
) -> np.ndarray:
    """The probability of each label for each text, float32 [n, L]; `decode.probabilities` says what that is.

    Args:
        how: `marginal` or `maximum`.
        progress: as in `predict_texts`.
    """
    from emogen.decode import probabilities

    first = [encoder.rows(text)[0] for text in texts]
    if encoder.style == "yes_no":
        before = [row.suffix_ids[: row.n_text] for row in first]
        each = (lambda n: progress(n * len(encoder.question_ids))) if progress else None  # a text is all its questions
        prob = probabilities(model, encoder, before, encoder.question_ids, batch_size=batch_size, progress=each)
        return prob[:, :, 0]  # of yes
    suffixes = [row.suffix_ids for row in first]
    return probabilities(model, encoder, suffixes, how=how, batch_size=batch_size, progress=progress)[:, 0]


def pred_matrix(predictions: Sequence[Prediction]) -> np.ndarray:
    """Predictions -> int8 [n, L]."""
    return np.array([prediction.parsed.vector for prediction in predictions], dtype=np.int8)


def parse_audit(predictions: Sequence[Prediction]) -> dict[str, float]:
    """The share of answers by how they were read, and of those that could not be read (`parse_failure`)."""
    statuses = [prediction.parsed.status for prediction in predictions]
    shares = {status: statuses.count(status) / len(statuses) for status in dict.fromkeys(statuses)}
    return shares | {"parse_failure": sum(prediction.parsed.failed for prediction in predictions) / len(statuses)}


# ---------------------------------------------------------------------------------------------- loading


class Labeller(Protocol):
    """What is ready to label texts: by generation (`Generator`), by a head (`head.Classifier`), or by TF-IDF
    (`baseline.Baseline`)."""

    @property
    def recipe(self) -> Recipe:
        """What it was trained by."""
        ...

    @property
    def label_set(self) -> LabelSet:
        """Its L labels."""
        ...

    @property
    def n_questions(self) -> int:
        """How many rows one text makes."""
        ...

    def answers(
        self, texts: Sequence[str], *, batch_size: int = 32, progress: Callable[[int], Any] | None = None
    ) -> list[Prediction]:
        """What it says of each text. `progress` is told how many more rows are done."""
        ...

    def prob(self, texts: Sequence[str], *, progress: Callable[[int], Any] | None = None) -> np.ndarray:
        """The probability of each label for each text, float32 [n, L]."""
        ...


@dataclass(frozen=True)
class Generator:
    """A model that generates its answers, with what it was trained with."""

    recipe: Recipe
    label_set: LabelSet
    encoder: "Encoder"
    model: "PreTrainedModel"

    @property
    def n_questions(self) -> int:
        """One, or with `yes_no` one for each label."""
        return len(self.encoder.question_ids)

    def answers(
        self, texts: Sequence[str], *, batch_size: int = 32, progress: Callable[[int], Any] | None = None
    ) -> list[Prediction]:
        """See `predict_texts`. Each process of a run does its share."""
        how: dict[str, Any] = {"decode": self.recipe.decode, "batch_size": batch_size, "progress": progress}
        return ranks.spread(lambda own: predict_texts(self.model, self.encoder, own, **how), texts)

    def prob(self, texts: Sequence[str], *, progress: Callable[[int], Any] | None = None) -> np.ndarray:
        """See `predict_prob`. Each process of a run does its share."""
        how: dict[str, Any] = {"how": self.recipe.prob, "progress": progress}
        rows = ranks.spread(lambda own: predict_prob(self.model, self.encoder, own, **how).tolist(), texts)
        return np.array(rows, dtype=np.float32).reshape(len(texts), len(self.label_set))


def named(prob: np.ndarray, label_set: LabelSet, n_cut: Sequence[int]) -> list[Prediction]:
    """What is said by what generates no answer: the labels with a probability above 0.5, prob [n, L]."""
    predictions = []
    for row, cut in zip(prob, n_cut, strict=True):
        names = label_set.names_of((row > 0.5).astype(int).tolist())
        parsed = ParsedAnswer(names, label_set.vector(names), "exact")
        predictions.append(Prediction(answer_text(names, label_set, "list"), parsed, cut, tuple(row.tolist())))
    return predictions


def prob_of(
    labeller: Labeller, texts: Sequence[str], predictions: Sequence[Prediction], bar: Bar, title: str
) -> np.ndarray:
    """The probability of each label, float32 [n, L]: those that answers were read off (a head's, a baseline's, those of
    `yes_no`), or else computed under a progress bar.

    Args:
        predictions: what the labeller answered to the texts, or nothing where it was not asked.
    """
    known = [prediction.prob for prediction in predictions if prediction.prob is not None]
    if known:
        return np.array(known, dtype=np.float32)
    with bar(title, len(texts) * labeller.n_questions) as advance:
        return labeller.prob(texts, progress=advance)


def members(runs: Sequence[Path]) -> list[Path]:
    """Run folders, with each cross-validation replaced by the folds that it consists of."""
    return [member for run in runs for member in (sorted(run.glob("fold-*/")) or [run])]


def read_recipe(run: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, LabelSet]:
    """The recipe of a run folder, of a baseline or of a file, and its labels, without any model.

    Raises:
        InputError: it is no run folder, or the run has not finished.
    """
    if run.is_dir():
        if not (run / RECIPE).is_file():
            raise InputError(f"{run}: not a run folder: it has no {RECIPE}")
        if results.is_baseline(run):
            rows = f"train_file={run.resolve() / results.PREDICTIONS}"
            return load_recipe(run / RECIPE, [rows, *overrides]), load_label_set(run / LABELS)
        if not (run / ADAPTER).is_dir() and not (run / MODEL).is_dir():
            raise ModelError(
                f"{run}: it has no {ADAPTER}/: the run has not finished (resume_from_checkpoint=true goes on)"
            )
    recipe = load_recipe(run / RECIPE if run.is_dir() else run, overrides)
    return recipe, load_label_set(recipe.find(recipe.labels))


def load_runs(runs: Sequence[Path], overrides: Sequence[str] = ()) -> Iterator[Labeller]:
    """Load run folders or baselines one after another; a recipe file stands for its base model without any tuning.

    As long as the base model stays the same it is loaded once, and only the adapter on it changes: use each one before
    you ask for the next.

    Raises:
        InputError, ModelError: what is missing or broken, and where.
    """
    from emogen import modeling
    from emogen.attention import share_prefix
    from emogen.linear import use_onednn

    modeling.use_own_gpu()
    model: Any = None
    base = None
    for run in runs:
        recipe, label_set = read_recipe(run, overrides)
        if results.is_baseline(run):
            from emogen import baseline

            yield baseline.load(run, recipe, label_set)
            continue
        if recipe.answer == "head":
            from emogen import head

            yield head.load(recipe, label_set, run if run.is_dir() else None)
            continue
        adapter = run / ADAPTER if run.is_dir() else None
        task = load_task(recipe, with_rows=False)
        lm_config = recipe.lm_config()
        location = modeling.locate(recipe.model_name, lm_config.model_revision)
        encoder, _ = load_encoder(task, str(adapter) if adapter else location)
        wanted = (location, lm_config.dtype, lm_config.load_in_4bit, lm_config.load_in_8bit, recipe.shared_prefix)
        if wanted != base:
            model, base = modeling.load_model(location, lm_config, trust_remote_code=recipe.trusts_code), wanted
            model = modeling.to_device(model)
            if recipe.shared_prefix:
                share_prefix(model)
        elif hasattr(model, "unload"):
            model = model.unload()  # the adapter of the run before
        if adapter:
            model = modeling.load_adapter(model, adapter)
        use_onednn(model)
        yield Generator(recipe, task.label_set, encoder, model)


def load_run(run: str | Path, overrides: Sequence[str] = ()) -> Labeller:
    """Load one run folder, or the base model of a recipe; see `load_runs`."""
    return next(load_runs([Path(run)], overrides))


@dataclass(frozen=True)
class Rule:
    """How probabilities become labels: `combine` makes one of those of K models, [K, n, L] -> [n, L], and a label is
    given where it is above its threshold, [L]."""

    combine: Callable[[np.ndarray], np.ndarray]
    thresholds: np.ndarray


def load_rule(runs: Sequence[Path], label_set: LabelSet, by: str) -> Rule:
    """How one or several runs (or cross-validations) decide, as they learnt it from the rows held out from all of them.

    Args:
        by: `thresholds`: above the mean of all models. `stack`: above what `stack.Stack` makes of the runs, each of
            which is the mean of its models.

    Raises:
        InputError: a run has not been scored, the runs were not scored on the same rows, or these are too few.
    """
    if by == "thresholds" and len(runs) == 1:
        return Rule(_mean, results.read_thresholds(runs[0], label_set))
    systems = results.aligned([results.read_scored(run, label_set) for run in runs])
    gold, folds, probs = systems[0].gold, systems[0].folds, np.stack([of.prob for of in systems])
    if by == "thresholds":
        return Rule(_mean, tune_thresholds(gold, _mean(probs)))
    if len(np.unique(folds)) < 2:
        raise InputError(f"{systems[0].path}: too few rows for predict_by=stack; predict_by=answer takes what is said")
    fitted = fit_stack(gold, probs)
    ends = np.cumsum([len(members([run])) for run in runs])[:-1]

    def combine(probs: np.ndarray) -> np.ndarray:
        return fitted.prob(np.stack([_mean(of_run) for of_run in np.split(probs, ends)]))

    return Rule(combine, tune_thresholds(gold, cross_fit(gold, probs, folds)))


def _mean(probs: np.ndarray) -> np.ndarray:
    return probs.mean(axis=0)


@dataclass(frozen=True)
class Outcome:
    """The labels that one or several models came to: `pred` int8 [n, L]; the `prob` [n, L] that they have together,
    where that was wanted; and, of one model that was asked for answers, these."""

    pred: np.ndarray
    prob: np.ndarray | None
    predictions: list[Prediction] | None


def predict_rows(
    labellers: Iterable[Labeller],
    rows: Rows,
    *,
    rule: Rule | None = None,
    with_answers: bool = False,
    with_prob: bool = False,
    batch_size: int = 32,
    bar: Bar,
) -> Outcome:
    """Label rows with one or several models.

    Args:
        labellers: models with the same labels, as `load_runs` gives them; each is used before the next is asked for.
        rule: how a label is given by probabilities. Without one it is, where half of the models' answers or more name
            it, and probabilities are averaged.
        with_answers, with_prob: compute answers, or probabilities, also where nothing is decided by them.
        bar: makes a progress bar of a title and a number of rows.
    """
    answers, probs = [], []
    for k, labeller in enumerate(labellers, start=1):
        predictions: list[Prediction] = []
        of = f", model {k}" if k > 1 else ""
        if rule is None or with_answers:
            with bar(f"Answers{of}", len(rows) * labeller.n_questions) as advance:
                predictions = labeller.answers(rows.texts, batch_size=batch_size, progress=advance)
            answers.append(pred_matrix(predictions))
        if rule is not None or with_prob:
            probs.append(prob_of(labeller, rows.texts, predictions, bar, f"Probabilities{of}"))
    prob = (rule.combine if rule else _mean)(np.stack(probs)) if probs else None
    if rule is None:
        pred = (np.mean(answers, axis=0) >= 0.5).astype(np.int8)
    else:
        assert prob is not None
        pred = apply_thresholds(prob, rule.thresholds)
    return Outcome(pred, prob, predictions if len(answers) == 1 else None)


class Panel:
    """One or several runs that label rows together; their models are loaded when rows come.

    Args:
        runs: run folders, cross-validations, or a recipe.
        overrides: of their recipes.

    Raises:
        InputError: a folder is no run, their labels differ, or there is nothing to decide by as `predict_by` wants.
    """

    def __init__(self, runs: Sequence[Path], overrides: Sequence[str] = ()):
        self.folders, self.overrides = members(runs), overrides
        self.recipe, self.label_set = read_recipe(self.folders[0], overrides)
        for folder in self.folders[1:]:
            if read_recipe(folder, overrides)[1].names != self.label_set.names:
                raise InputError(f"{folder}: its labels are not those of {self.folders[0]}")
        by = self.recipe.predict_by
        self.rule = None if by == "answer" else load_rule(runs, self.label_set, by)
        self._only: list[Labeller] = []

    def label(self, rows: Rows, *, with_prob: bool, batch_size: int, bar: Bar) -> Outcome:
        """See `predict_rows`. The model of a single run stays loaded; several are loaded one after another."""
        if len(self.folders) == 1 and not self._only:
            self._only.append(next(load_runs(self.folders, self.overrides)))
        labellers = self._only or load_runs(self.folders, self.overrides)
        return predict_rows(labellers, rows, rule=self.rule, with_prob=with_prob, batch_size=batch_size, bar=bar)


# ---------------------------------------------------------------------------------------------- files of any size

CHUNK = 1024  # texts that are labelled, written and forgotten at once
CHUNK_OF_SEVERAL = 16_384  # with several runs, which are loaded anew for each


@dataclass
class Summary:
    """What came of a file: how many rows it has, how many of its texts were cut, and how the answers were read (of
    those that were read in this call, and by one model alone)."""

    n_rows: int = 0
    n_cut: int = 0
    statuses: Counter[str] = field(default_factory=Counter)


def predict_file(
    runs: Sequence[Path],
    source: Path,
    overrides: Sequence[str] = (),
    *,
    csv_file: Path | None = None,
    jsonl_file: Path | None = None,
    batch_size: int = 32,
    overwrite: bool = False,
    bar: Bar,
) -> Summary:
    """Label the texts of a file of any size, a chunk at a time; interrupted, the same call goes on after the last one.

    Under `accelerate launch` the texts of each chunk are spread over the processes, and the main one writes.

    Args:
        runs: run folders, cross-validations, or a recipe.
        source: a CSV, TSV, JSONL or Parquet file with texts.
        csv_file, jsonl_file: what to write; one of them at least.
        overwrite: begin anew where other work was broken off.

    Raises:
        InputError: what is missing or wrong, and where; what has been labelled before is kept.
    """
    panel = Panel(runs, overrides)
    recipe, label_set = panel.recipe, panel.label_set
    job = {"runs": [str(run.resolve()) for run in runs], "input": str(source.resolve()), "overrides": list(overrides)}
    files = [file for file in (csv_file, jsonl_file) if file is not None]
    growing = results.Growing(files, job, overwrite=overwrite)
    chunks = stream_rows(
        source,
        label_set,
        size=CHUNK if len(panel.folders) == 1 else CHUNK_OF_SEVERAL,
        text_column=recipe.text_column,
        id_column=recipe.id_column,
        separator=recipe.separator,
        encoding=recipe.encoding,
    )
    summary = Summary()
    for rows in chunks:
        n_before, summary.n_rows = summary.n_rows, summary.n_rows + len(rows)
        if len(rows) and growing.has(rows, n_before):
            continue
        done = panel.label(rows, with_prob=jsonl_file is not None, batch_size=batch_size, bar=bar)
        for prediction in done.predictions or ():
            summary.statuses[prediction.parsed.status] += 1
            summary.n_cut += prediction.n_cut > 0
        if not ranks.is_main():
            continue
        texts = []
        if csv_file:
            texts.append(results.csv_lines(rows, done.pred, label_set, header=not n_before))
        if jsonl_file:
            texts.append(results.json_lines(rows, done.pred, done.prob, label_set, done.predictions))
        growing.add(texts, len(rows))
    if ranks.is_main():
        growing.finish(summary.n_rows)
    return summary
