"""The search for a better prompt. Most of it is tried with the stand-in of an endpoint, whose answers are known."""

import csv
import json
import re
from contextlib import nullcontext
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import POSTS, write_posts, write_recipe

from emogen.errors import ModelError
from emogen.evaluation.results import read_scored
from emogen.experiments.improve import improve, open_space
from emogen.experiments.prompts import load_generator, open_benchmark, prepare
from emogen.task.blocks import find_blocks
from emogen.task.prompt import load_prompt, parse_prompt
from emogen.train import main as train

LABELS = '{{ names | join(", ") }} or {{ empty }}'
TEMPLATE = f"""\
{{% system %}}
Say what is felt.
{{# improve: wording #}}
Be wrong: {LABELS}.
{{# or: Be half right: {LABELS}. #}}
{{# or: Be right: {LABELS}. #}}
{{# or: Be lost. {{{{ oops }}}} #}}
{{# end #}}
{{% user %}}
{{{{ text }}}}
"""
TRAIN = [(f"{text} {k}", names) for k in range(6) for text, names in POSTS]
EVAL = [(f"other {text} {k}", names) for k in range(4) for text, names in POSTS]


def silent(title, total):
    return nullcontext(lambda n: None)


@pytest.fixture
def template(tmp_path):
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    return tmp_path / "mine.jinja"


@pytest.fixture
def remote(endpoint, tmp_path, labels):
    """The overrides of a recipe whose model answers as its prompt says: rightly, half of the rows rightly, or wrongly."""
    gold = {text: ", ".join(names) or "none" for text, names in [*TRAIN, *EVAL]}

    def answer(messages):
        text = messages[-1]["content"]
        if "<template>" in text:
            return endpoint.proposals.pop(0)
        order = messages[0]["content"]
        right = "Be right" in order or ("Be half right" in order and len(text) % 2)
        return gold[text] if right else "none" if "trust" in gold[text] else "trust"

    endpoint.answer = staticmethod(answer)
    endpoint.proposals = []
    (tmp_path / "labels.yaml").write_text(labels.to_yaml())
    return [
        f"api_base={endpoint.base}",
        "api_model=tiny",
        "order=canonical",
        f"labels={tmp_path / 'labels.yaml'}",
        f"train_file={write_posts(tmp_path / 'train.csv', labels, [*TRAIN, EVAL[0]])}",
        f"eval_file={write_posts(tmp_path / 'eval.csv', labels, EVAL)}",
        f"output_dir={tmp_path / 'out'}",
    ]


def search(template, overrides, **options):
    return improve("recipes/remote.yaml", template, overrides, **{"limit": 40, "by": "answer", "bar": silent} | options)


NO_PROPOSAL = ["nothing"] * 100


def test_the_best_wording_is_found_and_scored_on_rows_that_the_search_never_saw(endpoint, remote, template, labels):
    endpoint.proposals = list(NO_PROPOSAL)
    found = search(template, remote)
    assert found.best == "wording 3"
    assert [candidate.name for candidate in found.tried] == ["wording 3", "wording 2", "as it is", "wording 4"]
    assert "undefined variable 'oops'" in found.tried[-1].refused
    start, best = found.unseen
    assert best.metrics["n"] == len(EVAL) == start.metrics["n"]
    assert best.metrics["f1_macro"] == 1.0
    assert start.metrics["f1_macro"] == 0.0  # trust is always wrong here
    assert best.difference == 1.0
    assert found.n_looks == 1
    assert template.read_text() == TEMPLATE
    assert found.template.parent == found.folder
    assert found.template.read_text() == re.sub(
        r"Be wrong.*?(?=\{# end)", f"Be right: {LABELS}.\n", TEMPLATE, flags=re.DOTALL
    )
    asked = [body["messages"] for body in endpoint.asked if "<template>" not in body["messages"][-1]["content"]]
    unseen = {text for text, _ in EVAL}
    assert not any("half right" in messages[0]["content"] for messages in asked if messages[-1]["content"] in unseen)
    searched = {messages[-1]["content"] for messages in asked} - unseen
    assert len(searched) == 40
    assert len(asked) == 40 * 3 + len(unseen) * 2


def test_the_same_call_asks_nothing_again(endpoint, remote, template):
    endpoint.proposals = list(NO_PROPOSAL)
    found = search(template, remote)
    n_asked = len(endpoint.asked)
    again = search(template, remote)
    assert len(endpoint.asked) == n_asked
    assert (again.best, again.template, again.n_looks) == (found.best, found.template, 1)


