"""A run folder -> everything that page and card say about it, scored again from its files."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from emogen.evaluation import results, run_folder
from emogen.evaluation.metrics import apply_thresholds, bootstrap, calibration, interval, nested_thresholds, score
from emogen.evaluation.run_folder import LABELS, MANIFEST, PROMPT, RECIPE, kind_of, label_set_of, read_json, read_text
from emogen.report.compare import Row, published, rows_of
from emogen.task.parse import FAILED

BASELINE_NAME = "TF-IDF and logistic regression"


def read_run(folder: Path) -> dict[str, Any]:
    """What is in the folder of a run, of a cross-validation or of a baseline, scored again.

    Returns:
        `name`; `kind` (run, cross-validation or baseline); `model`; `label_set`; `recipe` (the keys of its YAML file);
        `files` (what makes the run, name -> text); `manifest` and `metrics` (of these JSON files; empty without them);
        `folds` (the metrics of each fold of a cross-validation that is finished) of `n_folds`; `logs` (one for each
        training); `resources` (see there); `missing` (sentences: what is not there, and how to come by it).
        Where rows were scored, also `scored` (`results.Scored`), `records` (the lines of the predictions file), `audit`
        (see there; None where no answer is generated), `calibration`, and `systems`: what decides the labels, first the
        answer and then nested thresholds, each with `title`, `pred` [n, L], `metrics` (of `score.score`), `resampled`
        and `interval` (figure -> what the bootstrap found, and its 95 %), and `thresholds` [n, L] of the latter.

    Raises:
        InputError: it is no such folder, or a file in it cannot be read.
    """
    label_set = label_set_of(folder)
    files = {name: text for name in (RECIPE, PROMPT, LABELS, MANIFEST) if (text := read_text(folder / name))}
    recipe = yaml.safe_load(files.get(RECIPE, "{}")) or {}
    fold_folders = sorted(folder.glob("fold-*/"))
    kind = kind_of(folder)
    folds = {
        int(f.name[5:]): read_json(f / run_folder.METRICS) for f in fold_folders if (f / run_folder.METRICS).is_file()
    }
    run: dict[str, Any] = {
        "name": folder.resolve().name,
        "folder": str(folder),
        "kind": kind,
        "model": BASELINE_NAME if kind == "baseline" else recipe.get("model_name_or_path", "a model that is not named"),
        "label_set": label_set,
        "recipe": recipe,
        "files": files,
        "manifest": read_json(folder / MANIFEST),
        "metrics": read_json(folder / run_folder.METRICS),
        "folds": folds,
        "n_folds": _n_folds(folder),
        "logs": [entries for f in fold_folders or [folder] if (entries := results.read_log(f))],
        "missing": [],
    }
    if not run["metrics"]:
        run["missing"].append(_unfinished(run))
    if (folder / run_folder.PREDICTIONS).is_file():
        run |= _scored_again(folder, run)
    elif run["metrics"]:
        run["missing"].append(
            "No rows were scored, for the recipe names none: eval_file=FILE or eval_fraction=0.1 holds rows out and "
            "scores them at the end of a run; emogen cv scores all."
        )
    return run | {"resources": resources(run)}


def _n_folds(folder: Path) -> int:
    """How many folds the rows of a cross-validation are in."""
    lines = (read_text(folder / run_folder.FOLDS) or "").split("\n")[1:]
    return len({line.rpartition(",")[2] for line in lines if line})


def _unfinished(run: dict[str, Any]) -> str:
    said = f"It has not ended: there is no {run_folder.METRICS}. The command that began it goes on with it"
    if run["kind"] == "run":
        return f"{said}, with resume_from_checkpoint=true."
    return f"{said}; {len(run['folds'])} of {run['n_folds']} folds are finished."


def _scored_again(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """What `read_run` says of the rows that were scored."""
    names = run["label_set"].names
    scored = results.read_scored(folder, run["label_set"])
    records = results.read_records(scored.path)
    systems: list[dict[str, Any]] = [{"title": titles_of(run)["answer"], "pred": scored.pred}]
    if len(np.unique(scored.folds)) > 1:
        thresholds = nested_thresholds(scored.gold, scored.prob, scored.folds)
        pred = apply_thresholds(scored.prob, thresholds)
        systems.append({"title": titles_of(run)["thresholds"], "pred": pred, "thresholds": thresholds})
    resampled = bootstrap(scored.gold, [system["pred"] for system in systems], names)
    for system, values in zip(systems, resampled, strict=True):
        system["metrics"] = score(scored.gold, system["pred"], names)
        system["resampled"] = values
        system["interval"] = {key: interval(of) for key, of in values.items()}
    return {
        "scored": scored,
        "records": records,
        "audit": audit(records) if generates(run) else None,
        "systems": systems,
        "calibration": calibration(scored.gold, scored.prob, names),
    }


def generates(run: dict[str, Any]) -> bool:
    """Whether there are answers, and not probabilities alone."""
    return run["kind"] != "baseline" and run["recipe"].get("answer") != "head"


def titles_of(run: dict[str, Any]) -> dict[str, str]:
    """What decides the labels, in words, by its name in metrics.json."""
    return {"answer": "answer" if generates(run) else "threshold 0.5", "thresholds": "nested thresholds"}


def audit(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How answers were read: `statuses` (status, rows, whether it is a failure), the commonest `unknown` words with
    their rows, and how many texts were `cut`."""
    statuses = Counter(record["status"] for record in records)
    unknown = Counter(word for record in records for word in record["unknown"])
    return {
        "n": len(records),
        "statuses": [(status, n, status in FAILED) for status, n in statuses.most_common()],
        "failed": sum(statuses[status] for status in FAILED),
        "unknown": unknown.most_common(20),
        "cut": sum("tokens_cut" in record for record in records),
    }


def resources(run: dict[str, Any]) -> list[tuple[str, str]]:
    """Time, speed and memory of a run, as far as they are known: what, and how much with its unit."""
    parts = list(run["folds"].values()) or [run["metrics"]]
    over = f" of {len(parts)} folds" if len(parts) > 1 else ""
    rows: list[tuple[str, str]] = []

    def total(key: str) -> float:
        return sum(part.get(key, 0) for part in parts)

    def last(key: str) -> list[float]:
        return [entries[-1][key] for entries in run["logs"] if key in entries[-1]]

    if seconds := total("train_seconds"):
        rows.append((f"training{over}", _duration(seconds)))
    if trained := parts[0].get("train_rows"):
        rows.append(("training rows" + (" of a fold" if over else ""), f"{trained:,}"))
    if speed := last("train_samples_per_second"):
        rows.append(("training speed", f"{np.mean(speed):.1f} rows/s"))
    for key, what in (("answer_seconds", "answers"), ("prob_seconds", "probabilities")):
        if seconds := total(key):
            rows.append((f"{what}{over}", f"{_duration(seconds)}, {total('n') / seconds:.1f} rows/s"))
    if memory := max((part.get("peak_memory_bytes", 0) for part in parts), default=0):
        rows.append(("peak memory", f"{memory / 2**30:.1f} GiB"))
    if hardware := run["manifest"].get("hardware"):
        gpus = ", ".join(f"{n} × {gpu}" for gpu, n in Counter(hardware["gpus"]).items())
        rows.append(("hardware", gpus or f"{hardware['threads']} threads of a CPU ({hardware['machine']})"))
    return rows


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def others(names: Sequence[str]) -> list[Row]:
    """The published systems, if these are their labels."""
    return rows_of([], with_published=True) if set(names) == set(published()["labels"]) else []
