"""Labels that are probably wrong: how they are found, listed, corrected and written."""

import csv
import io
import shlex
from dataclasses import replace

import numpy as np
import pytest

from emogen import paths
from emogen.curation.audit import Audit, apply_corrections, audit, audit_csv, find_issues, find_relations, find_twins
from emogen.errors import InputError
from emogen.evaluation import results
from emogen.evaluation.audit_file import read_audit
from emogen.evaluation.run_folder import label_set_of
from emogen.prediction.baseline import fit_baseline
from emogen.report.label_errors import label_errors
from emogen.report.runs import read_run
from emogen.task.labels import Label, LabelSet
from emogen.task.readers import read_rows
from emogen.task.rows import Rows, checked

TWO = LabelSet(name="two", labels=(Label(name="joy"), Label(name="anger")))
N = 100


def write_baseline(folder, label_set, gold, prob):
    """Out-of-fold predictions of rows whose texts have nothing in common."""
    ids = [f"r{i}" for i in range(len(gold))]
    rows = Rows("x", ids, [f"{1000 + i}{i}{i}" for i in range(len(gold))], gold, list(range(len(gold))))
    folds = np.arange(len(gold)) % 5
    results.write_jsonl(folder / "predictions.jsonl", rows, (prob > 0.5).astype(np.int8), prob, label_set, folds=folds)
    (folder / "labels.yaml").write_text(label_set.to_yaml())
    (folder / "recipe.yaml").write_text("labels: labels.yaml\n")
    (folder / "folds.csv").write_text("id,fold\n" + "".join(f"r{i},{fold}\n" for i, fold in enumerate(folds)))
    return folder