def test_the_worse_half_is_dropped_on_few_rows(endpoint, remote, tmp_path):
    endpoint.proposals = list(NO_PROPOSAL)
    more = "".join(f"{{# or: Be wrong {k}: {LABELS}. #}}\n" for k in range(5))
    (tmp_path / "mine.jinja").write_text(TEMPLATE.replace("{# end", f"{more}{{# end"))
    found = search(tmp_path / "mine.jinja", remote)
    rows = {candidate.name: candidate.rows for candidate in found.tried}
    assert rows == {"as it is": 40, "wording 2": 40, "wording 3": 40, "wording 4": 0} | {
        f"wording {k}": 20 if k > 5 else 40 for k in range(5, 10)
    }
    dropped = next(candidate for candidate in found.tried if candidate.name == "wording 9")
    assert (dropped.gain, dropped.gain_interval, dropped.system) == (0.0, None, None)
    with (found.folder / "mine-tried.csv").open() as file:
        lines = list(csv.reader(file))
    assert lines[1][:2] == ["wording 3", "40"]
    assert float(lines[1][2]) == pytest.approx(1 - 0.0, abs=0.1)
    assert [line[0] for line in lines[1:]] == [candidate.name for candidate in found.tried]


def test_wordings_are_proposed_for_rows_that_are_wrong(endpoint, remote, tmp_path):
    leak = TRAIN[0][0]
    endpoint.proposals = [
        "I would say more.",
        "<block>{% user %}\nBe right.</block>",
        f"<block>Be right, as for: {leak}, {LABELS}</block>",
        f"It lacks care.\n<block>\nBe half right, with care: {LABELS}.\n</block>",
        *[f"<block>Be right: {LABELS}.</block>"] * 4,
        *NO_PROPOSAL,
    ]
    source = re.sub(r"\{# or.*#\}\n", "", TEMPLATE)
    (tmp_path / "mine.jinja").write_text(source)
    found = search(tmp_path / "mine.jinja", remote, limit=len(TRAIN))
    assert found.best == "wording rewritten 3"
    assert found.template.read_text() == source.replace("Be wrong", "Be right")
    (refused,) = [candidate for candidate in found.tried if candidate.refused]
    assert "contains the text of row" in refused.refused
    questions = [text for body in endpoint.asked if "<template>" in (text := body["messages"][-1]["content"])]
    assert "<block>\nBe wrong" in questions[0]
    assert questions[0].count("Text: ") == 8
    assert "Given labels: trust" in questions[0]
    assert "other" not in questions[0]  # no unseen row
    assert questions[0] != questions[1]
    assert "<block>\nBe half right, with care" in questions[4]  # the best one so far
    assert len(questions) == 7  # so few rows are wrong that two questions are the same; and then none is


def test_the_dollars_of_the_search_are_half_of_all(endpoint, remote, template):
    dear = ["api_prices=[0, 1000000]", "api_requests=1"]  # a dollar for each answer
    endpoint.proposals = list(NO_PROPOSAL)
    with pytest.raises(ModelError, match=r"max_dollars: \$20\.0000 of \$20 are spent"):
        search(template, [*remote, *dear, "max_dollars=40"])
    found = search(template, [*remote, *dear, "max_dollars=60"])  # 30 more: the start is scored, and 10 answers more
    assert "max_dollars" in found.stopped
    assert (found.best, found.unseen) == ("as it is", [])
    found = search(template, [*remote, *dear, "max_dollars=200"])
    assert found.best == "wording 3"
    assert found.unseen[1].metrics["f1_macro"] == 1.0


def test_without_time_nothing_but_the_start_is_scored(endpoint, remote, template):
    found = search(template, remote, minutes=0)
    assert "--minutes are over" in found.stopped
    assert found.best == "as it is"
    assert found.unseen == []
    assert found.template == template
    assert len(endpoint.asked) == 40


def test_another_look_at_the_unseen_rows_is_counted(endpoint, remote, template, tmp_path):
    endpoint.proposals = list(NO_PROPOSAL)
    assert search(template, remote).n_looks == 1
    other = tmp_path / "other.jinja"
    other.write_text(TEMPLATE.replace("Say", "Tell"))
    assert search(other, remote).n_looks == 2


