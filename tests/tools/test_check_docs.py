"""The check of the documentation finds what is wrong, and nothing else."""

from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent.parent / "tools"


@pytest.fixture
def problems(monkeypatch):
    """Checks a text as if it were docs/page.md; returns what is wrong with it."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import check_docs

    def check(text: str) -> list[str]:
        page = check_docs.Page("docs/page.md", text)
        check_docs.check_page(page)
        return page.problems

    return check


def sh(command: str) -> str:
    return f"```sh\n{command}\n```\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("See [this](nowhere.md).", "1: the link nowhere.md leads to no file"),
        (
            "# A\n\n[b](data.md#no-such-heading)",
            "3: the link data.md#no-such-heading leads to no heading of docs/data.md",
        ),
        ("[c](../pyproject.toml)", "1: the link ../pyproject.toml leaves the site"),
        ("# A & B\n\n[b](#a--b)", "3: the heading of #a--b has another anchor in the site"),
        ("![picture](no.png)", "1: the link no.png leads to no file"),
        (sh("emogen cheque recipes/demo.yaml"), "2: emogen cheque recipes/demo.yaml: there is no such command"),
        (sh("\nemogen show recipes/demo.yaml --rowz 3"), "3: emogen show recipes/demo.yaml --rowz 3: No such option"),
        (sh("emogen train recipes/dmo.yaml"), "2: recipes/dmo.yaml: there is no such file"),
        (sh("emogen train recipes/demo.yaml lora_rr=3"), "2: lora_rr: there is no such recipe key"),
        (sh("emogen train recipes/demo.yaml --lora_r=3"), "2: --lora_r=3: expected key=value"),
        (sh("emogen train recipes/demo.yaml \\\n  prompt=none.jinja"), "2: none.jinja: there is no such file"),
        (sh("accelerate launch emogen/train.py recipes/demo.yaml x=1"), "2: x: there is no such recipe key"),
        (sh("accelerate launch --config_file no.yaml -m emogen.cli keys"), "2: no.yaml: there is no such file"),
        (sh("python benchmarks/none.py"), "2: benchmarks/none.py: there is no such file"),
        (sh("make nothing"), "2: make nothing: there is no such target"),
        (sh("emgen keys"), "2: emgen: an unknown command"),
        ("`emogen cv RECIPE [--fold 5]`", "1: emogen cv RECIPE --fold 5: there is no option --fold"),
        ("`emogen pod launch|lst`", "1: emogen pod lst: there is no such command"),
        ("`lora_rr=3`", "1: lora_rr: there is no such recipe key"),
        ("`emogen/task/nothing.py`", "1: emogen/task/nothing.py: there is no such file"),
        ("```python\nimport emogen\nemogen.nothing\n```", "2: emogen.nothing is not public"),
        ("```python\nif:\n```", "2: python: invalid syntax"),
        ("```yaml\nlora_rr: 3\n```", "2: lora_rr: there is no such recipe key"),
        ("```yaml\nanswer: lists\n```", "2: answer: Input should be"),
        ("```yaml\nname: x\nlabels:\n  - name: a,b\n```", "2: yaml: 2 validation errors"),
        ("```jinja\n{% user %}\n{{ txet }}{{ text }}\n```", "2: jinja: the template:2: undefined variable 'txet'"),
        ("```json\n{1}\n```", "2: json: "),
        ("```rust\n```", "2: a code block of the language 'rust'"),
        ("Run pip install 'emogen[lab]'.", "1: the package called emogen on PyPI is another project's"),
    ],
)
def test_a_mistake_is_reported_with_its_line(problems, text, expected):
    (problem,) = problems(text)
    assert problem.startswith(f"docs/page.md:{expected}")


@pytest.mark.parametrize(
    "text",
    [
        "# My heading\n\n[a](data.md#columns), [b](../CHANGELOG.md), [c](https://example.org), [d](#my-heading)",
        sh("emogen init mine\nemogen check mine/recipe.yaml train_file=mine.csv learning_rate=1e-3  # a comment"),
        sh("emogen predict runs/a runs/b new.csv -o OUT.csv predict_by=stack"),
        sh("emogen predict runs/a new.csv -o out.csv\nemogen score truth.csv out.csv --labels semeval2018"),
        sh("export X=1\nmake install\nrunpod/launch.sh recipes/qwen14b.yaml --max-dollars 5"),
        '```yaml title="own.yaml"\nname: x\nlabels:\n  - name: a\n```\n' + sh("emogen score GOLD.csv new.csv --labels own.yaml"),
        '```yaml title="space.yaml"\nlora_r: [8, 16]\nanswer: [list, json]\n```',
        '```python title="make.py"\nopen("rows.csv", "w")\n```\n' + sh("python make.py\nemogen score rows.csv rows.csv"),
        "```jinja\n{% user %}\n{{ text }}\n{{ label.name }}?\n```\n",
        "`emogen`, `emogen prompts show RECIPE TEMPLATE...`, `emogen --version`, `emogen/task/*.py`, `key=value`",
        "pip install emogen-toolkit, pip install -e ., pip install 'gradio>=6.20,<7'",
    ],
)  # fmt: skip
def test_what_is_right_is_not_reported(problems, text):
    assert problems(text) == []


def test_a_command_that_the_readme_does_not_name_is_found(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import check_docs

    readme = (TOOLS.parent / "README.md").read_text()
    assert check_docs.missing_commands(readme) == []
    without = readme.replace("| `emogen audit RUN_DIR", "| `audit RUN_DIR")
    assert check_docs.missing_commands(without) == ["README.md: the table of commands lacks emogen audit"]
