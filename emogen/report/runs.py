"""A run folder -> its facts for the report page and the model card, with its predictions scored again."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from emogen.evaluation import results, run_folder
from emogen.evaluation.audit_file import AuditFile, read_audit
from emogen.evaluation.caveats import caveats, fold_caveats
from emogen.evaluation.metrics import (
    Interval,
    Metrics,
    Objective,
    apply_thresholds,
    bootstrap,
    calibration,
    intervals,
    nested_thresholds,
    score,
    score_nested,
)
from emogen.evaluation.results import ScoredRows
from emogen.evaluation.run_folder import (
    BASELINE,
    LABELS,
    MANIFEST,
    METRICS,
    PROMPT,
    RECIPE,
    RUN,
    fold_folders,
    fold_number,
    kind_of,
    label_set_of,
    read_folds,
    read_json,
    read_manifest,
    read_text,
    tuned_for,
)
from emogen.task.labels import LabelSet
from emogen.task.parse import FAILED
from emogen.task.yaml_files import read_yaml

FEATURES = {"tfidf": "TF-IDF", "emoji": "emoji"}


@dataclass(frozen=True)
class Decision:
    """One way of deciding the labels of n rows, with its metrics.

    Attributes:
        title: `answer`, `threshold 0.5`, `most probable label` or `nested thresholds`.
        pred: int8 [n, L].
        thresholds: the thresholds of each row, [n, L]; None unless they are nested.
        metrics: the result of `metrics.score` or `score_nested`.
        resampled: the result of `metrics.bootstrap`: F1 by name, each [n_resamples].
        intervals: the 95 % interval of each of these; None where none can be given.
    """

    title: str
    pred: np.ndarray
    thresholds: np.ndarray | None
    metrics: Metrics
    resampled: dict[str, np.ndarray]
    intervals: dict[str, Interval]


@dataclass(frozen=True)
class ParseAudit:
    """How the n answers of a run were parsed.

    Attributes:
        statuses: (status, number of answers, whether it is a failure), the most frequent first.
        unknown: (word, number of answers) for the most frequent words that are not labels.
        n_failed: number of answers that could not be parsed.
        n_cut: number of texts that were shortened to fit.
    """

    n: int
    statuses: list[tuple[str, int, bool]]
    unknown: list[tuple[str, int]]
    n_failed: int
    n_cut: int


@dataclass(frozen=True)
class Scores:
    """The held-out rows of a run, scored again.

    Attributes:
        rows: the n rows.
        records: the n lines of the predictions file.
        decisions: by answer (or threshold 0.5, or the most probable label), and by nested thresholds unless there are
            too few rows or the label set says `exactly_one`.
        calibration: the result of `metrics.calibration`.
        audit: None if the classifier generates no answers.
    """

    rows: ScoredRows
    records: list[dict[str, Any]]
    decisions: list[Decision]
    calibration: dict[str, Any]
    audit: ParseAudit | None

    @property
    def best_first(self) -> list[Decision]:
        """The decisions in the order of their macro-F1 on these rows, the highest first; of equal ones the answer."""
        return sorted(self.decisions, key=lambda decision: -decision.metrics["f1_macro"])

    @property
    def choice(self) -> str:
        """Which decision comes first in the page and in the card, and why."""
        if len(self.decisions) < 2:
            return ""
        best, other = self.best_first
        f1_macro = [decision.metrics["f1_macro"] for decision in (best, other)]
        if f1_macro[0] == f1_macro[1]:
            return f"Shown first: {best.title}. Both ways to decide the labels have the same macro-F1 on these rows."
        return (
            f"Shown first: {best.title}, whose macro-F1 on these rows is the higher one ({f1_macro[0]:.3f}; "
            f"{other.title}: {f1_macro[1]:.3f}). The better of two on the rows that are scored is slightly flattered "
            "by this choice."
        )

    @property
    def caveats(self) -> list[str]:
        """What a reader has to know before the metrics can be believed."""
        return caveats([(decision.title, decision.metrics) for decision in self.best_first])

    def in_order_of(self, ids: Sequence[str]) -> "Scores":
        """The same scores, with the rows in the order of the given ids."""
        order = self.rows.positions(ids)
        decisions = [
            replace(
                decision,
                pred=decision.pred[order],
                thresholds=None if decision.thresholds is None else decision.thresholds[order],
            )
            for decision in self.decisions
        ]
        return replace(self, rows=self.rows.take(order), records=[self.records[i] for i in order], decisions=decisions)


@dataclass(frozen=True)
class Run:
    """The facts of a run, a cross-validation or a baseline.

    Attributes:
        name: the name of its folder.
        kind: see `run_folder.kind_of`.
        model: the base model, or the method of a baseline.
        generates: whether it generates answers, rather than probabilities alone.
        recipe: the keys of its recipe.
        files: name -> text of the files that configure it.
        manifest, metrics: the contents of these files; empty if they are missing.
        fold_metrics: the metrics of each finished fold of a cross-validation, by number.
        n_folds: the number of folds; 0 for a run.
        logs: the log of the trainer, or of each fold's trainer.
        scores: None if no rows were scored.
        audit: what `emogen audit` said about these rows; None if nobody has asked.
    """

    name: str
    folder: Path
    kind: str
    model: str
    generates: bool
    label_set: LabelSet
    recipe: dict[str, Any]
    files: dict[str, str]
    manifest: dict[str, Any]
    metrics: Metrics
    fold_metrics: dict[int, Metrics]
    n_folds: int
    logs: list[list[dict[str, Any]]]
    scores: Scores | None
    audit: AuditFile | None


@dataclass(frozen=True)
class FoldTable:
    """Macro-F1 and micro-F1 (`f1_macro`, `f1_micro`) of each fold, by the title of the decision.

    Attributes:
        numbers: the numbers of the folds.
        values: decision -> metric -> the value of each fold.
        mean, sd: decision -> metric -> mean and standard deviation; empty until all folds are finished.
        caveats: folds whose figures say little.
    """

    numbers: list[int]
    values: dict[str, dict[str, list[float]]]
    mean: dict[str, dict[str, float]]
    sd: dict[str, dict[str, float]]
    caveats: list[str]


def read_run(folder: Path, objective: Objective | None = None) -> Run:
    """Read the folder of a run, a cross-validation or a baseline, and score its predictions again.

    Args:
        objective: what nested thresholds are tuned for. Default: the recipe says it (`tune`).

    Raises:
        InputError: the folder is none of these, or one of its files is not valid.
    """
    label_set, kind = label_set_of(folder), kind_of(folder)
    files = {name: text for name in (RECIPE, PROMPT, LABELS, MANIFEST) if (text := read_text(folder / name))}
    recipe = read_yaml(folder / RECIPE)[0] if RECIPE in files else {}
    generates = kind != BASELINE and recipe.get("answer") != "head"
    folds = fold_folders(folder)
    has_predictions = (folder / run_folder.PREDICTIONS).is_file()
    return Run(
        name=folder.resolve().name,
        folder=folder,
        kind=kind,
        model=_baseline_name(recipe) if kind == BASELINE else recipe.get("model_name_or_path", "unnamed model"),
        generates=generates,
        label_set=label_set,
        recipe=recipe,
        files=files,
        manifest=read_manifest(folder),
        metrics=read_json(folder / METRICS),
        fold_metrics={fold_number(fold): read_json(fold / METRICS) for fold in folds if (fold / METRICS).is_file()},
        n_folds=len(set(read_folds(folder).values())),
        logs=[entries for trained in folds or [folder] if (entries := results.read_log(trained))],
        scores=_score(folder, label_set, generates, objective or tuned_for(folder)) if has_predictions else None,
        audit=read_audit(folder),
    )


def _baseline_name(recipe: dict[str, Any]) -> str:
    features = recipe.get("features") or ["tfidf"]
    return f"{', '.join(FEATURES.get(name, name) for name in features)} and logistic regression"


def _score(folder: Path, label_set: LabelSet, generates: bool, objective: Objective) -> Scores:
    rows = results.read_scored(folder, label_set)
    records = results.read_records(rows.path)
    titles = decision_titles(generates, label_set)
    decided: list[tuple[str, np.ndarray, np.ndarray | None]] = [(titles["answer"], rows.pred, None)]
    if len(np.unique(rows.folds)) > 1 and not label_set.exactly_one:
        thresholds = nested_thresholds(rows.gold, rows.prob, rows.folds, objective)
        decided.append((titles["thresholds"], apply_thresholds(rows.prob, thresholds), thresholds))
    resampled = bootstrap(rows.gold, [pred for _, pred, _ in decided], label_set.names)
    scored = [
        score(rows.gold, pred, label_set.names, exactly_one=label_set.exactly_one)
        if thresholds is None
        else score_nested(rows.gold, pred, rows.folds, label_set.names)
        for _, pred, thresholds in decided
    ]
    return Scores(
        rows=rows,
        records=records,
        decisions=[
            Decision(
                title=title,
                pred=pred,
                thresholds=thresholds,
                metrics=metrics,
                resampled=values,
                intervals=intervals(values, metrics),
            )
            for (title, pred, thresholds), metrics, values in zip(decided, scored, resampled, strict=True)
        ],
        calibration=calibration(rows.gold, rows.prob, label_set.names),
        audit=audit_answers(records) if generates else None,
    )


def decision_titles(generates: bool, label_set: LabelSet) -> dict[str, str]:
    """The titles of the decisions, by their keys in metrics.json."""
    by_prob = "most probable label" if label_set.exactly_one else "threshold 0.5"
    return {"answer": "answer" if generates else by_prob, "thresholds": "nested thresholds"}


def audit_answers(records: Sequence[dict[str, Any]]) -> ParseAudit:
    """Count how the answers of a predictions file were parsed."""
    statuses = Counter(record["status"] for record in records)
    unknown = Counter(word for record in records for word in record["unknown"])
    return ParseAudit(
        n=len(records),
        statuses=[(status, count, status in FAILED) for status, count in statuses.most_common()],
        unknown=unknown.most_common(20),
        n_failed=sum(statuses[status] for status in FAILED),
        n_cut=sum("tokens_cut" in record for record in records),
    )


def notes(run: Run) -> list[str]:
    """Sentences about what is missing in a run folder, and how to get it."""
    missing = []
    if not run.metrics:
        note = f"Not finished: there is no {METRICS}. The command that started it resumes it"
        if run.kind == RUN:
            missing.append(f"{note}, with resume_from_checkpoint=true.")
        else:
            missing.append(f"{note}; {len(run.fold_metrics)} of {run.n_folds} folds are finished.")
    elif run.scores is None:
        missing.append(
            "No rows were scored: the recipe names none. With eval_file=FILE or eval_fraction=0.1, a run scores "
            "held-out rows at its end; emogen cv scores all rows."
        )
    return missing


def fold_table(run: Run) -> FoldTable | None:
    """The metrics of the folds; of an unfinished cross-validation, of the finished folds by their answers.

    Returns:
        None for a run, or if no fold is scored.
    """
    if run.kind == RUN:
        return None
    titles = decision_titles(run.generates, run.label_set)
    if "folds" in run.metrics:
        values, mean, sd = (
            {titles[decision]: by_metric for decision, by_metric in run.metrics[key].items()}
            for key in ("folds", "mean", "sd")
        )
        numbers = list(range(len(values[titles["answer"]]["f1_macro"])))
        return FoldTable(numbers, values, mean, sd, fold_caveats(run.metrics, titles))
    keys = ("f1_macro", "f1_micro")
    numbers = sorted(k for k, metrics in run.fold_metrics.items() if all(key in metrics for key in keys))
    if not numbers:
        return None
    by_metric = {key: [run.fold_metrics[k][key] for k in numbers] for key in keys}
    partial = (
        f"{len(numbers)} of {run.n_folds} folds are finished: these figures are not those of the cross-validation."
    )
    return FoldTable(numbers, {titles["answer"]: by_metric}, {}, {}, [partial])


def resources(run: Run) -> list[tuple[str, str]]:
    """The time, speed and memory of a run: (what was measured, value with unit), as far as they are known."""
    return [*_training(run), *_inference(run), *_machine(run)]


def _training(run: Run) -> Iterable[tuple[str, str]]:
    parts = _parts(run)
    speeds = [log[-1]["train_samples_per_second"] for log in run.logs if "train_samples_per_second" in log[-1]]
    if seconds := sum(part.get("train_seconds", 0) for part in parts):
        yield f"training{_of_folds(parts)}", _duration(seconds)
    if n_rows := parts[0].get("train_rows"):
        yield "training rows per fold" if len(parts) > 1 else "training rows", f"{n_rows:,}"
    if speeds:
        yield "training speed", f"{np.mean(speeds):.1f} rows/s"


def _inference(run: Run) -> Iterable[tuple[str, str]]:
    parts = _parts(run)
    came_apart = any("prob_seconds" in part for part in parts)
    answers = "answers" if came_apart else "answers and probabilities"
    for key, title in (("answer_seconds", answers), ("prob_seconds", "probabilities")):
        if seconds := sum(part.get(key, 0) for part in parts):
            n_rows = sum(part.get("n", 0) for part in parts)
            yield f"{title}{_of_folds(parts)}", f"{_duration(seconds)}, {n_rows / seconds:.1f} rows/s"


def _machine(run: Run) -> Iterable[tuple[str, str]]:
    if memory := max(part.get("peak_memory_bytes", 0) for part in _parts(run)):
        yield "peak memory", f"{memory / 2**30:.1f} GiB"
    if hardware := run.manifest.get("hardware"):
        gpus = ", ".join(f"{n} × {gpu}" for gpu, n in Counter(hardware["gpus"]).items())
        yield "hardware", gpus or f"CPU, {hardware['threads']} threads ({hardware['machine']})"


def _parts(run: Run) -> list[Metrics]:
    """The metrics of the folds, or of the run itself."""
    return list(run.fold_metrics.values()) or [run.metrics]


def _of_folds(parts: Sequence[Metrics]) -> str:
    return f" of {len(parts)} folds" if len(parts) > 1 else ""


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
