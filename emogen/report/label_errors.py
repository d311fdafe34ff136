"""What `emogen audit` said about the rows of a run -> a section of its page, and data for the row browser."""

import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from emogen.distribution import install_hint
from emogen.errors import InputError
from emogen.evaluation.audit_file import AuditFile
from emogen.evaluation.results import ScoredRows
from emogen.evaluation.run_folder import AUDIT, BASELINE, CROSS_VALIDATION, RUN
from emogen.report.runs import Run
from emogen.task.labels import LabelSet


@dataclass(frozen=True)
class LabelErrors:
    """The section about labels that are probably wrong.

    Attributes:
        missing: why there is nothing to show, and what to do about it; "" if there is something.
        systems: the runs whose probabilities were used.
        by_label: for each label its name, the number of rows that have it, of those that have it though it is
            improbable, of those that lack it though it is probable, and the share of all rows that the last two are.
        n_suspected: rows with a label that is probably wrong.
        n_twins: rows whose text is nearly that of a row with other labels.
        relations: rules that nearly all rows obey.
        apply: the command that writes the rows with corrected labels; "" for a run, which was scored on a part of the
            rows.
        data: for the script of the page, see `_data`.
    """

    missing: str = ""
    systems: str = ""
    by_label: tuple[tuple[str, int, int, int, float], ...] = ()
    n_suspected: int = 0
    n_twins: int = 0
    relations: tuple[str, ...] = ()
    apply: str = ""
    data: dict[str, Any] | None = None


def label_errors(run: Run) -> LabelErrors | None:
    """Prepare the section of a run. None if no rows were scored, or if nobody has audited a run of a single split.

    Raises:
        InputError: the file names rows or labels that the run does not have.
    """
    if run.scores is None or (run.audit is None and run.kind not in (CROSS_VALIDATION, BASELINE)):
        return None
    folder = shlex.quote(str(run.folder))
    if run.audit is None:
        needs = "" if find_spec("cleanlab") else f" (it needs cleanlab: {install_hint('audit')})"
        return LabelErrors(
            missing="These labels have not been audited. emogen audit lists the rows whose labels are probably wrong, "
            f"and emogen report then shows them here: emogen audit {folder} && emogen report {folder}{needs}"
        )
    if not run.audit.is_of(run.folder):
        return LabelErrors(
            missing=f"{AUDIT} is about other predictions than these, so it is not shown. To audit these: emogen audit "
            f"{folder}"
        )
    rows = run.scores.rows
    try:
        data = _data(run.audit, rows, run.label_set)
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{run.folder / AUDIT}: {error}: not a row or a label of this run; was the file changed? emogen audit "
            "writes it again"
        ) from None
    suspected = np.zeros_like(rows.gold)
    for row in data["rows"]:
        suspected[row["row"]] = list(map(int, row["suspected"]))
    list_file = os.path.normpath(run.folder / run.audit.list_file)
    counts = ((suspected & rows.gold).sum(axis=0), (suspected & (1 - rows.gold)).sum(axis=0))
    columns = [cells.tolist() for cells in (rows.gold.sum(axis=0), *counts, suspected.mean(axis=0))]
    return LabelErrors(
        systems=", ".join(run.audit.systems),
        by_label=tuple(zip(run.label_set.names, *columns, strict=True)),
        n_suspected=int(suspected.any(axis=1).sum()),
        n_twins=sum(bool(row.twins) for row in run.audit.rows),
        relations=tuple(relation.sentence for relation in run.audit.relations),
        apply="" if run.kind == RUN else f"emogen audit {folder} --apply {shlex.quote(list_file)}",
        data=data,
    )


def _data(audit: AuditFile, rows: ScoredRows, label_set: LabelSet) -> dict[str, Any]:
    """The rows that something is said about, the worst first, and the rows that break each relation.

    Returns:
        `rows`: for each its position (`row`), its `suspected` and `suggested` labels (strings of 0 and 1), the
        positions of its `twins` and the `reasons`. `relations`: for each the `sentence` and the positions of its
        `exceptions`.

    Raises:
        KeyError: no row has such an id.
        ValueError: a label is not in the label set.
    """
    position = {str(row_id): i for i, row_id in enumerate(rows.ids)}
    return {
        "rows": [
            {
                "row": position[row.id],
                "suspected": _digits(label_set, row.suspected),
                "suggested": _digits(label_set, row.suggested),
                "twins": [position[twin] for twin in row.twins],
                "reasons": row.reasons,
            }
            for row in audit.rows
        ],
        "relations": [
            {"sentence": relation.sentence, "exceptions": [position[row_id] for row_id in relation.exceptions]}
            for relation in audit.relations
        ],
    }


def _digits(label_set: LabelSet, names: Iterable[str]) -> str:
    return "".join(map(str, label_set.vector(names)))
