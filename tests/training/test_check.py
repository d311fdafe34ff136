import pytest
from tiny import POSTS, make_tokenizer, write_posts, write_recipe

from emogen.training.check import check


@pytest.fixture(scope="module")
def folder(tmp_path_factory, labels):
    """A folder with a recipe, its model and its rows. Tests add files, but change none."""
    folder = tmp_path_factory.mktemp("check")
    write_recipe(folder, labels)
    return folder


@pytest.fixture
def check_with(folder, monkeypatch):
    """Checks the recipe with overrides. Returns its facts and its problems (level: message)."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def check_with(**keys):
        recipe = folder / "tiny.yaml"
        findings = check(recipe, [f"{key}={value}" for key, value in keys.items()])
        assert findings.failed == any(problem.level == "error" for problem in findings.problems)
        return findings.facts, [
            f"{problem.level}: {problem}".replace(f"{folder}/", "") for problem in findings.problems
        ]

    return check_with


def test_a_valid_recipe_has_facts_and_no_problems(check_with, labels):
    facts, problems = check_with()
    assert problems == []
    assert facts[0] == f"labels: 11 ({', '.join(labels.names)})"
    assert facts[1] == "data: 12 training rows, no evaluation rows"
    assert facts[2].startswith("prompt: ")
    assert facts[2].endswith(" tokens shared by all rows")
    facts, _ = check_with(eval_fraction=0.25)
    assert facts[1] == "data: 9 training rows, 3 evaluation rows"


def test_all_wrong_keys_are_reported_together(check_with):
    facts, problems = check_with(lora_rr=3, learning_rate="fast", packing="true")
    assert facts == []
    assert len(problems) == 3
    for problem, part in zip(sorted(problems), ("learning_rate", "lora_rr", "packing"), strict=True):
        assert problem.startswith("error: ")
        assert part in problem


def test_a_missing_label_set_and_a_missing_prompt_are_reported_together(check_with):
    _, problems = check_with(labels="nothing", prompt="nothing.jinja")
    assert [problem.partition(": ")[2].partition("nothing")[0] for problem in problems] == [
        "tiny.yaml: labels: ",
        "tiny.yaml: prompt: ",
    ]


def test_errors_of_the_rows_are_reported_with_those_of_the_prompt(check_with, folder, labels):
    rows = write_posts(folder / "twice.csv", labels)
    rows.write_text(rows.read_text().replace("p1,", "p0,"))
    (folder / "undefined.jinja").write_text("{% user %}\n{{ txet }}{{ text }}")
    _, problems = check_with(train_file=rows, prompt=folder / "undefined.jinja")
    assert any("the id 'p0' occurs 2 times" in problem for problem in problems)
    assert any("undefined.jinja:2: undefined variable 'txet'" in problem for problem in problems)


def test_examples_and_a_prompt_without_them_are_a_warning(check_with):
    _, problems = check_with(examples=2)
    assert problems == ["warning: tiny.yaml: `examples` is 2, but prompts/list.jinja shows none"]
    _, problems = check_with(prompt="prompts/few_shot.jinja")
    message = (
        "shows {{ examples }}, but `examples` is 0, so there are none; set `examples: 4`, or choose another prompt"
    )
    assert problems == [f"warning: prompts/few_shot.jinja:9: {message}"]


@pytest.mark.parametrize(("answer", "max_length"), [("list", 400), ("head", 100)])
def test_shortened_texts_are_a_warning_with_their_lines(check_with, folder, labels, answer, max_length):
    long = [(f"{text} " * 90, names) for text, names in POSTS[:7]]
    rows = write_posts(folder / "long.csv", labels, [*POSTS, *long])
    _, problems = check_with(train_file=rows, answer=answer, max_length=max_length)
    lines = "long.csv:14, 15, 16, 17, 18 and 2 more"
    assert problems == [f"warning: {lines}: 7 texts are shortened to fit max_length={max_length}"]


def test_no_room_for_a_text_is_an_error(check_with):
    _, problems = check_with(max_length=32)
    assert len(problems) == 1
    assert "max_length=32 leaves no room for the text" in problems[0]


def test_a_head_is_checked_without_the_prompt(check_with, folder):
    facts, problems = check_with(answer="head")
    assert problems == []
    assert facts[2] == f"head: {folder / 'model-llama'} reads the text without a prompt"


@pytest.mark.parametrize("answer", ["list", "head"])
def test_without_the_model_the_lengths_are_not_checked(check_with, answer):
    _, problems = check_with(model_name_or_path="nobody/nothing", answer=answer)
    assert len(problems) == 1
    assert problems[0].startswith("warning: tiny.yaml: lengths were not checked: nobody/nothing: no such folder")


def test_a_base_model_is_a_warning(check_with, folder):
    base = folder / "base"
    make_tokenizer(chat_template=None).save_pretrained(base)
    (base / "config.json").write_text((folder / "model-llama" / "config.json").read_text())
    _, problems = check_with(model_name_or_path=base)
    assert problems == ["warning: tiny.yaml: base has no chat template: it is a base model, and gets a plain one"]


def test_code_from_the_model_repository_is_a_warning(check_with):
    _, problems = check_with(trust_remote_code="true")
    assert problems == ["warning: tiny.yaml: trust_remote_code runs code from the model's repository on this machine"]
