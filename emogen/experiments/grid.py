"""Rows × templates: what each template answers for each row, in one HTML page that needs nothing else.

`emogen prompts compare` writes it beside its scores. The lab serves it, and there it grows while rows are scored.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emogen import paths
from emogen.distribution import __version__
from emogen.evaluation.metrics import most_probable, nested_pred, score
from emogen.evaluation.results import as_strings, pred_matrix, read_records, read_scored
from emogen.evaluation.run_folder import PROMPT, read_text
from emogen.experiments.prompts import PromptBenchmark
from emogen.experiments.scores import KeptScores, folds_of, predictions_of, row_keys
from emogen.report.templates import load_template
from emogen.task.prompt import parse_prompt

PAGE = "grid.html"  # beside the scores of templates
TEMPLATE = Path(__file__).with_name("grid.html")


def write_grid(benchmark: PromptBenchmark, titles: Sequence[str], folders: Sequence[Path]) -> Path:
    """Write the page of some templates.

    Args:
        titles: the names of the templates.
        folders: of each template or of its run, with predictions for the rows of the benchmark.

    Returns:
        The file.
    """
    label_set, rows = benchmark.task.label_set, benchmark.rows
    columns = []
    for title, folder in zip(unique_titles(titles, folders), folders, strict=True):
        scored = read_scored(folder, label_set)
        index = scored.positions(rows.ids)
        records, scored = read_records(scored.path), scored.take(index)
        raws = [records[i]["raw"] for i in index]
        folds = scored.folds if len(np.unique(scored.folds)) > 1 else None
        columns.append(_column(benchmark, folder.name, title, range(len(rows)), scored.pred, scored.prob, raws, folds))
    path = benchmark.folder / PAGE
    with paths.writing(path) as file:
        file.write(render(benchmark, columns))
    return path


def unique_titles(names: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """The names of templates; with the digest of its source where several templates have the same."""
    return [
        name if list(names).count(name) == 1 else f"{name} ({folder.name.removeprefix(f'{name}-')})"
        for name, folder in zip(names, folders, strict=True)
    ]


def render(benchmark: PromptBenchmark, columns: Sequence[dict[str, Any]], *, live: bool = False) -> str:
    """The page. Everything in it is escaped: texts, labels, names of templates.

    Args:
        columns: see `_column`.
        live: whether the page is served by the lab, and asks it for news.
    """
    rows, label_set = benchmark.rows, benchmark.task.label_set
    data = {
        "title": f"Rows × templates: {len(rows):,} rows of {Path(rows.path).name}, {benchmark.recipe.model_name}",
        "names": label_set.names,
        "empty": label_set.empty,
        "ids": rows.ids,
        "texts": rows.texts,
        "gold": as_strings(rows.truth),
        "decisions": ["answer", _other_decision(benchmark)],
        "columns": columns,
        "live": live,
    }
    return load_template(TEMPLATE).render(data=data, generator=f"emogen {__version__}")


def _other_decision(benchmark: PromptBenchmark) -> str:
    return "most probable label" if benchmark.task.label_set.exactly_one else "nested thresholds"


class GrowingGrid:
    """The columns of all templates in a store, as far as the rows of a benchmark are scored."""

    def __init__(self, benchmark: PromptBenchmark):
        self.benchmark = benchmark
        self._kept: dict[Path, KeptScores] = {}
        self._folds = folds_of(benchmark)
        self._positions = defaultdict(list)  # of each row
        for i, key in enumerate(row_keys(benchmark.rows)):
            self._positions[key].append(i)

    def news(self, have: Mapping[str, int]) -> list[dict[str, Any]]:
        """What is new since the last time.

        Args:
            have: for each template that the page knows, by its folder's name: the number of rows that the page has.

        Returns:
            The templates with new rows, as columns that have these rows alone.
        """
        folders = sorted(self.benchmark.store.glob("*/"))
        titles = unique_titles([folder.name.rpartition("-")[0] for folder in folders], folders)
        found = []
        for folder, title in zip(folders, titles, strict=True):
            kept = self._kept.setdefault(folder, KeptScores(folder)).read()
            index = [i for key in kept.of_row for i in self._positions.get(key, ())]
            n_known = have.get(folder.name, 0)
            if n_known < len(index):
                style = style_of(self.benchmark, folder)
                label_set, rows = self.benchmark.task.label_set, self.benchmark.rows.take(index)
                predictions, prob = predictions_of(kept, rows, label_set, style)
                pred, raws = pred_matrix(predictions), [prediction.raw for prediction in predictions]
                column = _column(self.benchmark, folder.name, title, index, pred, prob, raws, self._folds)
                found.append(column | {key: column[key][n_known:] for key in ("rows", "pred", "prob", "raw")})
        return found


def style_of(benchmark: PromptBenchmark, folder: Path) -> str:
    """The style of the answers of a template in the store."""
    prompt = parse_prompt(read_text(folder / PROMPT) or "", str(folder / PROMPT))
    return prompt.style[0] if prompt.style else benchmark.recipe.answer


def _column(
    benchmark: PromptBenchmark,
    key: str,
    title: str,
    index: Sequence[int],
    pred: np.ndarray,
    prob: np.ndarray,
    raws: Sequence[str],
    folds: np.ndarray | None,
) -> dict[str, Any]:
    """A template as the page reads it.

    Args:
        key: names the template for the page.
        index: the positions of m rows in the benchmark.
        pred, prob: [m, L].
        raws: m answers.
        folds: of all n rows, for nested thresholds; None for no such.

    Returns:
        `rows`, `pred`, `prob` (per mille) and `raw` of the m rows. If these are all rows, `f1` by decision, and
        `decided`: the labels by the other decision than the answer.
    """
    label_set, gold = benchmark.task.label_set, benchmark.rows.truth
    f1, decided = {}, None
    if len(index) == len(gold):
        in_order = np.argsort(np.asarray(index))
        f1["answer"] = score(gold, pred[in_order], label_set.names)["f1_macro"]
        if label_set.exactly_one:
            decided = most_probable(prob[in_order])
        elif folds is not None:
            decided = nested_pred(gold, prob[in_order], folds)
        if decided is not None:
            f1[_other_decision(benchmark)] = score(gold, decided, label_set.names)["f1_macro"]
    return {
        "key": key,
        "title": title,
        "rows": [int(i) for i in index],
        "pred": as_strings(pred),
        "prob": np.round(prob * 1000).astype(int).tolist(),
        "raw": list(raws),
        "f1": f1,
        "decided": None if decided is None else as_strings(decided),
    }
