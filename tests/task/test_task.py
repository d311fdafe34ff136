import json

import numpy as np
import pytest
from tiny import POSTS, write_posts

from emogen.errors import InputError
from emogen.task.labels import Label, LabelSet
from emogen.task.prompt import make_examples
from emogen.task.recipe import load_recipe
from emogen.task.task import EXAMPLES, by_frequency, load_task, load_task_with_rows, write_examples

# In POSTS, joy occurs three times, anticipation and trust once, and the other labels twice.
FREQUENT_FIRST = ("joy", "anger", "disgust", "fear", "love", "optimism", "pessimism", "sadness", "surprise", "anticipation", "trust")  # fmt: skip
RARE_FIRST = ("anticipation", "trust", "anger", "disgust", "fear", "love", "optimism", "pessimism", "sadness", "surprise", "joy")  # fmt: skip


def recipe_in(folder, labels, *overrides):
    """A recipe in a folder, with its training rows outside of it."""
    folder.mkdir(exist_ok=True)
    train = write_posts(folder.parent / "train.csv", labels)
    path = folder / "recipe.yaml"
    path.write_text(f"model_name_or_path: m\ntrain_file: {train}\nprompt: prompts/few_shot.jinja\n")
    return load_recipe(path, overrides)


def test_the_parts_of_a_recipe_are_loaded(tmp_path, labels):
    recipe = recipe_in(tmp_path / "r", labels, "examples=2", "eval_fraction=0.25")
    task, splits, problems = load_task_with_rows(recipe)
    assert (task.recipe, task.label_set, problems) == (recipe, labels, [])
    assert task.prompt.path.endswith("few_shot.jinja")
    assert [example.text for example in task.examples] == splits.examples.texts
    names = dict(POSTS)
    for example in task.examples:
        assert example.labels == labels.sort(names[example.text])
        assert example.answer == (", ".join(example.labels) or "none")
    assert len(splits.train) + len(splits.eval) == 10


def test_a_run_folder_uses_the_examples_that_it_holds(tmp_path, labels):
    folder = tmp_path / "run"
    recipe = recipe_in(folder, labels, "examples=2", "answer=json", "prompt=prompts/json.jinja")
    kept = make_examples([("über alles", ("joy", "love")), ("a\u2028b", ())], labels, "json")
    write_examples(folder, kept)
    (tmp_path / "train.csv").unlink()  # training rows are not needed
    task = load_task(recipe)
    assert task.examples == kept
    assert [example.answer for example in task.examples] == ['["joy", "love"]', "[]"]
    lines = (folder / EXAMPLES).read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"text": "über alles", "labels": ["joy", "love"]}


def test_any_other_recipe_draws_its_examples_from_the_training_rows(tmp_path, labels):
    recipe = recipe_in(tmp_path / "r", labels, "examples=2")
    assert load_task(recipe).examples == load_task_with_rows(recipe)[0].examples
    assert len(load_task(recipe).examples) == 2


def test_training_draws_examples_even_where_a_folder_holds_some(tmp_path, labels):
    recipe = recipe_in(tmp_path / "run", labels, "examples=2")
    write_examples(tmp_path / "run", make_examples([("kept", ())], labels, "list"))
    assert [example.text for example in load_task(recipe).examples] == ["kept"]
    assert "kept" not in [example.text for example in load_task_with_rows(recipe)[0].examples]


def test_training_rows_are_read_only_if_they_are_needed(tmp_path, labels):
    recipe = recipe_in(tmp_path / "r", labels)
    (tmp_path / "train.csv").unlink()
    assert load_task(recipe).examples == []
    with pytest.raises(InputError, match=r"train\.csv: no such file"):
        load_task_with_rows(recipe)
    for override in ("examples=1", "order=rare_first"):
        with pytest.raises(InputError, match=r"train\.csv: no such file"):
            load_task(load_recipe(recipe.path, [override]))


@pytest.mark.parametrize(("order", "names"), [("canonical", ()), ("frequent_first", FREQUENT_FIRST), ("rare_first", RARE_FIRST)])  # fmt: skip
def test_the_order_of_answers_is_counted_in_the_training_rows(tmp_path, labels, order, names):
    recipe = recipe_in(tmp_path / "r", labels, f"order={order}")
    for label_set in (load_task(recipe).label_set, load_task_with_rows(recipe)[0].label_set):
        assert label_set.order == names
        assert label_set.names == labels.names


def test_the_order_of_a_label_set_takes_precedence(tmp_path, labels):
    """A run folder holds the label set that it was trained with, whatever its training rows are now."""
    order = tuple(reversed(labels.names))
    own = tmp_path / "labels.yaml"
    own.write_text(LabelSet(name="x", labels=labels.labels, order=order).to_yaml())
    recipe = recipe_in(tmp_path / "r", labels, "order=rare_first", f"labels={own}")
    assert load_task_with_rows(recipe)[0].label_set.order == order
    (tmp_path / "train.csv").unlink()
    assert load_task(recipe).label_set.order == order


def test_examples_are_answered_in_the_order_of_the_recipe(tmp_path, labels):
    recipe = recipe_in(tmp_path / "r", labels, "order=rare_first", "examples=11")
    answers = {example.text: example.answer for example in load_task(recipe).examples}
    order = load_task(recipe).label_set.order
    for text, names in POSTS:
        if text in answers:
            assert answers[text] == (", ".join(sorted(names, key=order.index)) or "none")
    assert len(answers) == 11


def test_labels_of_the_same_frequency_keep_the_canonical_order():
    label_set = LabelSet(name="x", labels=tuple(Label(name=name) for name in "abcd"))
    gold = np.array([[1, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]], dtype=np.int8)  # a: 1, b: 0, c: 3, d: 3
    assert by_frequency(label_set, gold, rare_first=False).order == ("c", "d", "a", "b")
    assert by_frequency(label_set, gold, rare_first=True).order == ("b", "a", "c", "d")


@pytest.mark.parametrize("key", ["labels", "prompt"])
def test_a_missing_part_is_an_error(tmp_path, labels, key):
    recipe = recipe_in(tmp_path / "r", labels, f"{key}=nowhere")
    for load in (load_task, load_task_with_rows):
        with pytest.raises(InputError, match="nowhere: no such"):
            load(recipe)
