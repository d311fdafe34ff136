"""The model card of a run: Markdown below the metadata that the Hugging Face Hub reads."""

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from emogen.evaluation.caveats import references
from emogen.evaluation.metrics import Interval
from emogen.evaluation.run_folder import CROSS_VALIDATION, LABELS, PROMPT
from emogen.evaluation.tables import AGGREGATES
from emogen.report.compare import PUBLISHED_NOTE, ComparisonRow, f1_by_label
from emogen.report.runs import Decision, Run, Scores, notes, resources

# The folders of a path in a recipe or manifest. A card is published; the places of files on this machine are private.
FOLDERS = re.compile(r"""(?<![\w:/.~])~?/(?:[^\n"'/\\]+/)+""")


def model_card(run: Run, *, published: Sequence[ComparisonRow] = ()) -> ModelCard:
    """Write the model card of a run or a cross-validation.

    The metadata name the base model (unless it is a local folder), the library, the task, the dataset (if it is on the
    Hub), and in `model-index` macro-F1, micro-F1 and the F1 of each label. These are of the labels that `emogen
    predict` gives: decided by the recipe's `predict_by`, a rule that does not depend on the scores. The tables show
    both ways to decide, the better one on these rows first, as the report page does.

    Args:
        published: published systems for the table of results.
    """
    is_local = Path(run.model).exists() or Path(run.model).is_absolute()
    dataset = run.recipe.get("dataset_name")
    data = ModelCardData(
        base_model=None if is_local else run.model,
        library_name="peft" if run.recipe.get("use_peft", True) else "transformers",
        pipeline_tag="text-generation" if run.generates else "text-classification",
        datasets=[dataset] if dataset else None,
        metrics=["f1"],
        tags=["emogen", f"{_problem(run)}-classification"],
        model_name=run.name,
        eval_results=_eval_results(run, run.scores) if run.scores else None,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, _sections(run, published))) + "\n")


def _problem(run: Run) -> str:
    return "multi-class" if run.label_set.exactly_one else "multi-label"


def _indexed(run: Run, scores: Scores) -> Decision:
    """The decision of `model-index`: that of the recipe's `predict_by`; a stack of one run has nested thresholds."""
    return scores.decisions[0 if run.recipe.get("predict_by", "answer") == "answer" else -1]


def _eval_results(run: Run, scores: Scores) -> list[EvalResult]:
    """The entries of `model-index`."""
    dataset, file = run.recipe.get("dataset_name"), run.recipe.get("eval_file") or run.recipe.get("train_file")
    decision = _indexed(run, scores)
    values = {"macro-F1": decision.metrics["f1_macro"], "micro-F1": decision.metrics["f1_micro"]}
    values |= {f"F1 {name}": f1 for name, f1 in f1_by_label(decision.metrics).items()}
    return [
        EvalResult(
            task_type="text-classification",
            task_name=f"{_problem(run)} text classification",
            dataset_type=dataset or "csv",
            dataset_name=dataset or Path(file or "held-out rows").stem,
            metric_type="f1",
            metric_name=f"{name} ({decision.title})",
            metric_value=round(value, 4),
        )
        for name, value in values.items()
    ]


def _sections(run: Run, published: Sequence[ComparisonRow]) -> Iterable[str]:
    """The paragraphs of the card; empty ones are dropped."""
    method = "instruction generation with constrained decoding" if run.generates else "a classification head"
    base = Path(run.model).name if Path(run.model).is_absolute() else run.model
    folds = ", one model for each fold of a cross-validation" if run.kind == CROSS_VALIDATION else ""
    yield f"# {_plain(run.name)}"
    yield (
        f"`{base}`, fine-tuned with emogen for {_problem(run)} text classification by {method}{folds}. "
        f"Labels: {_plain(', '.join(run.label_set.names))}."
    )
    yield _plain("\n".join(notes(run)))
    yield _fenced(f"emogen predict {shlex.quote(run.name)} YOUR.csv -o OUT.csv", "sh")
    if run.scores:
        yield from _results(run, run.scores, published)
    if measured := resources(run):
        yield "## Speed and memory"
        yield _table(("", ""), measured)
    yield "## Configuration"
    for name, text in run.files.items():
        yield f"`{name}`"
        yield _fenced(text if name in (PROMPT, LABELS) else FOLDERS.sub("", text), name.rpartition(".")[2])


def _results(run: Run, scores: Scores, published: Sequence[ComparisonRow]) -> Iterable[str]:
    decisions, audit = scores.best_first, scores.audit
    yield f"## Results on {len(scores.rows.ids):,} held-out rows"
    yield "\n".join(f"- {_plain(caveat)}" for caveat in scores.caveats)
    if len(decisions) > 1:
        by = run.recipe.get("predict_by", "answer")
        yield f"{scores.choice} The metadata have the scores by {_indexed(run, scores).title} (`predict_by: {by}`)."
    nested = " Nested thresholds: those of a row are tuned on the other folds." if len(decisions) > 1 else ""
    yield f"Intervals are 95 % bootstrap intervals over the rows.{nested}"
    titles = {"f1_macro": "macro-F1"} | AGGREGATES
    rows = [(title, *(_with_interval(decision, key) for decision in decisions)) for key, title in titles.items()]
    yield _table(("metric", *(decision.title for decision in decisions)), rows)
    constant = references(decisions[0].metrics)
    values = [(reference.title, f"{reference.f1_macro:.3f}", f"{reference.f1_micro:.3f}") for reference in constant]
    yield _table(("without a model", "macro-F1", "micro-F1"), values)
    for decision in decisions:
        yield f"By label, {decision.title}:"
        yield _table(("label", "rows", "precision", "recall", "F1", "95 %"), _label_rows(decision))
    if published:
        yield PUBLISHED_NOTE
        yield _table(("system", "macro-F1"), [(row.name, f"{row.f1_macro:.3f}") for row in published])
    if audit:
        yield "How the answers were parsed:"
        statuses = [(status, f"{n:,}", f"{n / audit.n:.1%}") for status, n, _ in audit.statuses]
        yield _table(("status", "answers", "share"), statuses)


def _label_rows(decision: Decision) -> Iterable[Sequence[str]]:
    for name, label in decision.metrics["per_label"].items():
        values = [f"{label[key]:.3f}" for key in ("precision", "recall", "f1")]
        yield name, f"{label['support']:,}", *values, _ends(decision.intervals[f"f1/{name}"])


def _with_interval(decision: Decision, key: str) -> str:
    value = f"{decision.metrics[key]:.3f}"
    if key not in decision.intervals:
        return value
    return f"{value} ({_ends(decision.intervals[key])})"


def _ends(ends: Interval) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else "no interval"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(map(_plain, line)) + " |" for line in lines)


def _plain(text: str) -> str:
    """Text whose characters are not Markdown: a label or a file may have any name."""
    return re.sub(r"[\\`*<>\[\]|~]|\b_|_\b", r"\\\g<0>", text)


def _fenced(text: str, language: str) -> str:
    """A code block. Its fence is longer than any run of backticks in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
