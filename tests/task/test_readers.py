import codecs
import json
import logging

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tiny import write_posts

from emogen.task.delimited import csv_text
from emogen.task.readers import read_hub, read_rows, stream_rows
from emogen.task.rows import DataError, checked

HEADER = "ID,Tweet,anger,anticipation,disgust,fear,joy,love,optimism,pessimism,sadness,surprise,trust"
ROW = "1,hello,1,0,0,0,0,0,0,0,0,0,0"


def write_file(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def errors_in(result):
    return [str(problem) for problem in result[1] if problem.level == "error"]


def test_kaggle_csv(tmp_path, labels):
    path = write_file(
        tmp_path / "d.csv",
        f'{HEADER}\n{ROW}\n2,"two\nlines, ""quoted""",0,0,0,0,1,1,0,0,0,0,0\n3,x,0,0,0,0,0,0,0,0,0,0,0\n',
    )
    rows = checked(read_rows(path, labels))
    assert rows.ids == ["1", "2", "3"]
    assert rows.texts[1] == 'two\nlines, "quoted"'
    assert rows.lines == [2, 3, 5]
    assert rows.gold.dtype == np.int8
    assert rows.gold.sum(1).tolist() == [1, 2, 0]


@pytest.mark.parametrize("text", ["a\rb", "\r", "a\r\nb", 'a "b"\r', "a, b"])
def test_what_emogen_writes_as_csv_is_read_back(tmp_path, labels, text):
    path = write_file(tmp_path / "d.csv", csv_text([["ID", "Tweet"], ["1", "x"], ["2", text], ["3", "y"]]))
    assert checked(read_rows(path, labels)).texts == ["x", text, "y"]


def test_semeval_tsv_has_no_quoting_and_ends_lines_with_crlf(tmp_path, labels):
    tabbed = HEADER.replace(",", "\t")
    line = '2018-1\t"an open quote\t' + "\t".join("0" * 11)
    path = write_file(tmp_path / "d.txt", f"{tabbed}\r\n{line}\r\n{line.replace('-1', '-2')}\r\n")
    rows = checked(read_rows(path, labels))
    assert rows.ids == ["2018-1", "2018-2"]
    assert rows.texts == ['"an open quote'] * 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_are_detected(tmp_path, labels, encoding):
    path = write_file(tmp_path / "d.csv", f"{HEADER}\n{ROW}\n".replace("hello", "héllo 😀"), encoding)
    assert checked(read_rows(path, labels)).texts == ["héllo 😀"]


def test_windows_1252_is_read_with_a_warning(tmp_path, labels):
    path = write_file(tmp_path / "d.csv", f"{HEADER}\n{ROW}\n".replace("hello", "héllo"), "cp1252")
    rows, problems = read_rows(path, labels)
    assert rows.texts == ["héllo"]
    assert [p.level for p in problems] == ["warning"]
    assert ":2" in problems[0].where


def test_a_given_encoding_is_used_and_must_be_right(tmp_path, labels):
    text = f"{HEADER}\n{ROW}\n".replace("hello", "héllo")
    latin, utf = write_file(tmp_path / "l.csv", text, "latin-1"), write_file(tmp_path / "u.csv", text)
    rows, problems = read_rows(latin, labels, encoding="latin-1")
    assert (rows.texts, problems) == (["héllo"], [])
    assert read_rows(utf, labels, encoding="latin-1")[0].texts == ["hÃ©llo"]
    assert "cannot be read: line 2 is not ascii" in errors_in(read_rows(utf, labels, encoding="ascii"))[0]
    assert "cannot be read: unknown encoding: utf-9" in errors_in(read_rows(utf, labels, encoding="utf-9"))[0]


def test_only_a_newline_ends_a_line(tmp_path, labels):
    """A text may contain characters that `str.splitlines` takes for line ends."""
    separators = "a\u2028b\u0085c\x0bd"
    path = write_file(tmp_path / "d.csv", f"{HEADER}\n{ROW}\n".replace("hello", separators))
    assert checked(read_rows(path, labels)).texts == [separators]


def test_jsonl_parquet_and_csv_with_a_labels_column(tmp_path, labels):
    records = [{"id": "a", "text": "x", "labels": ["joy", "anger"]}, {"id": "b", "text": "y", "labels": []}]
    jsonl = write_file(tmp_path / "d.jsonl", "\n".join(map(json.dumps, records)))
    array = write_file(tmp_path / "d.json", json.dumps(records))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "d.parquet")
    semicolons = write_file(tmp_path / "d.csv", "id;text;emotions\na;x;joy, anger\nb;y;none\n")
    for path in (jsonl, array, tmp_path / "d.parquet", semicolons):
        rows = checked(read_rows(path, labels))
        assert rows.ids == ["a", "b"]
        assert rows.gold.tolist() == [list(labels.vector(["anger", "joy"])), [0] * 11]


def test_a_given_separator_is_used(tmp_path, labels):
    path = write_file(tmp_path / "d.csv", "text^labels\na, b; c^joy\n")
    assert checked(read_rows(path, labels, separator="^")).texts == ["a, b; c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{HEADER}\n1,hello,1,0\n", "d.csv:2: 4 columns where the header has 13"),
        (f'{HEADER}\n1,"hello{ROW}' + f"\n{ROW}" * 30, "d.csv:2: a quotation mark opens a cell here and is never closed; within a quoted cell"),
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        (f"\n{HEADER}\n{ROW}\n", "the first line is empty; it must name the columns"),
    ],
)  # fmt: skip
def test_errors_in_delimited_files_name_file_and_line(tmp_path, labels, text, message):
    result = read_rows(write_file(tmp_path / "d.csv", text), labels, need_labels=True)
    assert message in "\n".join(errors_in(result))


