"""Commands about the rows themselves: audit (which labels are wrong?), select (which rows to label next?)."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from emogen import paths
from emogen.cli.shared import RunsArgument, split_overrides
from emogen.console import err, out, progress_bar
from emogen.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from emogen.curation.audit import Audit
    from emogen.task.labels import LabelSet
    from emogen.task.rows import Rows

SHOWN = 5  # rows, rules


def audit(
    runs: RunsArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The list, a CSV file. Default: RUN_DIR/audit.csv; with --apply corrected.jsonl."
        ),
    ] = None,
    apply: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the rows with the labels of a corrected list.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """List the rows whose labels are probably wrong.

    The rows are those that the runs were scored on: all training rows, for a cross-validation or a baseline. Their
    labels are doubted where models that did not see them are sure of something else. Several runs are stacked first.
    Near-duplicates with other labels, and rows that break what nearly all rows obey, are listed, too.

    Correct the column `correct` of the list. --apply then writes all rows with the corrected labels to a new file. The
    report of the first run shows the list, too, when it is written again.
    """
    from emogen.curation.audit import apply_corrections, audit, audit_csv, audit_file
    from emogen.evaluation.audit_file import write_audit
    from emogen.evaluation.results import held_out_rows, read_scored, write_rows
    from emogen.evaluation.run_folder import RUN, kind_of, label_set_of

    label_set = label_set_of(runs[0])
    target = _new_file(output or runs[0] / ("corrected.jsonl" if apply else "audit.csv"), overwrite)
    if apply is None:
        with err.status("Reading predictions ..."):
            found = audit(runs, label_set)
        with paths.writing(target) as file:
            file.write(audit_csv(found))
        write_audit(runs[0], audit_file(found, runs, target))
        _print_audit(found)
        if not found.worst_first:
            out.print(f"Nothing is doubted, so the list {target} has no rows.", soft_wrap=True)
            return
        if kind_of(runs[0]) == RUN:
            next_step = "Correct these rows in the file that the run was scored on."
        else:
            command = f"emogen audit {shlex.join(map(str, runs))} --apply {shlex.quote(str(target))}"
            next_step = f"Correct its column 'correct', then: {command}"
        out.print(f"The list is {target}. {next_step}", soft_wrap=True)
        out.print(f"To see these rows in the report: emogen report {shlex.quote(str(runs[0]))}", soft_wrap=True)
        return
    if kind_of(runs[0]) == RUN:
        raise InputError(
            f"{runs[0]}: a run is scored on its held-out rows alone, so the corrected file would lack the training "
            "rows; audit a cross-validation or a baseline"
        )
    scored = read_scored(runs[0], label_set)
    rows = held_out_rows(scored)
    corrected = apply_corrections(rows, apply, label_set)
    write_rows(target, corrected, label_set)
    _print_changes(rows, corrected, label_set)
    out.print(f"All rows, with the changes, are in {target}", soft_wrap=True)
    out.print(
        "To train again on them, on new folds that are stratified over the new labels: "
        + shlex.join(_command_again(runs[0], target, len(set(scored.folds.tolist())))),
        soft_wrap=True,
    )
    out.print(
        "It is also scored by the new labels, so its metrics cannot be compared with the old ones.", soft_wrap=True
    )


def _print_changes(before: "Rows", after: "Rows", label_set: "LabelSet") -> None:
    """Which rows and labels differ between the same rows before and after a correction."""
    old, new = before.truth, after.truth
    counts = {"rows": old, "added": new > old, "removed": new < old, "rows now": new}
    _print_by_label(label_set, {heading: _counts(cells) for heading, cells in counts.items()})
    changed = [i for i in range(len(before)) if (old[i] != new[i]).any()]
    out.print(f"{len(changed):,} of {len(before):,} rows have other labels{':' if changed else '.'}")
    for i in changed[:SHOWN]:
        was, now = (label_set.cell(labels[i].tolist()) for labels in (old, new))
        out.print(f"  {before.ids[i]}: {was} -> {now}", markup=False)
    if len(changed) > SHOWN:
        out.print(f"  and {len(changed) - SHOWN:,} more")


def _command_again(run: Path, file: Path, n_folds: int) -> list[str]:
    """The command that cross-validates a folder's recipe again, on a file that `write_rows` has written.

    Features that are code are named in it: no recipe can allow them.
    """
    from emogen.evaluation.results import FORM
    from emogen.evaluation.run_folder import BASELINE, LABELS, PROMPT, RECIPE, kind_of
    from emogen.task.recipe import is_own_code
    from emogen.task.yaml_files import as_overrides, read_yaml

    recipe, _ = read_yaml(run / RECIPE)
    features = recipe.get("features", [])
    own_code = as_overrides({"features": features}) if any(map(is_own_code, features)) else []
    columns = ["id_column=id", "text_column=text", "labels_column=labels"]
    columns += [f"{key}=null" for key in FORM if not key.endswith("_column") and recipe.get(key) is not None]
    return [
        *("emogen", "baseline" if kind_of(run) == BASELINE else "cv", str(run / RECIPE), "--folds", str(n_folds)),
        *(f"train_file={file}", *columns, f"prompt={PROMPT}", f"labels={LABELS}", *own_code),
        f"output_dir={run.parent / f'{run.resolve().name}-corrected'}",
    ]


def _print_audit(found: "Audit") -> None:
    gold, names = found.rows.truth, found.label_set.names
    columns = {
        "rows": _counts(gold),
        "given, improbable": _counts(found.suspected & (gold == 1)),
        "missing, probable": _counts(found.suspected & (gold == 0)),
        "suspected": [f"{share:.1%}" for share in found.suspected.mean(axis=0)],
    }
    _print_by_label(found.label_set, columns)
    out.print(
        f"{found.suspected.any(axis=1).sum():,} of {len(gold):,} rows have a suspected label"
        + ("; hard rows are among them. The worst:" if found.suspected.any() else ".")
    )
    for i in found.worst_first[:SHOWN]:
        out.print(f"  {found.rows.ids[i]}: {'; '.join(found.reasons(i))}", markup=False)
    if found.twins:
        out.print(f"{len(found.twins):,} pairs of nearly equal texts have different labels.")
    for relation in found.relations[:SHOWN]:
        out.print(relation.sentence(names), markup=False)


def select(
    words: Annotated[
        list[str],
        typer.Argument(metavar="RUN_DIR... FILE [KEY=VALUE]...", help="Run folders, then a file of unlabelled texts."),
    ],
    n: Annotated[int, typer.Option("-n", min=1, help="Number of rows to label.")] = 200,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The rows to label, a CSV file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Choose the unlabelled rows that would teach the most.

    Those are rows whose labels the runs are unsure of or disagree about, rare labels before frequent ones, and no two
    rows that are nearly the same. Texts that the runs were scored on are left out.

    The result has an empty column `labels`. Fill it with names and commas (or with the empty answer of the label set).
    Append the rows to a training file with the same columns (one with a column for each label needs 0 and 1), and train
    again.
    """
    from emogen.curation.selection import select_rows, selection_csv

    named, overrides = split_overrides(words)
    if len(named) < 2:
        raise typer.BadParameter("name one or more run folders, then the file of texts")
    *runs, source = map(Path, named)
    target = _new_file(output or Path(f"{source.stem}-to-label.csv"), overwrite)
    chosen = select_rows(runs, source, n, overrides, bar=progress_bar)
    with paths.writing(target) as file:
        file.write(selection_csv(chosen.rows))
    expected = {"expected rows": chosen.expected, "at random": chosen.expected_at_random}
    _print_by_label(chosen.label_set, {heading: [f"{n:.1f}" for n in cells] for heading, cells in expected.items()})
    out.print(f"{len(chosen.rows):,} rows to label are in {target}", soft_wrap=True)


def _new_file(path: Path, overwrite: bool) -> Path:
    """A file to write, which somebody may have worked on if it exists."""
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists; add --overwrite to replace it, or name another file with -o")
    return path


def _counts(cells: "np.ndarray") -> list[str]:
    """How many rows have each label: 0/1, [n, L] -> [L]."""
    return [f"{count:,}" for count in cells.sum(axis=0)]


def _print_by_label(label_set: "LabelSet", columns: Mapping[str, Sequence[str]]) -> None:
    """Print a table with a row for each label: heading -> the cell of each label."""
    table = Table("label", box=None, pad_edge=False)
    for heading in columns:
        table.add_column(heading, justify="right")
    for name, *cells in zip(label_set.names, *columns.values(), strict=True):
        table.add_row(name, *cells)
    out.print(table)
