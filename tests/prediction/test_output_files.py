from pathlib import Path

import pytest
from tiny import POSTS, write_posts

from emogen.claims import claim
from emogen.errors import InputError
from emogen.prediction.output_files import ResumableWriter, check_outputs
from emogen.task.rows import Rows

JOB = {"runs": ["a"], "content of the runs": ["1"]}


@pytest.fixture
def files(tmp_path):
    return [tmp_path / "out.csv", tmp_path / "out.jsonl"]


def rows_of(*ids):
    return Rows("new.csv", list(ids), [f"text {i}" for i in ids], None, list(range(len(ids))))


def write(files, *, rows=("1", "2"), job=JOB, overwrite=False, finish=True):
    """One row in each chunk, as `predict_file` does it; returns the rows that were not there before."""
    writer = ResumableWriter(files, job, overwrite=overwrite)
    new = []
    for k, name in enumerate(rows):
        if not writer.has(rows_of(name), k):
            writer.add([f"{name},{file.suffix}\n" for file in files], 1)
            new.append(name)
    if finish:
        writer.finish(len(rows))
    return new


def contents(files):
    return [file.read_text() for file in files]


COMPLETE = ["1,.csv\n2,.csv\n", "1,.jsonl\n2,.jsonl\n"]


def test_complete_files_are_not_replaced_unless_asked(files):
    assert write(files) == ["1", "2"]
    assert contents(files) == COMPLETE
    with pytest.raises(InputError, match=r"out\.csv.*out\.jsonl: exists; add --overwrite"):
        write(files)
    assert write(files, rows="12", overwrite=True) == ["1", "2"]
    assert contents(files) == COMPLETE


@pytest.mark.parametrize("n_renamed", [0, 1, 2])
def test_a_call_that_was_killed_between_renames_is_completed(files, n_renamed):
    write(files, finish=False)
    writer = ResumableWriter(files, JOB)
    writer.complete, writer.digest = True, type("Digest", (), {"hexdigest": lambda self: writer.expected})()
    writer._write_note()
    for file in files[:n_renamed]:
        writer.partial[file].replace(file)
    assert write(files) == []
    assert contents(files) == COMPLETE
    assert sorted(path.name for path in files[0].parent.iterdir()) == ["out.csv", "out.jsonl"]


@pytest.mark.parametrize("damage", [b"1,.cs", b"9,.csv\n", b""])
def test_a_damaged_partial_file_is_not_continued(files, damage):
    write(files, rows="1", finish=False)
    partial = files[0].with_name("out.csv.partial")
    partial.write_bytes(damage)
    with pytest.raises(InputError, match=r"out\.csv\.partial: not as it was written: cut or changed; add --overwrite"):
        write(files)
    assert write(files, overwrite=True) == ["1", "2"]
    assert contents(files) == COMPLETE


def test_what_follows_the_last_complete_chunk_is_removed(files):
    write(files, rows="1", finish=False)
    with files[1].with_name("out.jsonl.partial").open("a") as file:
        file.write("2,.js")
    assert write(files) == ["2"]
    assert contents(files) == COMPLETE


@pytest.mark.parametrize("note", ["", "[1]", '{"job": 1}', "\0\0"])
def test_a_damaged_note_is_named(files, note):
    write(files, rows="1", finish=False)
    files[0].with_name("out.csv.partial.json").write_text(note)
    with pytest.raises(InputError, match=r"out\.csv\.partial\.json: not a note .*--overwrite"):
        write(files)
    assert write(files, overwrite=True) == ["1", "2"]


@pytest.mark.parametrize("key", list(JOB))
def test_another_job_does_not_continue(files, key):
    write(files, rows="1", finish=False)
    with pytest.raises(InputError, match=f"belongs to other, interrupted work \\(other {key}\\)"):
        write(files, job=JOB | {key: ["b"]})


@pytest.mark.parametrize(("first", "then"), [([0], [0, 1]), ([1], [0, 1]), ([0, 1], [0]), ([0, 1], [1])])
def test_other_outputs_do_not_continue(files, first, then):
    write([files[k] for k in first], rows="1", finish=False)
    named = [files[k] for k in then]
    if first == [0, 1] and then == [1]:  # the note is beside out.csv, which the new call does not write
        assert write(named) == ["1", "2"]
        return
    with pytest.raises(InputError, match=r"other outputs.*--overwrite"):
        write(named)
    assert write(named, overwrite=True) == ["1", "2"]
    assert contents(named) == [COMPLETE[k] for k in then]


def test_outputs_are_regular_files(tmp_path):
    (tmp_path / "link.csv").symlink_to(tmp_path / "target.csv")
    assert check_outputs([tmp_path / "link.csv", tmp_path / "new" / "b"]) == [
        tmp_path / "target.csv",
        tmp_path / "new" / "b",
    ]
    with pytest.raises(InputError, match="named for two outputs"):
        check_outputs([tmp_path / "link.csv", tmp_path / "." / "target.csv"])
    with pytest.raises(InputError, match="a folder, not a file"):
        check_outputs([tmp_path])
    with pytest.raises(InputError, match="a device or a pipe, not a file; name a file, or - for standard output"):
        check_outputs([Path("/dev/null")])
    with pytest.raises(InputError, match="holds one file"):
        check_outputs([Path("-"), tmp_path / "a"])


def test_predict_writes_to_standard_output_follows_links_and_does_not_share_a_file(emogen, tiny_run, tmp_path, labels):
    source = write_posts(tmp_path / "new.csv", labels, POSTS[:3])
    lines = emogen("predict", tiny_run, source, "-o", "-").out.splitlines()
    assert lines[0] == ",".join(["ID", *labels.names])
    assert [line.partition(",")[0] for line in lines[1:]] == ["p0", "p1", "p2"]

    (tmp_path / "out.csv").symlink_to(tmp_path / "elsewhere.csv")
    with claim(tmp_path / "elsewhere.csv"):
        message = emogen("predict", tiny_run, source, "-o", tmp_path / "out.csv", code=2).err
        assert "elsewhere.csv: in use by process" in message
    emogen("predict", tiny_run, source, "-o", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").is_symlink()
    assert (tmp_path / "elsewhere.csv").read_text().splitlines() == lines