def test_errors_in_json_files_name_file_and_line(tmp_path, labels):
    text = '{"text": "x", "labels": ["joyy"]}\n{"text": "y", "labels": ["joy"]}\nnot json\n["a"]\n'
    messages = "\n".join(errors_in(read_rows(write_file(tmp_path / "d.jsonl", text), labels)))
    assert "d.jsonl:1: not a label of 'semeval2018': 'joyy' (did you mean 'joy'?)" in messages
    assert "d.jsonl:3: not valid JSON" in messages
    assert "d.jsonl:4: not a JSON object" in messages


def test_a_missing_file_suggests_a_similar_name(tmp_path, labels):
    write_file(tmp_path / "train.csv", "x")
    assert "did you mean" in errors_in(read_rows(tmp_path / "trian.csv", labels))[0]
    assert errors_in(read_rows(tmp_path / "nowhere" / "x.csv", labels))[0].endswith("x.csv: no such file")


def test_streaming_gives_the_rows_of_reading_in_chunks(tmp_path, labels):
    path = write_posts(tmp_path / "d.csv", labels)
    whole = checked(read_rows(path, labels))
    chunks = list(stream_rows(path, labels, size=5))
    assert [len(chunk) for chunk in chunks] == [5, 5, 2]
    assert [row_id for chunk in chunks for row_id in chunk.ids] == whole.ids
    assert [line for chunk in chunks for line in chunk.lines] == whole.lines
    assert np.array_equal(np.concatenate([chunk.gold for chunk in chunks]), whole.gold)


def test_streaming_a_file_without_rows_gives_one_empty_chunk(tmp_path, labels, caplog):
    (chunk,) = stream_rows(write_file(tmp_path / "d.csv", f"{HEADER}\n"), labels, size=5)
    assert len(chunk) == 0
    assert "no rows below the header" in caplog.text


def test_streaming_yields_all_chunks_before_an_error(tmp_path, labels, caplog, monkeypatch):
    monkeypatch.setattr("emogen.task.readers.LOOK_AHEAD", 2)
    text = f"{HEADER}\n{ROW}\n{ROW}\n2,hello\n".replace("hello", "héllo")
    chunks = stream_rows(write_file(tmp_path / "d.csv", text, "cp1252"), labels, size=2)
    with caplog.at_level(logging.WARNING):
        assert next(chunks).ids == ["1", "1"]
    assert "not UTF-8; read as Windows-1252" in caplog.text
    with pytest.raises(DataError, match=r"d\.csv:4: 2 columns where the header has 13"):
        next(chunks)


def test_streaming_a_missing_file_is_an_error(tmp_path, labels):
    with pytest.raises(DataError, match="no such file"):
        next(stream_rows(tmp_path / "d.csv", labels, size=2))


@pytest.fixture
def offline_datasets(tmp_path, monkeypatch):
    """Keeps what `datasets` caches in the folder of the test, and keeps it off the network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "posts"
    folder.mkdir()
    return folder


def test_a_local_dataset_folder_of_csv_files(offline_datasets, labels):
    train = write_posts(offline_datasets / "train.csv", labels)
    write_posts(offline_datasets / "test.csv", labels, [("only this", ("trust",))])
    rows = checked(read_hub(str(offline_datasets), None, "train", labels, need_labels=True))
    whole = checked(read_rows(train, labels))
    assert (rows.ids, rows.texts) == (whole.ids, whole.texts)
    assert np.array_equal(rows.gold, whole.gold)
    assert rows.lines == list(range(1, 13))  # row numbers, not lines
    assert rows.path == f"{offline_datasets}[train]"
    assert checked(read_hub(str(offline_datasets), None, "test", labels)).texts == ["only this"]


def test_a_local_dataset_folder_of_parquet_files(offline_datasets, labels):
    columns = {name: [name == "joy"] for name in labels.names}  # booleans, as on the Hub
    table = pyarrow.table({"number": ["7"], "body": ["hello"]} | columns)
    pyarrow.parquet.write_table(table, offline_datasets / "train.parquet")
    result = read_hub(str(offline_datasets), None, "train", labels, text_column="body", id_column="number")
    rows = checked(result)
    assert (rows.ids, rows.texts, rows.text_column) == (["7"], ["hello"], "body")
    assert [labels.names_of(vector) for vector in rows.gold] == [("joy",)]


def test_a_dataset_that_cannot_be_loaded_is_an_error(offline_datasets, labels):
    write_posts(offline_datasets / "train.csv", labels)
    for name, split in ((str(offline_datasets), "dev"), (str(offline_datasets / "nowhere"), "train")):
        rows, problems = read_hub(name, None, split, labels)
        assert len(rows) == 0
        (problem,) = problems
        assert (problem.level, problem.where) == ("error", f"{name}[{split}]")
        assert problem.message.startswith("cannot be loaded: ")


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path, labels):
    path = tmp_path / "d.csv"
    path.write_bytes(codecs.BOM_UTF8 + f"{HEADER}\n{ROW}\n".encode())
    assert checked(read_rows(path, labels)).id_column == "ID"
