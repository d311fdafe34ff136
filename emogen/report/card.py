"""What `report.read_run` says of a run -> its model card: Markdown, under the metadata that the Hub reads."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from emogen.evaluation.run_folder import LABELS, PROMPT
from emogen.evaluation.tables import SINGLES

# The folders of a path in a recipe or manifest. A card is for others: where files lie on this machine is not for them.
FOLDERS = re.compile(r"""(?<![\w:/.~])~?/(?:[^\n"'/\\]+/)+""")


def model_card(run: dict[str, Any], *, published: Sequence[tuple[str, float]] = ()) -> ModelCard:
    """The model card of a run or of a cross-validation.

    Its metadata name the base model (unless that is a folder, which nobody else has), the library, the task, the
    dataset (if it is one of the Hub's), and in `model-index` macro-F1, micro-F1 and the F1 of each label, as they come
    out by what the recipe's `predict_by` says.

    Args:
        run: as `report.read_run` gives it.
        published: names and macro-F1 of systems to stand beside.
    """
    recipe, head = run["recipe"], run["recipe"].get("answer") == "head"
    base = None if Path(run["model"]).exists() or Path(run["model"]).is_absolute() else run["model"]
    data = ModelCardData(
        base_model=base,
        library_name="peft" if recipe.get("use_peft", True) else "transformers",
        pipeline_tag="text-classification" if head else "text-generation",
        datasets=[recipe["dataset_name"]] if recipe.get("dataset_name") else None,
        metrics=["f1"],
        tags=["emogen", "multi-label-classification"],
        model_name=run["name"],
        eval_results=_eval_results(run) if "systems" in run else None,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, _sections(run, published))) + "\n")


def _eval_results(run: dict[str, Any]) -> list[EvalResult]:
    recipe = run["recipe"]
    by = 0 if recipe.get("predict_by", "answer") == "answer" else -1
    system = run["systems"][by]
    hub, file = recipe.get("dataset_name"), recipe.get("eval_file") or recipe.get("train_file")
    metrics = system["metrics"]
    figures = {"macro-F1": metrics["f1_macro"], "micro-F1": metrics["f1_micro"]}
    figures |= {f"F1 {name}": label["f1"] for name, label in metrics["per_label"].items()}
    return [
        EvalResult(
            task_type="text-classification",
            task_name="multi-label text classification",
            dataset_type=hub or "csv",
            dataset_name=hub or Path(file or "held-out rows").stem,
            metric_type="f1",
            metric_name=f"{name} (by {system['title']})",
            metric_value=round(value, 4),
        )
        for name, value in figures.items()
    ]


def _sections(run: dict[str, Any], published: Sequence[tuple[str, float]]) -> Iterable[str]:
    recipe, names = run["recipe"], run["label_set"].names
    yield f"# {run['name']}"
    how = (
        "a classification head" if recipe.get("answer") == "head" else "instruction generation, decoded under a grammar"
    )
    what = "The folds of a cross-validation of" if run["kind"] == "cross-validation" else "A tuned"
    model = Path(run["model"]).name if Path(run["model"]).is_absolute() else run["model"]
    yield (
        f"{what} `{model}` that names the labels of a text: {', '.join(names)}. "
        f"Multi-label text classification by {how}, made with emogen."
    )
    yield "\n".join(run["missing"])
    yield _fenced(f"emogen predict {run['name']} YOUR.csv -o OUT.csv", "sh")
    if "systems" in run:
        yield from _figures(run, published)
    if run["resources"]:
        yield "## Speed and memory"
        yield _table(("", ""), run["resources"])
    yield "## How it was made"
    for name, text in run["files"].items():
        yield f"`{name}`"
        yield _fenced(text if name in (PROMPT, LABELS) else FOLDERS.sub("", text), name.rpartition(".")[2])


def _figures(run: dict[str, Any], published: Sequence[tuple[str, float]]) -> Iterable[str]:
    systems, audit = run["systems"], run["audit"]
    yield f"## Scores on {systems[0]['metrics']['n']:,} rows that were held out"
    yield (
        "With 95 % bootstrap intervals. Thresholds are nested: none has seen the row that it decides."
        if len(systems) > 1
        else "With 95 % bootstrap intervals."
    )
    headings = ("", *(f"by {of['title']}" for of in systems))
    rows = [
        (title, *(_with_interval(of, key) for of in systems))
        for key, title in ({"f1_macro": "macro-F1"} | SINGLES).items()
    ]
    yield _table(headings, rows)
    for of in systems:
        yield f"By {of['title']}:"
        labels = of["metrics"]["per_label"].items()
        yield _table(
            ("label", "rows", "precision", "recall", "F1", "95 %"),
            [
                (
                    name,
                    f"{label['support']:,}",
                    *(f"{label[key]:.3f}" for key in ("precision", "recall", "f1")),
                    "{:.3f} to {:.3f}".format(*of["interval"][f"f1/{name}"]),
                )
                for name, label in labels
            ],
        )
    if published:
        yield "Macro-F1 that others report on the same task, on rows of their own:"
        yield _table(("system", "macro-F1"), [(name, f"{f1:.3f}") for name, f1 in published])
    if audit:
        yield "How the answers were read:"
        statuses = [(status, f"{n:,}", f"{n / audit['n']:.1%}") for status, n, _ in audit["statuses"]]
        yield _table(("status", "answers", "share"), statuses)


def _with_interval(system: dict[str, Any], key: str) -> str:
    value = f"{system['metrics'][key]:.3f}"
    return "{} ({:.3f} to {:.3f})".format(value, *system["interval"][key]) if key in system["interval"] else value


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _fenced(text: str, language: str) -> str:
    """A code block; its fence is longer than any that the text has."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
