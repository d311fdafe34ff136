"""Out-of-fold probabilities as small files, so that ensembles can be studied without training again.

    python benchmarks/oof.py keep RUN ... --to benchmarks/results/oof
    python benchmarks/oof.py restore 2018-E-c-En-train.txt --to runs

A file has the id, the fold, the labels of the answer as 0 and 1, and the probability of each label. It has no text and
no gold labels: those of the data file come back with `restore`, whose folders are for `emogen compare`.
"""

import argparse
import csv
import gzip
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from emogen.errors import InputError
from emogen.evaluation import results
from emogen.evaluation.run_folder import CROSS_VALIDATION, LABELS, PREDICTIONS, label_set_of, write_manifest
from emogen.task.labels import load_label_set
from emogen.task.readers import read_rows
from emogen.task.rows import checked

KEPT = Path(__file__).with_name("results") / "oof"
COLUMNS = ["id", "fold", "answer"]


def main(argv: Sequence[str] | None = None) -> None:
    """Keep the predictions of runs, or restore folders from what was kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("keep", help="write a file for each cross-validation or baseline")
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a cross-validation or a baseline")
    command.add_argument("--to", type=Path, default=KEPT, metavar="FOLDER", help="where the files go")
    command = commands.add_parser("restore", help="write a folder for each file")
    command.add_argument("data", type=Path, metavar="DATA", help="the labelled rows")
    command.add_argument("--from", dest="kept", type=Path, default=KEPT, metavar="FOLDER", help="where the files are")
    command.add_argument("--to", type=Path, default=Path("runs"), metavar="FOLDER", help="where the folders go")
    command.add_argument("--labels", default="semeval2018", help="the label set")
    args = parser.parse_args(argv)
    if args.command == "keep":
        for run in args.runs:
            keep(run, args.to / f"{run.name}.csv.gz")
    else:
        for file in sorted(args.kept.glob("*.csv.gz")):
            restore(file, args.data, args.labels, args.to / file.name.removesuffix(".csv.gz"))


def keep(run: Path, file: Path) -> None:
    """Write the out-of-fold predictions of a run, with probabilities of four decimals."""
    label_set = label_set_of(run)
    scored = results.read_scored(run, label_set)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *label_set.names])
    for row_id, fold, pred, prob in zip(scored.ids, scored.folds, scored.pred, scored.prob, strict=True):
        writer.writerow([row_id, fold, "".join(map(str, pred.tolist())), *(f"{p:.4f}" for p in prob)])
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as target, gzip.GzipFile("", "wb", 9, target, 0) as packed:  # the same bytes each time
        packed.write(text.getvalue().encode())
    print(f"{file}: {len(scored.ids):,} rows, {file.stat().st_size / 1e3:.0f} kB")


def restore(file: Path, data: Path, labels: str, folder: Path) -> None:
    """Write a folder that `emogen compare` reads.

    Raises:
        InputError: the folder is there, or the rows of the file are not those of the data.
    """
    if folder.exists():
        raise InputError(f"{folder}: exists; name another place with --to")
    label_set = load_label_set(labels)
    rows = checked(read_rows(data, label_set, need_labels=True))
    records = list(csv.DictReader(io.StringIO(gzip.decompress(file.read_bytes()).decode())))
    if sorted(rows.ids) != sorted(record["id"] for record in records):
        raise InputError(f"{file}: its rows are not those of {data}")
    position = {row_id: k for k, row_id in enumerate(rows.ids)}
    rows = rows.take([position[record["id"]] for record in records])
    prob = np.array([[float(record[name]) for name in label_set.names] for record in records])
    pred = np.array([[int(bit) for bit in record["answer"]] for record in records], dtype=np.int8)
    folds = np.array([int(record["fold"]) for record in records])
    folder.mkdir(parents=True)
    results.write_jsonl(folder / PREDICTIONS, rows, pred, prob, label_set, folds=folds)
    (folder / LABELS).write_text(label_set.to_yaml(), encoding="utf-8")
    write_manifest(folder, CROSS_VALIDATION, model=folder.name)
    print(f"{folder}: {len(records):,} rows")


if __name__ == "__main__":
    main()
