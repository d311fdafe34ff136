import pytest

from emogen.errors import InputError
from emogen.task.yaml_files import place_of, read_keys, read_value, read_yaml


def write_yaml(tmp_path, text):
    path = tmp_path / "f.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1E5", 1e5),
        ("-3.5e+2", -350.0),
        ("0.1", 0.1),
        ("8", 8),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("", None),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("{metric: f1_micro, within: 0}", {"metric": "f1_micro", "within": 0}),
        ("e5", "e5"),
        ("a: b: c", "a: b: c"),  # not YAML: the text itself
        ("2024-99-99", "2024-99-99"),  # no date
    ],
)
def test_values_are_read_as_yaml_1_2(text, value):
    assert read_value(text) == value
    assert type(read_value(text)) is type(value)


def test_each_key_has_its_line(tmp_path):
    path = write_yaml(tmp_path, "# comment\na: 1\n\nb:\n  - no\nc: {d: 1}\n")
    assert read_yaml(path) == ({"a": 1, "b": ["no"], "c": {"d": 1}}, {"a": f"{path}:2", "b": f"{path}:4", "c": f"{path}:6"})  # fmt: skip


def test_an_empty_file_has_no_keys(tmp_path):
    assert read_yaml(write_yaml(tmp_path, "# nothing\n")) == ({}, {})


def test_keys_are_strings_and_all_have_a_place(tmp_path):
    path = write_yaml(tmp_path, "1: a\nnull: b\nbase: &base {x: 1}\n<<: *base\n")
    values, where = read_yaml(path)
    assert values == {"1": "a", "None": "b", "base": {"x": 1}, "x": 1}
    assert values.keys() <= where.keys()
    assert (where["1"], where["None"], where["x"]) == (f"{path}:1", str(path), str(path))


def test_a_repeated_key_is_an_error_and_the_last_value_counts(tmp_path):
    path = write_yaml(tmp_path, "a: 1\nb: 2\na: 3\n")
    message = f"{path}:3: a: given twice (first at {path}:1)"
    values, where, repeated = read_keys(path)
    assert (values, where["a"], repeated) == ({"a": 3, "b": 2}, f"{path}:3", [message])
    with pytest.raises(InputError) as raised:
        read_yaml(path)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1\n", r"f\.yaml:3: not valid YAML: "),
        ("a: *b\n", r"f\.yaml:1: not valid YAML: found undefined alias"),
        ("[a]: 1\n", r"f\.yaml:1: not valid YAML: found unhashable key"),
        ("a: !!python/object:os.system x\n", r"f\.yaml:1: not valid YAML: could not determine a constructor"),
        ("a: 2024-99-99\n", r"f\.yaml:1: not valid YAML: not a valid timestamp: month must be in 1\.\.12"),
        ("- a\n", r"f\.yaml:1: expected `key: value` lines"),
        ("text\n", r"f\.yaml:1: expected `key: value` lines"),
        ("!!set {a, b}\n", r"f\.yaml:1: expected `key: value` lines"),
    ],
)
def test_a_file_that_is_no_mapping_is_an_error(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read_yaml(write_yaml(tmp_path, text))


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml: cannot be read: "):
        read_yaml(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes("a: ä".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.yaml: cannot be read: line 1 is not UTF-8"):
        read_yaml(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: !!timestamp x\n", r"odd\.yaml:2: not valid YAML: not a valid timestamp"),
        ("a: !!int x\n", r"odd\.yaml:1: not valid YAML: not a valid int"),
        ("a: " + "9" * 5000 + "\n", r"odd\.yaml:1: not valid YAML: a number of thousands of digits"),
        ("a: !!python/object/apply:os.system ['ls']\n", r"odd\.yaml:1: not valid YAML: could not determine a constructor"),
        ("? [1]\n: 2\n", r"odd\.yaml:1: not valid YAML: "),
        ("a: &x [*x]\n", r"odd\.yaml: cannot be read: line 1: an alias that contains itself"),
        ("a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n" for a, b in zip("abcde", "bcdef", strict=True)),
         r"odd\.yaml: cannot be read: its aliases expand to more than 100,000 values"),
        ("[" * 5000, r"odd\.yaml: cannot be read: nested too deeply"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_built_are_errors(tmp_path, text, message):
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_yaml(tmp_path / "odd.yaml")


def test_the_place_of_a_value(tmp_path):
    (tmp_path / "a.yaml").write_text("x: 1\nlabels:\n  - name: a\n  - name: b\n    definition: c\n")
    path = tmp_path / "a.yaml"
    assert place_of(path, ("labels", 1, "definition")) == f"{path}:5"
    assert place_of(path, ("labels", 0)) == f"{path}:3"
    assert place_of(path, ("labels", 0, "missing")) == f"{path}:3"
    assert place_of(path, ()) == f"{path}:1"