def test_what_was_found_is_printed(endpoint, remote, template, emogen):
    endpoint.proposals = list(NO_PROPOSAL)
    words = ["prompts", "improve", "recipes/remote.yaml", template, "--limit", 40, "--by", "answer", *remote]
    shown = emogen(*words).out
    assert "3 candidates, 1 refused; 40 rows. Jaccard" in shown
    assert "The best one is: wording 3. On 48 rows that the search never saw:" in shown
    assert "as it is   macro-F1 0.000" in shown
    assert "Without a model: all labels to every row: macro-F1" in shown
    assert "note as it is: " in shown  # trust to nearly every row
    assert re.search(r"difference \+1\.000 .*: (better|too few rows)", shown)
    assert "Next: emogen predict recipes/remote.yaml YOUR.csv -o OUT.csv prompt=" in shown
    assert emogen(*words, "--minutes", 0).out.endswith("were not looked at.\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipes/demo.yaml", "prompts/list.jinja", "prompts/json.jinja"], "name one template"),
        (["recipes/demo.yaml", "prompts/list.jinja", "--by", "luck"], "not luck"),
        (["recipes/demo.yaml", "prompts/list.jinja", "eval_file=null"], "no rows for the final score"),
        (["recipes/demo.yaml", "prompts/list.jinja", "order=canonical"], "list.jinja: nothing to change"),
        (["recipes/demo.yaml", "prompts/list.jinja", "--rewriter", "recipes/demo.yaml"], "it names no endpoint"),
    ],
)
def test_what_cannot_be_searched_is_an_error(emogen, tmp_path, monkeypatch, labels, words, message):
    own = [
        "model_name_or_path=" + str(write_recipe(tmp_path, labels).parent / "model-llama"),
        f"output_dir={tmp_path}/o",
    ]
    assert message in " ".join(emogen("prompts", "improve", *words, *own, code=2).err.split())


# ------------------------------------------------------------------------------------------- a model that is here


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, labels):
    """A recipe with 72 training rows, 48 evaluation rows, and a model that has learned nothing."""
    folder = tmp_path_factory.mktemp("recipe")
    eval_file = write_posts(folder / "eval.csv", labels, EVAL)
    return write_recipe(folder, labels, posts=TRAIN, eval_file=str(eval_file))


def space_of(recipe, template, *overrides):
    benchmark = open_benchmark(recipe, overrides)
    return open_space(benchmark, find_blocks(load_prompt(template)), overrides)


def test_keys_are_searched_over_unless_the_command_sets_them(recipe):
    orders = [(), ("order=frequent_first",), ("order=rare_first",)]
    assert space_of(recipe, "prompts/list.jinja").keys == [orders]
    few_shot = space_of(recipe, "prompts/few_shot.jinja", "order=canonical").keys
    ways = [(f"examples={n}", f"examples_by={by}") for n in (2, 4, 8) for by in ("drawn", "coverage")]
    assert few_shot == [[(), *ways]]
    with_four = space_of(recipe, "prompts/improve.jinja", "order=canonical", "examples=4")
    assert with_four.keys == []
    assert [len(texts) for texts in with_four.wordings] == [2, 3, 3, 2, 3]


def test_every_wording_of_the_shipped_start_is_valid(recipe):
    benchmark = open_benchmark(recipe, ["examples=2", "max_length=null"])
    space = open_space(benchmark, find_blocks(load_prompt("prompts/improve.jinja")), ["examples=2"])
    start = (0,) * len(space.sizes)
    for choice in [start, *space.neighbours(start)]:
        template = prepare(benchmark, parse_prompt(space.source(choice), "t.jinja"))
        assert [warning for warning in template.warnings if "is used with" not in warning] == []
    assert {space.name(choice) for choice in space.neighbours(start)} >= {"style 2", "hint 3", "order=rare_first"}


def test_the_figures_of_a_model_that_is_here_are_log_likelihoods(recipe, tmp_path, labels):
    (tmp_path / "mine.jinja").write_text(
        "{% user %}\n{# improve: a #}\nFelt?\n{# or: {{ task }} #}\n{# end #}\n{{ text }}"
    )
    overrides = [f"output_dir={tmp_path / 'out'}", "order=canonical"]
    found = improve(recipe, tmp_path / "mine.jinja", overrides, limit=24, by="answer", bar=silent)
    assert found.figure == "ln P"
    assert {candidate.rows for candidate in found.tried} == {24}
    kept = {
        path.parent: np.array(json.loads(path.read_text())["ln P"])
        for path in (tmp_path / "out").rglob("row_scores.json")
    }
    assert len(kept) == 2
    for folder, figures in kept.items():
        assert figures.shape == (24,)
        assert (figures < 0).all()
        over_all_tokens = json.loads((folder / "metrics.json").read_text())["log_likelihood"]
        assert figures.mean() > over_all_tokens  # of fewer answers, each is more probable
        searched = read_scored(folder, labels)
        assert len(searched.ids) == 24
    improve(recipe, tmp_path / "mine.jinja", overrides, limit=24, by="answer", bar=silent)
    assert {candidate.system.metrics["n"] for candidate in found.tried} == {24}


