"""What an audit says, on disk."""

import json

import pytest

from emogen.errors import InputError
from emogen.evaluation.audit_file import (
    AuditedRelation,
    AuditedRow,
    AuditFile,
    predictions_digest,
    read_audit,
    write_audit,
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "predictions.jsonl").write_text("{}\n")
    return tmp_path


@pytest.fixture
def audit(folder):
    row = AuditedRow(id="r1", suspected={"joy": 0.25}, suggested=("anger",), twins=("r2",), reasons=("why",))
    relation = AuditedRelation(sentence="a nearly implies b", exceptions=("r1", "r2"))
    return AuditFile(
        predictions=predictions_digest(folder), systems=("runs/a", "runs/b"), rows=(row,), relations=(relation,)
    )


def test_what_is_written_is_read(folder, audit):
    assert read_audit(folder) is None
    write_audit(folder, audit)
    assert read_audit(folder) == audit


def test_other_predictions_make_it_outdated(folder, audit):
    assert audit.is_of(folder)
    (folder / "predictions.jsonl").write_text("{}\n{}\n")
    assert not audit.is_of(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [{"id": 5}]}, r"audit\.json: rows\.0\.id: .*string"),
        ({"rows": "none"}, r"audit\.json: rows: "),
        ({"more": 1}, r"audit\.json: more: .*emogen audit writes it again"),
    ],
)
def test_a_changed_file_is_named_with_the_place(folder, audit, change, message):
    write_audit(folder, audit)
    values = json.loads((folder / "audit.json").read_text())
    (folder / "audit.json").write_text(json.dumps(values | change))
    with pytest.raises(InputError, match=message):
        read_audit(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_what_is_no_such_file_is_an_error(folder, text):
    (folder / "audit.json").write_text(text)
    with pytest.raises(InputError, match=r"audit\.json: "):
        read_audit(folder)
