"""Run folders with their reports, written once for all tests. Tests only read them."""

from pathlib import Path

import pytest
from tiny import audit_of, invented_posts, write_run

from emogen.evaluation.audit_file import write_audit
from emogen.report.page import report
from emogen.report.runs import Run, read_run
from emogen.task.labels import Label, LabelSet

N_LARGE = 5000


@pytest.fixture(scope="session")
def two_labels() -> LabelSet:
    """A small label set: pictures of few labels are drawn quickly."""
    return LabelSet(name="two", labels=(Label(name="joy"), Label(name="anger")))


@pytest.fixture(scope="session")
def reports(tmp_path_factory, labels, two_labels) -> Path:
    """Reports of a run of 40 rows (`small`), of another one beside it (`both.html`), of 5,000 rows (`large`), and of an
    audited run whose texts a spreadsheet would take for formulas (`audited`)."""
    folder = tmp_path_factory.mktemp("reports")
    small = write_run(folder / "small", labels, noise=0.6)
    other = write_run(folder / "other", labels, noise=0.6, seed=1)
    large = write_run(folder / "large", two_labels, posts=posts_of(two_labels, N_LARGE))
    formulas = [("=1+1", ["joy"]), ('@you: "hi",\r\nyou', []), ("-5 degrees", ["anger"]), ("+1", ["joy"]), ("\tü", [])]
    audited = write_run(folder / "audited", two_labels, posts=[*formulas, *posts_of(two_labels, 35)])
    doubts = {4: {"joy": 0.9}, 2: {"anger": 0.1, "joy": 0.8}, 0: {"joy": 0.2}}
    write_audit(audited, audit_of(audited, doubts, twins=(7, 8)))
    report([small])
    report([large])
    report([audited])
    report([small, other], folder / "both.html")
    return folder


@pytest.fixture(scope="session")
def small_run(reports) -> Run:
    """The facts of the run of 40 rows."""
    return read_run(reports / "small")


@pytest.fixture
def write_small(two_labels):
    """Writes a run folder of 40 rows with two labels. Arguments are those of `tiny.write_run`."""
    return lambda folder, n=40, **keys: write_run(folder, two_labels, posts=posts_of(two_labels, n), **keys)


def posts_of(label_set: LabelSet, n: int):
    """n posts with those of their labels that are in the label set."""
    return [(text, [name for name in names if name in label_set.names]) for text, names in invented_posts(n)]