@pytest.fixture
def doubted(tmp_path):
    """A folder in which the models are sure of all labels but two: r3 has joy, r8 lacks it."""
    truth = np.stack([np.arange(N) % 2, np.arange(N) // 2 % 2], 1).astype(np.int8)
    prob = np.where(truth, 0.875, 0.125)
    gold = truth.copy()
    gold[3, 0], gold[8, 0] = 0, 1
    return write_baseline(tmp_path / "base", TWO, gold, prob)


def test_labels_that_the_models_are_sure_are_wrong_come_first(doubted):
    found = audit([doubted], TWO)
    assert [found.rows.ids[i] for i in found.worst_first] == ["r3", "r8"]
    assert found.reasons(3) == ["joy is missing but probable (0.88)"]
    assert found.reasons(8) == ["joy is given but improbable (0.12)"]
    assert found.quality[[3, 8], 0] == pytest.approx([0.125, 0.125])
    assert found.suspected.sum() == 2
    listed = list(csv.DictReader(io.StringIO(audit_csv(found))))
    assert [(row["ID"], row["correct"], row["suggested"]) for row in listed] == [
        ("r3", "anger", "joy, anger"),
        ("r8", "joy", "none"),
    ]


def test_several_systems_are_stacked_and_must_have_the_same_rows(doubted, tmp_path):
    assert audit([doubted, doubted], TWO).suspected[[3, 8], 0].all()
    other = write_baseline(tmp_path / "other", TWO, np.eye(2, dtype=np.int8), np.eye(2))
    with pytest.raises(InputError, match="not the same rows"):
        audit([doubted, other], TWO)


def test_a_label_that_all_rows_or_none_have_is_not_doubted():
    gold = np.stack([np.ones(40), np.zeros(40), np.arange(40) % 2], 1).astype(np.int8)
    suspected, quality = find_issues(gold, np.full(gold.shape, 0.5))
    assert not suspected[:, :2].any()
    assert (quality[:, :2] == 1).all()


def test_rows_with_one_label_each_get_another_one(tmp_path):
    one = TWO.model_copy(update={"exactly_one": True})
    truth = np.arange(N) % 2
    given = truth.copy()
    given[7] = 0
    folder = write_baseline(
        tmp_path / "one", one, np.eye(2, dtype=np.int8)[given], np.where(np.eye(2)[truth], 0.9, 0.1)
    )
    found = audit([folder], one)
    assert [found.rows.ids[i] for i in found.worst_first] == ["r7"]
    assert found.suggested[7].tolist() == [0, 1]
    assert (found.suggested.sum(1) == 1).all()


def test_turned_labels_of_the_sample_are_among_the_first(labels):
    """At least five times as many as by chance."""
    rows = checked(read_rows(paths.shipped("sample/train.csv"), labels, need_labels=True))
    turned = np.random.default_rng(5).random(rows.gold.shape) < 0.05
    noisy = np.where(turned, 1 - rows.gold, rows.gold).astype(np.int8)
    prob, folds, texts = np.zeros(noisy.shape), np.arange(len(rows)) % 3, np.array(rows.texts, dtype=object)
    for k in range(3):
        prob[folds == k] = fit_baseline(texts[folds != k], noisy[folds != k])(texts[folds == k])
    _, quality = find_issues(noisy, prob)
    first = np.argsort(quality, axis=None, kind="stable")[: quality.size // 20]
    assert turned.ravel()[first].mean() > 5 * turned.mean()


def test_nearly_equal_texts_with_other_labels_are_twins():
    texts = ["I love this song so much today!", "i love  this song so much today!!", "the train was late again"]
    gold = np.array([[1, 0], [0, 0], [0, 1]])
    (twin,) = find_twins(texts, gold)
    assert (twin.first, twin.second) == (0, 1)
    assert find_twins(texts, np.zeros((3, 2), dtype=int)) == []
    assert find_twins(["", " "], gold[:2]) == []


def test_relations_that_nearly_all_rows_obey():
    gold = np.zeros((400, 3), dtype=np.int8)
    gold[:100, 0] = 1
    gold[:98, 1] = 1  # 98 of 100
    gold[99:250, 2] = 1  # 151 rows, one of which has the first label; by chance 38
    implied, exclusive = find_relations(gold)
    assert (implied.first, implied.second, implied.implies, implied.n, implied.exceptions) == (
        0,
        1,
        True,
        100,
        (98, 99),
    )
    assert implied.sentence("abc") == "a nearly implies b: 2 of 100 rows do not have it"
    assert (exclusive.first, exclusive.second, exclusive.implies, exclusive.exceptions) == (0, 2, False, (99,))
    assert exclusive.sentence("abc") == "a and c nearly exclude each other: 1 row has both; by chance 38"


def test_a_corrected_list_changes_its_rows_alone(doubted, emogen):
    said = emogen("audit", doubted).out
    assert "2 of 100 rows have a suspected label" in said
    assert "exists" in emogen("audit", doubted, code=2).err  # somebody may have corrected it
    file = doubted / "audit.csv"
    file.write_text(file.read_text().replace(",joy,joy,none,", ",none,joy,none,"))
    said = emogen("audit", doubted, "--apply", file).out
    assert "1 of 100 rows have other labels:\n  r8: joy -> none\n" in said
    before = results.read_held_out(doubted, TWO)
    after = checked(read_rows(doubted / "corrected.jsonl", TWO, need_labels=True))
    assert after.texts == before.texts
    assert np.argwhere(after.gold != before.gold).tolist() == [[8, 0]]


def test_the_command_that_trains_again_runs_as_it_is_printed(tmp_path, emogen, tiny_recipe, labels, monkeypatch):
    """Also where the recipe names columns, a prompt and a form that the new file and the folder do not have."""
    monkeypatch.chdir(tmp_path)
    rows = checked(read_rows(paths.shipped("sample/train.csv"), labels, need_labels=True)).take(range(60))
    with (tmp_path / "mine.csv").open("w", encoding="cp1252", errors="replace", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["ID", "review", *labels.names])
        texts = [text.replace("e", "é") for text in rows.texts]
        writer.writerows([i, t, *gold] for i, t, gold in zip(rows.ids, texts, rows.truth.tolist(), strict=True))
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "mine.jinja").write_text(paths.shipped("prompts/list.jinja").read_text())
    emogen("baseline", tiny_recipe(), "train_file=mine.csv", "text_column=review", "prompt=words/mine.jinja",
           "separator=;", "encoding=cp1252",
           "--folds", 3, "output_dir=runs/base")  # fmt: skip
    emogen("audit", "runs/base")
    said = emogen("audit", "runs/base", "--apply", "runs/base/audit.csv").out
    assert "0 of 60 rows have other labels." in said
    command = shlex.split(
        next(line for line in said.splitlines() if "emogen baseline" in line).partition(": emogen ")[2]
    )
    emogen(*command)
    before, after = (results.read_scored(tmp_path / "runs" / name, label_set_of(tmp_path / "runs" / name))
                     for name in ("base", "base-corrected"))  # fmt: skip
    assert after.ids == before.ids
    assert (after.prob == before.prob).all()  # nothing was corrected, so nothing changes


def test_the_list_is_harmless_in_a_spreadsheet_and_is_read_back(tmp_path):
    """Where the spreadsheet keeps the apostrophe, and where it drops it."""
    texts = ["=1+1", "+49 30 555", "-5 degrees", "@you are here", "plain"]
    rows = Rows("x", ["=a", "b", "c", "d", "e"], texts, np.eye(5, 2, dtype=np.int8), list(range(5)))
    everything = np.ones((5, 2), dtype=bool)
    found = Audit(rows, TWO, np.full((5, 2), 0.5), np.full((5, 2), 0.5), everything, [], [])
    listed = audit_csv(found)
    cells = [cell for line in csv.reader(io.StringIO(listed)) for cell in line]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    assert {"'=a", "'=1+1", "'@you are here", "plain"} <= set(cells)
    for text in (listed, listed.replace("'", "")):
        (tmp_path / "list.csv").write_text(text)
        assert (apply_corrections(rows, tmp_path / "list.csv", TWO).gold == rows.gold).all()


def test_the_file_for_the_report_says_what_the_list_says(doubted, emogen):
    said = emogen("audit", doubted).out
    assert f"emogen report {doubted}" in said
    file = read_audit(doubted)
    assert file.is_of(doubted)
    assert file.systems == (str(doubted),)
    assert [(row.id, dict(row.suspected), row.suggested) for row in file.rows] == [
        ("r3", {"joy": 0.875}, ("joy", "anger")),
        ("r8", {"joy": 0.125}, ()),
    ]
    assert file.rows[0].reasons == ("joy is missing but probable (0.88)",)


def test_the_report_names_a_list_that_was_written_elsewhere(doubted, tmp_path, emogen):
    emogen("audit", doubted, "-o", tmp_path / "mine.csv")
    assert label_errors(read_run(doubted)).apply == f"emogen audit {doubted} --apply {tmp_path / 'mine.csv'}"


def test_the_list_of_a_run_is_not_to_be_applied(doubted, emogen):
    """A run was scored on a part of the rows: --apply would be refused."""
    (doubted / "folds.csv").unlink()
    said = emogen("audit", doubted).out
    assert "Correct these rows in the file that the run was scored on." in said
    assert "--apply" not in said
    assert "held-out rows alone" in emogen("audit", doubted, "--apply", doubted / "audit.csv", code=2).err


def test_the_command_that_trains_again_names_features_that_are_code(doubted, emogen):
    (doubted / "manifest.json").write_text('{"format": 1, "kind": "baseline"}')
    (doubted / "recipe.yaml").write_text("labels: labels.yaml\nfeatures: [tfidf, 'lexicon:counts']\n")
    emogen("audit", doubted)
    said = emogen("audit", doubted, "--apply", doubted / "audit.csv").out
    assert """ 'features=["tfidf", "lexicon:counts"]' """ in said


def test_labels_that_nothing_speaks_against_are_not_to_be_corrected(tmp_path, emogen):
    gold = np.stack([np.arange(N) % 2, np.arange(N) // 2 % 2], 1).astype(np.int8)
    said = emogen("audit", write_baseline(tmp_path / "right", TWO, gold, np.where(gold, 0.875, 0.125))).out
    assert "0 of 100 rows have a suspected label.\n" in said
    assert "Nothing is doubted" in said
    assert "--apply" not in said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("r99999,x,joy", "no row of .* has the id 'r99999'"),
        ("r1,another text,joy", "another text than that of 'r1'"),
        ("r1,100111,joyy", "not a label.*did you mean 'joy'"),
        ("r1,100111,", "label"),
        ("r1,100111,joy\nr1,100111,joy", "more than once"),
    ],
)
def test_what_a_corrected_list_must_not_say(doubted, tmp_path, line, message):
    file = tmp_path / "list.csv"
    file.write_text(f"ID,Tweet,correct\n{line}\n")
    with pytest.raises(InputError, match=message):
        apply_corrections(results.read_held_out(doubted, TWO), file, TWO)


def test_rows_that_the_list_leaves_out_keep_their_labels(doubted, tmp_path):
    rows = results.read_held_out(doubted, TWO)
    (tmp_path / "list.csv").write_text("ID,Tweet,correct\nr1,100111,none\n")
    gold = rows.gold.copy()
    gold[1] = 0
    after = apply_corrections(rows, tmp_path / "list.csv", TWO)
    assert (after.gold == replace(rows, gold=gold).gold).all()
