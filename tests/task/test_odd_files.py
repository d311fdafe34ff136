"""Files as other programs and people write them: odd but valid ones are read as meant, broken ones are refused by line."""

import gzip
import io
import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from emogen.task.labels import Label, LabelSet
from emogen.task.readers import read_rows
from emogen.task.rows import checked

THREE = LabelSet(name="three", labels=(Label(name="anger"), Label(name="joy"), Label(name="severe_toxic")))
ONE = LabelSet(name="one", labels=(Label(name="spam"),))
SPANISH = LabelSet(name="es", labels=(Label(name="alegría"), Label(name="tristeza")))
TOPICS = LabelSet(name="topics", exactly_one=True, labels=(Label(name="sport"), Label(name="politics")))
IDS, TEXTS, GOLD = ["a1", "a2"], ["so it begins", 'she said "hi", twice'], [[1, 0, 0], [0, 1, 1]]


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def gz(content):
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:
        file.write(content.encode())
    return packed.getvalue()


def jsonl(*records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


CSV = 'id,text,anger,joy,severe_toxic\na1,so it begins,1,0,0\na2,"she said ""hi"", twice",0,1,1\n'
TSV = 'id\ttext\tanger\tjoy\tsevere_toxic\na1\tso it begins\t1\t0\t0\na2\tshe said "hi", twice\t0\t1\t1\n'
A, B = TEXTS


ODD = {
    # delimited
    "plain.csv": CSV,
    "plain.tsv": TSV,
    "PLAIN.CSV": CSV,
    "packed.csv.gz": gz(CSV),
    "packed.TSV.GZ": gz(TSV),
    "bom.csv": b"\xef\xbb\xbf" + CSV.encode(),
    "utf16.csv": CSV.encode("utf-16"),
    "utf16.tsv": TSV.encode("utf-16"),
    "windows.csv": CSV.replace("\n", "\r\n"),
    "old-mac.csv": CSV.replace("\n", "\r"),
    "no-newline-at-end.csv": CSV.rstrip("\n"),
    "blank-lines.csv": CSV.replace("\na2", "\n\n\na2") + "\n\n",
    "semicolons.csv": CSV.replace(",", ";").replace('""hi"";', '""hi"",'),
    "pipes.txt": TSV.replace("\t", "|"),
    "excel-sep.csv": "sep=;\n" + CSV.replace(",", ";").replace('""hi"";', '""hi"",'),
    "excel-sep-quoted.csv": '"sep=;"\r\n' + CSV.replace(",", ";").replace('""hi"";', '""hi"",').replace("\n", "\r\n"),
    "all-quoted.csv": "\n".join(
        ",".join('"' + cell + '"' for cell in row)
        for row in (["id", "text", "anger", "joy", "severe_toxic"], ["a1", A, "1", "0", "0"], ["a2", B.replace('"', '""'), "0", "1", "1"])
    ) + "\n",
    "all-quoted.tsv": "\n".join(
        "\t".join('"' + cell + '"' for cell in row)
        for row in (["id", "text", "anger", "joy", "severe_toxic"], ["a1", A, "1", "0", "0"], ["a2", B.replace('"', '""'), "0", "1", "1"])
    ) + "\n",
    "pandas-quoted.tsv": TSV.replace(B, '"she said ""hi"", twice"'),
    "spaced-header.csv": CSV.replace("id,text,anger,joy", " id , text ,anger, joy"),
    "capitals.csv": CSV.replace("id,text,anger,joy,severe_toxic", "ID,Tweet,Anger,JOY,Severe_Toxic"),
    "comment-id.csv": CSV.replace("id,text", "comment_id,comment"),
    "tweetID.csv": CSV.replace("id,text", "tweetID,Tweet"),
    "index.csv": CSV.replace("id,text", "Index,text"),
    "pandas-index.csv": CSV.replace("id,text", "Unnamed: 0,text"),
    "order-of-columns.csv": 'joy,severe_toxic,text,anger,id\n0,0,so it begins,1,a1\n1,1,"she said ""hi"", twice",0,a2\n',
    "floats.csv": CSV.replace(",1,0,0", ",1.0,0.0,0.0").replace(",0,1,1", ",0.0,1.0,1.0"),
    "booleans.csv": CSV.replace(",1,0,0", ",True,False,False").replace(",0,1,1", ",FALSE,TRUE,TRUE"),
    "other-columns.csv": CSV.replace("id,text", "id,date,text").replace("a1,", "a1,2018-01-01,").replace("a2,", "a2,2018-01-02,"),
    "non-breaking-header.csv": CSV.replace("joy", "joy\u200b", 1),
    # one column with all labels
    "names.csv": 'id,text,labels\na1,so it begins,anger\na2,"she said ""hi"", twice","joy,severe_toxic"\n',
    "names-semicolons.csv": 'id,text,labels\na1,so it begins,anger\na2,"she said ""hi"", twice",joy;severe_toxic\n',
    "names-pipes.csv": 'id,text,labels\na1,so it begins,anger\na2,"she said ""hi"", twice",joy|severe_toxic\n',
    "names-spaces.csv": 'id,text,labels\na1,so it begins, Anger \na2,"she said ""hi"", twice","JOY , severe_toxic"\n',
    "names-python.csv": "id,text,labels\na1,so it begins,['anger']\n" + 'a2,"she said ""hi"", twice","[\'joy\', \'severe_toxic\']"\n',
    "names-numpy.csv": "id,text,labels\na1,so it begins,['anger']\n" + 'a2,"she said ""hi"", twice",[\'joy\' \'severe_toxic\']\n',
    "names-set.csv": "id,text,labels\na1,so it begins,{'anger'}\n" + 'a2,"she said ""hi"", twice","{\'joy\', \'severe_toxic\'}"\n',
    "names-json.csv": 'id,text,labels\na1,so it begins,"[""anger""]"\na2,"she said ""hi"", twice","[""joy"", ""severe_toxic""]"\n',
    "dict-python.csv": "id,text,labels\n" + 'a1,so it begins,"{\'anger\': 1, \'joy\': 0, \'severe_toxic\': 0}"\n'
    + 'a2,"she said ""hi"", twice","{\'anger\': 0, \'joy\': 1, \'severe_toxic\': 1}"\n',
    "multi-hot.csv": 'id,text,labels\na1,so it begins,"[1, 0, 0]"\na2,"she said ""hi"", twice","[0, 1, 1]"\n',
    "multi-hot-numpy.csv": 'id,text,labels\na1,so it begins,[1 0 0]\na2,"she said ""hi"", twice",[0 1 1]\n',
    "emotions.csv": 'id,text,emotions\na1,so it begins,anger\na2,"she said ""hi"", twice","joy,severe_toxic"\n',
    # JSON
    "names.jsonl": jsonl({"id": "a1", "text": A, "labels": ["anger"]}, {"id": "a2", "text": B, "labels": ["joy", "severe_toxic"]}),
    "NAMES.JSONL": jsonl({"id": "a1", "text": A, "labels": ["anger"]}, {"id": "a2", "text": B, "labels": ["joy", "severe_toxic"]}),
    "names.jsonl.gz": gz(jsonl({"id": "a1", "text": A, "labels": ["anger"]}, {"id": "a2", "text": B, "labels": ["joy", "severe_toxic"]})),
    "names.ndjson": jsonl({"text": A, "labels": ["anger"], "id": "a1"}, {"id": "a2", "labels": ["severe_toxic", "joy"], "text": B}),
    "doccano.jsonl": jsonl({"id": "a1", "text": A, "label": ["anger"]}, {"id": "a2", "text": B, "label": ["joy", "severe_toxic"]}),
    "dict.jsonl": jsonl(
        {"id": "a1", "text": A, "labels": {"anger": 1, "joy": 0, "severe_toxic": 0}},
        {"id": "a2", "text": B, "labels": {"anger": False, "joy": True, "severe_toxic": True}},
    ),
    "columns.jsonl": jsonl(
        {"id": "a1", "text": A, "anger": 1, "joy": 0, "severe_toxic": 0}, {"id": "a2", "text": B, "anger": 0, "joy": 1, "severe_toxic": 1}
    ),
    "multi-hot.jsonl": jsonl({"id": "a1", "text": A, "labels": [1, 0, 0]}, {"id": "a2", "text": B, "labels": [0, 1, 1]}),
    "array.json": json.dumps([{"id": "a1", "text": A, "labels": ["anger"]}, {"id": "a2", "text": B, "labels": ["joy", "severe_toxic"]}]),
    "indented.json": json.dumps([{"id": "a1", "text": A, "labels": ["anger"]}, {"id": "a2", "text": B, "labels": ["joy", "severe_toxic"]}], indent=2),
    "pandas-columns.json": json.dumps(
        {"id": {"0": "a1", "1": "a2"}, "text": {"0": A, "1": B}, "anger": {"0": 1, "1": 0}, "joy": {"0": 0, "1": 1}, "severe_toxic": {"0": 0, "1": 1}}
    ),
    "pandas-index.json": json.dumps(
        {"0": {"id": "a1", "text": A, "anger": 1, "joy": 0, "severe_toxic": 0}, "1": {"id": "a2", "text": B, "anger": 0, "joy": 1, "severe_toxic": 1}}
    ),
    "pandas-split.json": json.dumps(
        {"columns": ["id", "text", "anger", "joy", "severe_toxic"], "index": [0, 1], "data": [["a1", A, 1, 0, 0], ["a2", B, 0, 1, 1]]}
    ),
    "pandas-table.json": json.dumps(
        {"schema": {"fields": []}, "data": [{"id": "a1", "text": A, "anger": 1, "joy": 0, "severe_toxic": 0}, {"id": "a2", "text": B, "anger": 0, "joy": 1, "severe_toxic": 1}]}
    ),
    "lists.json": json.dumps({"id": ["a1", "a2"], "text": TEXTS, "labels": [["anger"], ["joy", "severe_toxic"]]}),
    "bom.jsonl": "\ufeff" + jsonl({"id": "a1", "text": A, "labels": ["anger"]}, {"id": "a2", "text": B, "labels": ["joy", "severe_toxic"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_read_as_it_is_meant(tmp_path, name):
    rows, problems = read_rows(write(tmp_path, name, ODD[name]), THREE, need_labels=True)
    assert problems == []
    assert (rows.ids, rows.texts, rows.gold.tolist()) == (IDS, TEXTS, GOLD)


def parquet(path, columns, classes=None):
    table = pyarrow.table(columns)
    if classes:
        features = {
            column: {"feature": {"names": names, "_type": "ClassLabel"}, "_type": "Sequence"}
            for column, names in classes.items()
        }
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, path)
    return path


@pytest.mark.parametrize(
    ("columns", "classes"),
    [
        ({"labels": [["anger"], ["joy", "severe_toxic"]]}, None),
        ({"anger": [1, 0], "joy": [0, 1], "severe_toxic": [0, 1]}, None),
        ({"anger": [True, False], "joy": [False, True], "severe_toxic": [False, True]}, None),
        ({"labels": [[2], [0, 1]]}, {"labels": ["joy", "severe_toxic", "anger"]}),
        ({"label": [[0], [2, 1]]}, {"label": ["anger", "severe_toxic", "joy"]}),
    ],
    ids=["names", "integers", "booleans", "classes", "other classes"],
)
def test_parquet_files_with_names_or_with_classes_that_the_hub_names(tmp_path, columns, classes):
    path = parquet(tmp_path / "rows.PARQUET", {"id": IDS, "text": TEXTS} | columns, classes)
    rows, problems = read_rows(path, THREE, need_labels=True)
    assert problems == []
    assert (rows.ids, rows.texts, rows.gold.tolist()) == (IDS, TEXTS, GOLD)


@pytest.mark.parametrize(
    ("name", "content", "options", "label_set", "texts", "gold"),
    [
        ("one-column.csv", 'text\n"so, it begins"\nplain\n', {}, None, ["so, it begins", "plain"], None),
        ("index-and-text.csv", ',text\n0,so it begins\n1,"a, b"\n', {}, None, ["so it begins", "a, b"], None),
        ("lines.txt", "text\nso, it begins\n\"quoted\" at the start\n", {}, None, ["so, it begins", '"quoted" at the start'], None),
        ("newlines.csv", 'id,text\n1,"two\nlines"\n2,b\n', {}, None, ["two\nlines", "b"], None),
        ("semeval.tsv", 'ID\tTweet\n1\t"not closed\n2\tb " c\n3\t"quoted" start\n', {}, None, ['"not closed', 'b " c', '"quoted" start'], None),
        ("given.csv", "key,body\n1,a\n2,b\n", {"text_column": "body", "id_column": "key"}, None, ["a", "b"], None),
        ("tab.txt", "id\ttext\n1\ta,b\n", {"separator": "\\t"}, None, ["a,b"], None),
        ("caret.csv", "id^text\n1^a,b\n", {"separator": "^"}, None, ["a,b"], None),
        ("quotes.csv", 'id,text\n1,"a" b\n', {"quoting": "none"}, None, ['"a" b'], None),
        ("latin.csv", "id,text\n1,caf\xe9\n".encode("latin-1"), {"encoding": "latin-1"}, None, ["café"], None),
        ("nfd.csv", "id,text,alegri\u0301a,tristeza\n1,a,1,0\n", {}, SPANISH, ["a"], [[1, 0]]),
        ("wide.csv", "id,text,ａｎｇｅｒ,joy,severe_toxic\n1,a,1,0,0\n", {}, THREE, ["a"], [[1, 0, 0]]),
        ("one-label.csv", "id,text,spam\n1,a,1\n2,b,0\n", {}, ONE, ["a", "b"], [[1], [0]]),
        ("topic.csv", "id,text,label\n1,a,sport\n2,b,politics\n", {"need_labels": True}, TOPICS, ["a", "b"], [[1, 0], [0, 1]]),
        ("given-labels.csv", "id,text,tags\n1,a,joy\n2,b,none\n", {"labels_column": "tags"}, THREE, ["a", "b"], [[0, 1, 0], [0, 0, 0]]),
        ("unlabelled.csv", "id,text,anger,joy,severe_toxic\n1,a,,,\n2,b,,,\n", {}, THREE, ["a", "b"], None),
        ("semeval-test.tsv", "ID\tTweet\tanger\tjoy\tsevere_toxic\n1\ta\tNONE\tNONE\tNONE\n", {}, THREE, ["a"], None),
        ("null-text.jsonl", '{"id": 1, "text": null}\n{"id": 2, "text": "b"}\n', {}, None, ["", "b"], None),
        ("long.csv", "id,text\n1," + "word " * 60_000 + "end\n", {}, None, ["word " * 60_000 + "end"], None),
    ],
)  # fmt: skip
def test_more_odd_files(tmp_path, name, content, options, label_set, texts, gold):
    rows, problems = read_rows(write(tmp_path, name, content), label_set or THREE, **options)
    # Ids that are line numbers are always said to be.
    assert [problem.message for problem in problems if not problem.message.startswith("no id column")] == []
    assert bool(problems) != rows.has_ids
    assert rows.texts == texts
    assert (None if rows.gold is None else rows.gold.tolist()) == gold


def test_ids_are_the_same_however_they_are_written(tmp_path):
    integers = write(tmp_path, "a.csv", "id,text\n1,a\n2,b\n")
    floats = write(tmp_path, "b.jsonl", '{"id": 1.0, "text": "a"}\n{"id": 2.0, "text": "b"}\n')
    zeros = write(tmp_path, "c.csv", "id,text\n01,a\n02,b\n")
    assert checked(read_rows(integers, THREE)).ids == checked(read_rows(floats, THREE)).ids == ["1", "2"]
    assert checked(read_rows(zeros, THREE)).ids == ["01", "02"]  # another id than 1


BROKEN = {
    "empty.csv": ("", "the file is empty"),
    "blank.csv": ("\n\n", "the file is empty"),
    "header-only.csv": ("id,text,anger,joy,severe_toxic\n", "no rows below the header"),
    "unclosed.csv": ('id,text,anger,joy,severe_toxic\n1,a,1,0,0\n2,"so it begins,1,0,0\n3,c,0,0,1\n', ":3: a quotation mark opens a cell here and is never closed"),
    "swallowed.csv": ('id,text,anger,joy,severe_toxic\n1,"so it begins,1,0,0\n2,b,1,0,0\n3,c"d,0,0,1\n', r":2: a quotation mark opens a cell here"),
    "after-quote.csv": ('id,text,anger,joy,severe_toxic\n1,"a" b,1,0,0\n', ":2: text follows the quotation mark that closes a cell"),
    "space-quote.csv": ('id, text, anger, joy, severe_toxic\n1, "a", 1, 0, 0\n', ":2: a space before the quotation mark"),
    "short-row.csv": ("id,text,anger,joy,severe_toxic\n1,a,1,0,0\n2,b,1,0\n", ":3: 4 columns where the header has 5"),
    "long-row.csv": ("id,text,anger,joy,severe_toxic\n1,a,b,1,0,0\n", ":2: 6 columns where the header has 5"),
    "twice.csv": ("id,text,anger,joy,severe_toxic,anger\n1,a,1,0,0,0\n", "2 columns have the same name: 'anger' and 'anger'"),
    "look-alike.csv": ("id,text,anger,Anger,joy,severe_toxic\n1,a,1,0,0,0\n", "2 columns have the same name: 'anger' and 'Anger'"),
    "two-texts.csv": ("id,text,Text,anger,joy,severe_toxic\n1,a,b,1,0,0\n", "2 columns have the same name: 'text' and 'Text'"),
    "two-ids.csv": ("id,ID,text,anger,joy,severe_toxic\n1,2,b,1,0,0\n", "2 columns have the same name: 'id' and 'ID'"),
    "two.csv": ("id,text,anger,joy,severe_toxic\n1,a,2,0,0\n", ":2: label 'anger' is '2'; expected 0 or 1"),
    "yes.csv": ("id,text,anger,joy,severe_toxic\n1,a,yes,0,0\n", ":2: label 'anger' is 'yes'; expected 0 or 1"),
    "probability.csv": ("id,text,anger,joy,severe_toxic\n1,a,0.7,0,0\n", ":2: label 'anger' is '0.7'"),
    "partly-blank.csv": ("id,text,anger,joy,severe_toxic\n1,a,1,,0\n", ":2: label 'joy' is ''; expected 0 or 1"),
    "some-unlabelled.csv": ("id,text,anger,joy,severe_toxic\n1,a,1,0,0\n2,b,,,\n", ":3: no labels here"),
    "misspelt.csv": ("id,text,anger,jooy,severe_toxic\n1,a,1,0,0\n", ":1: no column for the label 'joy'; is 'jooy' misspelt?"),
    "space-for-underscore.csv": ("id,text,anger,joy,severe toxic\n1,a,1,0,0\n", "no column for the label 'severe_toxic'; is 'severe toxic' misspelt?"),
    "no-text.csv": ("id,stuff,anger,joy,severe_toxic\n1,a,1,0,0\n", ":1: no text column"),
    "no-labels.csv": ("id,text\n1,a\n", "no label columns"),
    "wrong-name.csv": ("id,text,labels\n1,a,joyy\n", r":2: not a label of 'three': 'joyy' \(did you mean 'joy'\?\)"),
    "some-blank-cell.csv": ("id,text,labels\n1,a,joy\n2,b,\n", ":3: no labels here"),
    "unclosed-list.csv": ("id,text,labels\n1,a,['joy'\n", ":2: labels that are no list of names"),
    "number.csv": ("id,text,labels\n1,a,17\n", ":2: labels as numbers"),
    "wrong-length.csv": ('id,text,labels\n1,a,"[1, 0]"\n', ":2: labels as numbers"),
    "numbers.jsonl": ('{"id": 1, "text": "a", "labels": [3, 7]}\n', ":1: labels as numbers"),
    "unknown-key.jsonl": ('{"id": 1, "text": "a", "labels": {"anger": 1, "joy": 0, "severe_toxic": 0, "calm": 1}}\n', ":1: not a label of 'three': 'calm'"),
    "missing-key.jsonl": ('{"id": 1, "text": "a", "labels": {"anger": 1}}\n', ":1: an object without a value for 'joy', 'severe_toxic'"),
    "text-value.jsonl": ('{"id": 1, "text": "a", "labels": {"anger": "high", "joy": 0, "severe_toxic": 0}}\n', ":1: label 'anger' is 'high'"),
    "tokens.jsonl": ('{"id": 1, "text": ["a", "b"], "labels": ["joy"]}\n', ":1: the text is no string: a list"),
    "nan.jsonl": ('{"id": 1, "text": NaN, "labels": ["joy"]}\n', ":1: the text is no string: nan"),
    "number-text.jsonl": ('{"id": 1, "text": 5, "labels": ["joy"]}\n', ":1: the text is no string: 5"),
    "no-id.jsonl": ('{"id": 1, "text": "a", "labels": ["joy"]}\n{"text": "b", "labels": ["joy"]}\n', r":2: no id \(id\)"),
    "id-list.jsonl": ('{"id": [1], "text": "a", "labels": ["joy"]}\n', r":1: the id \(id\) is no text or number"),
    "blank-id.csv": ("id,text,labels\n1,a,joy\n,b,joy\n", r":3: the id \(id\) is empty"),
    "surrogate-id.jsonl": ('{"id": "\\ud83d", "text": "a", "labels": ["joy"]}\n', r":1: the id \(id\) is damaged"),
    "key-twice.jsonl": ('{"id": 1, "text": "a", "text": "b", "labels": ["joy"]}\n', ":1: not valid JSON: the key 'text' is given twice"),
    "cut.jsonl": ('{"id": 1, "text": "a", "labels": ["joy"]}\n{"id": 2, "te', ":2: not valid JSON"),
    "array-cut.json": ('[{"id": 1, "text": "a", "labels": ["joy"]},\n{"id": 2, "te', ":2: not valid JSON"),
    "scalars.jsonl": ("1\n2\n", ":1, 2: not a JSON object"),
    "deep.jsonl": ("[" * 100_000 + "\n", "nested too deeply|not valid JSON"),
    "other-shape.json": ('{"version": 1, "rows": [{"id": 1, "text": "a"}]}', "whose rows may be in 'rows'"),
    "other-lengths.json": ('{"text": ["a", "b"], "labels": [["joy"]]}', "its lists have different lengths"),
    "json.csv": ('{"id": 1, "text": "a", "labels": ["joy"]}\n', "the first line is JSON and no header"),
    "lfs.csv": ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a pointer of Git LFS.*git lfs pull"),
    "page.csv": ("<!DOCTYPE html>\n<html></html>\n", "a web page or XML"),
    "excel.csv": (b"PK\x03\x04" + b"\0" * 50, "a ZIP archive or an Excel workbook"),
    "rows.xlsx": (b"PK\x03\x04" + b"\0" * 50, "an Excel workbook"),
    "old.csv": (b"\xd0\xcf\x11\xe0" + b"\0" * 50, "an old Excel workbook"),
    "packed.csv": (gz(CSV), "compressed by gzip; give it a name that ends with .gz"),
    "no-gzip.csv.gz": ("id,text\n1,a\n", "cannot be read"),
    "cut.csv.gz": (gz(CSV)[:-9], "cannot be read"),
    "no.parquet": ("id,text\n1,a\n", "it is not a Parquet file"),
    "cut.parquet": (b"PAR1" + b"\0" * 20, "cannot be read"),
    "parquet.csv": (b"PAR1" + b"\0" * 20, "a Parquet file; give it a name that ends with .parquet"),
    "nul.csv": (b"id,text\n1,a\0b\n", "line 2 contains NUL characters"),
    "utf16-without-mark.csv": ("id,text\n1,a\n".encode("utf-16-le"), "NUL characters.*utf-16-le"),
    "rows.docx": (b"PK\x03\x04" + b"\0" * 50, "a ZIP archive"),
    "rows.xyz": ("id,text\n", "the ending '.xyz' is unknown"),
    "carriage.csv": ("id,text,labels\n1,a\rb,joy\n", ":2: "),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_its_line(tmp_path, name):
    content, message = BROKEN[name]
    _, problems = read_rows(write(tmp_path, name, content), THREE, need_labels=True)
    errors = [str(problem) for problem in problems if problem.level == "error"]
    assert errors
    assert any(re.search(name.replace(".", r"\.") + ".*" + message, error, re.DOTALL) for error in errors), errors


@pytest.mark.parametrize(
    ("name", "content", "options", "label_set", "message"),
    [
        ("no-topic.csv", "id,text,sport,politics\n1,a,1,0\n2,b,0,0\n", {}, TOPICS, ":3: no labels, but 'topics' says exactly_one"),
        ("topics.csv", "id,text,sport,politics\n1,a,1,1\n2,b,0,1\n3,c,1,1\n", {}, TOPICS, ":2, 4: 2 labels, but 'topics' says exactly_one"),
        ("a.csv", "id,text\n1,a\n", {"text_column": "txt"}, THREE, "text_column is 'txt', but the columns are: id, text; did you mean 'text'?"),
        ("a.csv", "id,text\n1,a\n", {"id_column": "key"}, THREE, "id_column is 'key', but the columns are: id, text"),
        ("a.csv", "id,text\n1,a\n", {"labels_column": "tags", "need_labels": True}, THREE, "labels_column is 'tags', but the columns are"),
        ("a.csv", "id,text\n1,a\n", {"separator": "||"}, THREE, "separator is '||'; expected one character, or \\t for a tab"),
        ("a.csv", b"id,text\n1,\xff\n", {"encoding": "utf-8"}, THREE, "line 2 is not utf-8"),
        ("a.csv", "id,text\n1,a\n", {"encoding": "utf-99"}, THREE, "unknown encoding"),
    ],
)  # fmt: skip
def test_what_the_recipe_says_does_not_fit(tmp_path, name, content, options, label_set, message):
    _, problems = read_rows(write(tmp_path, name, content), label_set, **options)
    errors = [str(problem) for problem in problems if problem.level == "error"]
    assert any(message in error for error in errors), errors


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no-id.csv", "text,labels\na,joy\nb,anger\n", "no id column"),
        ("filled.csv", "key1,text,labels\nx9,a,joy\nx7,b,anger\n", "no column is named like an id; 'key1' is used"),
        ("unknown.csv", "id,text,anger,joy,severe_toxic,disgust\n1,a,1,0,0,1\n", "columns of 0 and 1 that are no labels of 'three' are ignored: disgust"),
        ("two-texts.csv", "id,text,comment,labels\n1,a,b,joy\n", "several columns could be the text: text, comment; 'text' is read"),
        ("latin.csv", "id,text,labels\n1,caf\xe9,joy\n".encode("latin-1"), ":2: not UTF-8; read as Windows-1252"),
        ("half.jsonl", '{"id": 1, "text": "a \\ud83d", "labels": ["joy"]}\n', ":1: half a character"),
        ("rounded.csv", "id,text,labels\n1.23457E+17,a,joy\n", r":2: the id \(id\) is a rounded number"),
    ],
)  # fmt: skip
def test_what_is_read_with_a_warning(tmp_path, name, content, message):
    rows, problems = read_rows(write(tmp_path, name, content), THREE, need_labels=True)
    assert [problem.level for problem in problems] == ["warning"]
    assert re.search(message, str(problems[0]))
    assert len(rows) >= 1
    rows.texts[0].encode("utf-8")  # nothing crashes later
