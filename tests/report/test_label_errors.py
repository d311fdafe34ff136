"""What `emogen audit` said, in the report: counts, data for the script, and what is missing."""

import numpy as np
import pytest
from tiny import audit_of

from emogen.errors import InputError
from emogen.evaluation.audit_file import write_audit
from emogen.report import label_errors as module
from emogen.report.label_errors import label_errors
from emogen.report.page import report
from emogen.report.runs import read_run


@pytest.fixture
def folder(tmp_path, write_small):
    return write_small(tmp_path / "a run")


def test_each_label_is_counted_by_what_is_wrong_with_it(folder):
    gold = read_run(folder).scores.rows.gold
    given, lacking = int(np.flatnonzero(gold[:, 0] == 1)[0]), int(np.flatnonzero(gold[:, 1] == 0)[0])
    suspected = {given: {"joy": 0.1}, lacking: {"anger": 0.9}}
    write_audit(folder, audit_of(folder, suspected, twins=(7, 8)))
    found = label_errors(read_run(folder))
    joy, anger = found.by_label
    assert joy == ("joy", int(gold[:, 0].sum()), 1, 0, 1 / 40)
    assert anger == ("anger", int(gold[:, 1].sum()), 0, 1, 1 / 40)
    assert (found.n_suspected, found.n_twins) == (len(suspected), 2)
    assert found.data["rows"][0] == {
        "row": given, "suspected": "10", "suggested": "01", "twins": [], "reasons": ("joy <i>is</i> wrong",),
    }  # fmt: skip
    assert found.data["relations"] == [{"sentence": "joy nearly implies anger: 1 of 40 & more", "exceptions": [9]}]
    assert found.apply == ""  # a run holds a part of the rows, which --apply refuses
    (folder / "manifest.json").write_text('{"format": 1, "kind": "baseline"}')
    assert "--apply '" in label_errors(read_run(folder)).apply  # the folder has a space in its name


def test_an_audit_changes_no_figure(folder):
    page = folder / "report.html"
    report([folder])
    before, figures = page.read_text(), {f: f.read_bytes() for f in folder.glob("*.json*")}
    scores = before[before.index('id="headline"') : before.index('id="rows"')]
    write_audit(folder, audit_of(folder, {3: {"joy": 0.5}}))
    report([folder])
    after = page.read_text()
    assert scores == after[after.index('id="headline"') : after.index('id="label-errors"')]
    assert {f: f.read_bytes() for f in figures} == figures


def test_a_run_of_one_split_is_not_asked_for_an_audit_and_a_cross_validation_is(folder, monkeypatch):
    assert label_errors(read_run(folder)) is None
    (folder / "folds.csv").write_text("id,fold\n" + "".join(f"r{i},{i % 5}\n" for i in range(40)))
    (folder / "manifest.json").write_text('{"format": 1, "kind": "cross-validation"}')
    missing = label_errors(read_run(folder)).missing
    assert f"emogen audit '{folder}' && emogen report '{folder}'" in missing
    assert "cleanlab" not in missing
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "it needs cleanlab: pip install 'cleanlab>=" in label_errors(read_run(folder)).missing


def test_an_audit_of_other_predictions_is_not_shown(folder):
    write_audit(folder, audit_of(folder, {3: {"joy": 0.5}}))
    with (folder / "predictions.jsonl").open("a") as file:
        file.write("\n")
    found = label_errors(read_run(folder))
    assert "other predictions than these" in found.missing
    assert found.data is None


@pytest.mark.parametrize("wrong", [{"id": "r99"}, {"suspected": {"hope": 0.5}}, {"twins": ("r99",)}])
def test_rows_and_labels_that_the_run_does_not_have_are_an_error(folder, wrong):
    audit = audit_of(folder, {3: {"joy": 0.5}})
    write_audit(folder, audit.model_copy(update={"rows": (audit.rows[0].model_copy(update=wrong),)}))
    with pytest.raises(InputError, match=r"audit\.json: .*(r99|hope).*was the file changed"):
        label_errors(read_run(folder))
