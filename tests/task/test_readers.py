import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tiny import POSTS, write_posts

from emogen.task.readers import read_rows
from emogen.task.rows import DataError, align, check_overlap, check_rows, checked
from emogen.task.splits import hold_out, sample_rows

HEADER = "ID,Tweet,anger,anticipation,disgust,fear,joy,love,optimism,pessimism,sadness,surprise,trust"
ROW = "1,hello,1,0,0,0,0,0,0,0,0,0,0"


def write(tmp_path, text, name="d.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


def errors(result):
    return [str(problem) for problem in result[1] if problem.level == "error"]


def test_kaggle_csv(tmp_path, labels):
    path = write(
        tmp_path, f'{HEADER}\n{ROW}\n2,"two\nlines, ""quoted""",0,0,0,0,1,1,0,0,0,0,0\n3,x,0,0,0,0,0,0,0,0,0,0,0\n'
    )
    rows = checked(read_rows(path, labels))
    assert rows.ids == ["1", "2", "3"]
    assert rows.texts[1] == 'two\nlines, "quoted"'
    assert rows.lines == [2, 3, 5]
    assert rows.gold.dtype == np.int8
    assert rows.gold.sum(1).tolist() == [1, 2, 0]


def test_semeval_tsv_knows_no_quoting_and_ends_lines_with_crlf(tmp_path, labels):
    tabbed = HEADER.replace(",", "\t")
    line = '2018-1\t"an open quote\t' + "\t".join("0" * 11)
    rows = checked(read_rows(write(tmp_path, f"{tabbed}\r\n{line}\r\n{line.replace('-1', '-2')}\r\n", "d.txt"), labels))
    assert rows.ids == ["2018-1", "2018-2"]
    assert rows.texts == ['"an open quote'] * 2


def test_test_files_with_none_for_labels_have_no_gold(tmp_path, labels):
    rows = checked(read_rows(write(tmp_path, f"{HEADER}\n1,hello{',NONE' * 11}\n"), labels))
    assert rows.gold is None
    with pytest.raises(DataError, match="no row has labels"):
        checked(read_rows(write(tmp_path, f"{HEADER}\n1,hello{',NONE' * 11}\n"), labels, need_labels=True))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_are_detected(tmp_path, labels, encoding):
    rows = checked(
        read_rows(write(tmp_path, f"{HEADER}\n{ROW}\n".replace("hello", "héllo 😀"), encoding=encoding), labels)
    )
    assert rows.texts == ["héllo 😀"]


def test_windows_1252_is_read_with_a_warning(tmp_path, labels):
    rows, problems = read_rows(
        write(tmp_path, f"{HEADER}\n{ROW}\n".replace("hello", "héllo"), encoding="cp1252"), labels
    )
    assert rows.texts == ["héllo"]
    assert [p.level for p in problems] == ["warning"]
    assert ":2" in problems[0].where


def test_jsonl_parquet_and_a_labels_column(tmp_path, labels):
    lines = [{"id": "a", "text": "x", "labels": ["joy", "anger"]}, {"id": "b", "text": "y", "labels": []}]
    jsonl = checked(read_rows(write(tmp_path, "\n".join(map(json.dumps, lines)), "d.jsonl"), labels))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), tmp_path / "d.parquet")
    parquet = checked(read_rows(tmp_path / "d.parquet", labels))
    semicolons = checked(read_rows(write(tmp_path, "id;text;emotions\na;x;joy, anger\nb;y;none\n"), labels))
    for rows in (jsonl, parquet, semicolons):
        assert rows.ids == ["a", "b"]
        assert rows.gold.tolist() == [list(labels.vector(["anger", "joy"])), [0] * 11]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{HEADER}\n1,hello,2,0,0,0,0,0,0,0,0,0,0\n", "d.csv:2: label 'anger' is '2'; expected 0 or 1"),
        (f"{HEADER}\n1,hello,1,0\n", "d.csv:2: 4 columns where the header has 13"),
        (f"{HEADER}\n{ROW}\n2,x{',NONE' * 11}\n", "d.csv:3: no labels here"),
        (
            f"{HEADER.replace('surprise', 'suprise')}\n{ROW}\n",
            "no column for the label 'surprise'; is 'suprise' misspelt?",
        ),
        (f"{HEADER.replace('Tweet', 'Stuff')}\n{ROW}\n", "no text column"),
        ("", "the file is empty"),
        (f"{HEADER}\n", "no rows"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(tmp_path, labels, text, said):
    assert said in "\n".join(errors(read_rows(write(tmp_path, text), labels, need_labels=True)))


def test_a_label_misspelt_in_a_labels_column(tmp_path, labels):
    text = '{"text": "x", "labels": ["joyy"]}\n{"text": "y", "labels": ["joy"]}\nnot json\n'
    said = "\n".join(errors(read_rows(write(tmp_path, text, "d.jsonl"), labels)))
    assert "d.jsonl:1: 'joyy' is not a label of 'semeval2018'; did you mean 'joy'?" in said
    assert "d.jsonl:3: not valid JSON" in said


def test_missing_file_suggests_its_neighbour(tmp_path, labels):
    write(tmp_path, "x", "train.csv")
    assert "did you mean" in errors(read_rows(tmp_path / "trian.csv", labels))[0]


def test_a_wrong_column_name_lists_the_columns(tmp_path, labels):
    result = read_rows(write(tmp_path, f"{HEADER}\n{ROW}\n"), labels, text_column="tweet")
    assert "did you mean 'Tweet'?" in errors(result)[0]


def test_checks_within_a_file(tmp_path, labels):
    body = [
        ROW,
        ROW.replace("1,hello", "1,other"),
        "3,Hello ,0,0,0,0,1,0,0,0,0,0,0",
        "4,,0,0,0,0,1,0,0,0,0,0,0",
        ROW.replace("1,hello", "5,itâ€™s"),
    ]
    problems = check_rows(checked(read_rows(write(tmp_path, "\n".join([HEADER, *body])), labels)))
    said = {problem.level: "" for problem in problems}
    for problem in problems:
        said[problem.level] += str(problem) + "\n"
    assert "d.csv:2, 3: the id '1' occurs 2 times" in said["error"]
    assert "d.csv:2, 4: the same text with different labels" in said["warning"]
    assert "d.csv:5: the text is empty" in said["warning"]
    assert "d.csv:6: the text looks wrongly decoded" in said["warning"]


def test_texts_shared_with_evaluation_are_named(tmp_path, labels):
    train = checked(read_rows(write(tmp_path, f"{HEADER}\n{ROW}\n"), labels))
    other = checked(
        read_rows(write(tmp_path, f"{HEADER}\n{ROW.replace('hello', 'x')}\n{ROW.replace('hello', ' HELLO')}\n"), labels)
    )
    (problem,) = check_overlap(train, other)
    assert "1 texts" in problem.message
    assert problem.where.endswith(":3")
    assert not check_overlap(train, other.take([0]))


def test_hold_out_is_stratified_and_keeps_the_same_text_together(tmp_path, labels):
    posts = [(f"{text} {k}", names) for k in range(20) for text, names in POSTS] + POSTS * 2
    rows = checked(read_rows(write_posts(tmp_path / "d.csv", labels, posts), labels))
    kept, held = hold_out(rows, 0.25, seed=1)
    assert sorted([*kept, *held]) == list(range(len(rows)))
    assert not {rows.texts[i] for i in kept} & {rows.texts[i] for i in held}
    np.testing.assert_allclose(rows.gold[held].mean(0), rows.gold.mean(0), atol=0.05)
    again = hold_out(rows, 0.25, seed=1)
    assert np.array_equal(held, again[1])
    assert len(sample_rows(rows, 60, 1)) == pytest.approx(60, abs=5)
    assert sample_rows(rows, 10_000, 1) is rows


def test_align_matches_by_id(tmp_path, labels):
    gold = checked(read_rows(write_posts(tmp_path / "g.csv", labels), labels))
    shuffled = gold.take([3, 1, 0, 2, *range(4, 12)])
    assert align(gold, shuffled).ids == gold.ids
    with pytest.raises(DataError, match="no row for 1 ids"):
        align(gold, gold.take(range(11)))
    with pytest.raises(DataError, match="more than once"):
        align(gold, gold.take([*range(12), 0]))
