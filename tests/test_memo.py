"""Results that are kept between commands."""

import pytest

from emogen import memo
from emogen.memo import remembered


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EMOGEN_CACHE", str(tmp_path))
    return tmp_path


def counted(result):
    calls = []

    def compute():
        calls.append(result)
        return result

    return compute, calls


def test_a_result_is_computed_once_for_all_that_it_depends_on():
    compute, calls = counted([1, {"a": None}])
    assert [remembered("things", ["x", 1], compute) for _ in range(3)] == [[1, {"a": None}]] * 3
    assert len(calls) == 1
    remembered("things", ["x", 2], compute)
    remembered("others", ["x", 1], compute)
    remembered("things", ["x", 1], compute, packages=("numpy",))
    assert len(calls) == 4


def test_a_damaged_or_missing_file_is_computed_again(cache):
    compute, calls = counted("text")
    remembered("things", 1, compute)
    [path] = cache.glob("things/*")
    path.write_text('"te')
    assert remembered("things", 1, compute) == "text"
    assert len(calls) == 2
    assert remembered("things", 1, compute) == "text"
    assert len(calls) == 2


def test_a_long_text_is_kept_as_it_is(cache):
    compute, _ = counted('{"é": "\\n"}')
    assert remembered("texts", 1, compute, is_text=True) == '{"é": "\\n"}'
    assert [path.read_text(encoding="utf-8") for path in cache.glob("texts/*")] == ['{"é": "\\n"}']
    assert remembered("texts", 1, compute, is_text=True) == '{"é": "\\n"}'


def test_what_must_not_be_kept_is_not(cache):
    compute, calls = counted(["an error"])
    for _ in range(2):
        assert remembered("checks", 1, compute, keep=lambda errors: not errors) == ["an error"]
    assert len(calls) == 2
    assert not list(cache.glob("checks/*"))

    def fails():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        remembered("checks", 1, fails)


def test_without_a_folder_to_write_to_nothing_is_kept(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EMOGEN_CACHE", str(tmp_path / "file"))
    compute, calls = counted(1)
    assert [remembered("things", 1, compute) for _ in range(2)] == [1, 1]
    assert len(calls) == 2


def test_the_oldest_files_are_removed(monkeypatch, cache):
    monkeypatch.setattr(memo, "MAX_FILES", 3)
    for k in range(5):
        compute, _ = counted(k)
        remembered("things", k, compute)
    assert len(list(cache.glob("things/*"))) == 3
    compute, calls = counted(4)
    remembered("things", 4, compute)
    assert not calls