def test_when_the_time_is_over_the_best_candidate_so_far_is_scored(recipe, tmp_path, monkeypatch):
    seconds = count(0, 20)  # each look at the clock takes 20 seconds
    monkeypatch.setattr("emogen.experiments.improve.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    others = "".join(f"{{# or: Felt {k}? #}}\n" for k in range(20))
    (tmp_path / "mine.jinja").write_text(
        f"{{% user %}}\n{{# improve: a #}}\nFelt?\n{others}{{# end #}}\n{{{{ text }}}}"
    )
    overrides = [f"output_dir={tmp_path / 'out'}", "order=canonical"]
    found = improve(recipe, tmp_path / "mine.jinja", overrides, limit=20, minutes=2, by="answer", bar=silent)
    assert "--minutes are over" in found.stopped
    looked_at = [candidate for candidate in found.tried if candidate.rows]
    assert 2 < len(looked_at) < 8
    scored = [candidate for candidate in found.tried if candidate.system]
    assert len(scored) == 2  # the start, and the one with the highest figure
    (leader,) = [candidate for candidate in scored if candidate.name != "as it is"]
    assert leader.gain == max(candidate.gain for candidate in looked_at if candidate.name != "as it is")


def test_examples_are_those_that_the_recipe_draws_and_are_no_rows_of_the_search(recipe, tmp_path):
    overrides = [f"output_dir={tmp_path / 'out'}", "order=canonical", "eval_samples=null"]
    found = improve(recipe, "prompts/few_shot.jinja", overrides, limit=20, minutes=0, by="answer", bar=silent)
    assert found.best == "as it is"
    shown = set()
    for n in (2, 8):
        for by in ("drawn", "coverage"):
            benchmark = open_benchmark(recipe, [f"examples={n}", f"examples_by={by}"])
            shown |= {example.text for example in benchmark.task.examples}
    (predictions,) = (tmp_path / "out").rglob("predictions.jsonl")
    searched = {json.loads(line)["text"] for line in predictions.read_text().splitlines()}
    assert len(searched) == 20
    assert not searched & shown
    assert not searched & {text for text, _ in EVAL}


def test_a_held_out_fraction_is_for_the_final_score_alone(endpoint, remote, template):
    endpoint.proposals = list(NO_PROPOSAL)
    found = search(template, [*remote, "eval_file=null", "eval_fraction=0.3"], limit=100)
    n_unseen = found.unseen[0].metrics["n"]
    assert n_unseen == pytest.approx(0.3 * 73, abs=3)
    assert found.n_rows == 73 - n_unseen


@pytest.mark.slow
def test_the_held_out_rows_of_a_tuned_run_are_divided(recipe, tmp_path):
    train([str(recipe), f"output_dir={tmp_path / 'run'}", "max_steps=1", "prompt=prompts/few_shot.jinja", "examples=2"])
    (tmp_path / "mine.jinja").write_text(
        "{% user %}\n{# improve: a #}\nFelt?\n{# or: {{ task }} #}\n{# end #}\n{{ text }}"
    )
    overrides = [f"output_dir={tmp_path / 'out'}"]
    found = improve(
        recipe, tmp_path / "mine.jinja", overrides, limit=20, tuned=tmp_path / "run", by="answer", bar=silent
    )
    assert {candidate.name for candidate in found.tried} == {"as it is", "a 2"}  # no other keys
    assert found.n_rows == 20
    searched = {
        json.loads(line)["text"]
        for path in (tmp_path / "out").glob("20-rows-*/*/predictions.jsonl")
        for line in path.read_text().splitlines()
    }
    assert searched < {text for text, _ in EVAL}
    benchmark = open_benchmark(recipe, overrides, tuned=tmp_path / "run")
    assert load_generator(benchmark) is not None
    assert len(benchmark.rows) == 48
