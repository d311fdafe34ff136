import json
from pathlib import Path

import pytest

from emogen import paths


def test_shipped_files_are_found_beside_or_inside_the_package():
    assert paths.shipped("prompts/list.jinja").is_file()
    assert paths.shipped("recipes/demo.yaml").is_file()
    assert paths.shipped("sample").is_dir()


def test_a_wheel_holds_the_shipped_files_inside_the_package(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "emogen"
    (package / "prompts").mkdir(parents=True)
    (package.parent / "prompts").mkdir()
    monkeypatch.setattr(paths, "__file__", str(package / "paths.py"))
    assert paths.shipped("prompts") == package / "prompts"
    (package / "prompts").rmdir()
    assert paths.shipped("prompts") == package.parent / "prompts"


def test_the_path_of_a_missing_shipped_file_is_returned_all_the_same():
    assert paths.shipped("prompts/nothing.jinja").name == "nothing.jinja"


def test_a_path_is_looked_up_beside_the_recipe_then_here_then_among_the_shipped_files(tmp_path, monkeypatch):
    name = "prompts/list.jinja"
    here, base = tmp_path / "here", tmp_path / "base"
    for folder in (here, base):
        (folder / "prompts").mkdir(parents=True)
        (folder / name).touch()
    monkeypatch.chdir(here)
    assert paths.find(name, base) == base / name
    assert paths.find(name) == Path(name)
    (base / name).unlink()
    assert paths.find(name, base) == Path(name)
    (here / name).unlink()
    assert paths.find(name, base) == paths.shipped(name)


def test_a_path_through_the_parent_folder_is_shown_without_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews").mkdir()
    (tmp_path / "rows.csv").touch()
    assert paths.find("../rows.csv", Path("reviews")) == Path("rows.csv")
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "elsewhere" / "rows.csv").touch()  # what link/../rows.csv is
    assert paths.find("../rows.csv", Path("link")) == Path("link/../rows.csv")


def test_a_path_that_is_nowhere_is_returned_as_given(tmp_path):
    assert paths.find("nothing/here.yaml", tmp_path) == Path("nothing/here.yaml")


def test_an_absolute_path_is_taken_as_it_is(tmp_path):
    (tmp_path / "list.jinja").touch()
    assert paths.find(tmp_path / "list.jinja", tmp_path / "elsewhere") == tmp_path / "list.jinja"
    assert paths.find("/prompts/list.jinja") == Path("/prompts/list.jinja")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.find("~/posts.csv") == tmp_path / "posts.csv"


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ({"EMOGEN_CACHE": "/one", "XDG_CACHE_HOME": "/two"}, "/one"),
        ({"XDG_CACHE_HOME": "/two"}, "/two/emogen"),
        ({}, "/home/me/.cache/emogen"),
        ({"EMOGEN_CACHE": "~/models"}, "/home/me/models"),
    ],
)
def test_the_cache_folder_can_be_chosen(monkeypatch, settings, folder):
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("EMOGEN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert paths.cache_dir() == Path(folder)


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("before")

    def fail_halfway():
        with paths.writing(path) as file:
            file.write("half")
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["out.txt"]


def test_a_written_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "folder" / "out.csv"
    with paths.writing(path) as file:
        file.write("ä\r\n")
        assert not path.exists()
    assert path.read_bytes() == "ä\r\n".encode()  # UTF-8, with the line ends as written
    assert [p.name for p in path.parent.iterdir()] == ["out.csv"]


def test_a_json_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.json"
    paths.write_json(path, {"a": [1, 2]})
    with pytest.raises(TypeError):
        paths.write_json(path, {"b": object()})
    assert json.loads(path.read_text()) == {"a": [1, 2]}


def test_a_file_of_the_recipe_and_one_of_the_current_folder_are_told_apart(tmp_path, monkeypatch, caplog):
    for folder in ("here", "recipes"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.csv").write_text(folder)
    monkeypatch.chdir(tmp_path / "here")
    for _ in range(2):
        assert paths.find("rows.csv", tmp_path / "recipes").read_text() == "recipes"
    (warning,) = caplog.messages
    assert "recipes/rows.csv is read, which is beside the recipe, and not rows.csv of the current folder" in warning
    caplog.clear()
    assert paths.find("rows.csv", tmp_path / "here").read_text() == "here"  # the same file
    assert paths.find("rows.csv").read_text() == "here"
    assert caplog.messages == []
