import json

import pytest
from rich.console import Console
from tiny import POSTS, write_posts
from typer.testing import CliRunner

from emogen import console
from emogen.cli import prompts as prompts_cli
from emogen.cli.__main__ import app
from emogen.errors import InputError
from emogen.evaluation import results
from emogen.experiments.prompts import (
    load_generator,
    load_templates,
    open_benchmark,
    prepare,
    ranking,
    ranking_table,
    score_template,
)
from emogen.task.prompt import load_prompt
from emogen.train import main as train

MANY = [(f"{text} {k}", names) for k in range(3) for text, names in POSTS]
SHORT = "{% user %}\nFeelings ({{ names | join(' ') }})?\n{{ text }}\n"


@pytest.fixture
def recipe(tiny_recipe, tmp_path, labels):
    path = tiny_recipe()
    write_posts(tmp_path / "train.csv", labels, MANY)
    (tmp_path / "short.jinja").write_text(SHORT)
    return path


@pytest.fixture
def bench(recipe, tmp_path):
    return open_benchmark(recipe, [f"output_dir={tmp_path / 'out'}"], limit=20)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a command; gives its exit code and all that it printed."""
    monkeypatch.setattr(prompts_cli, "out", Console(width=160))

    def run(*words):
        return CliRunner().invoke(app, ["prompts", *map(str, words)])

    return run


def silent(what, total):
    return console.progress_bar(what, total)


def test_the_rows_are_a_sample_and_always_the_same(bench, recipe, labels):
    again = open_benchmark(recipe, limit=20)
    assert bench.rows.ids == again.rows.ids
    assert 18 <= len(set(bench.rows.ids)) <= 22
    assert bench.rows.gold.sum(0).min() >= 1  # stratified: each label is there


def test_what_a_prompt_shows_is_not_scored(recipe):
    bench = open_benchmark(recipe, ["examples=6"], limit=30)
    assert len(bench.task.examples) == 6
    assert not {example.text for example in bench.task.examples} & set(bench.rows.texts)


def test_rows_of_an_evaluation_file_are_taken(recipe, tmp_path, labels):
    write_posts(tmp_path / "eval.csv", labels, [(f"other {text}", names) for text, names in POSTS])
    bench = open_benchmark(recipe, [f"eval_file={tmp_path / 'eval.csv'}"], limit=200)
    assert sorted(bench.rows.texts) == sorted(f"other {text}" for text, _ in POSTS)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% user %}\n\n{{ answer }} {{ text }}", ":3: undefined variable 'answer'"),
        ("{% user %}\n{{ names }}", ":2: {{ text }} must occur exactly once"),
        ("{% user %}\n{{ names | join(', ') }}, boredom: {{ text }}", ":2: lists 'boredom'"),
        ("{% user %}\nsay\nThey  cancelled my train again, I could scream 1 is anger\n{{ text }}", ":3: the text of row p13"),
        ("{% user %}\nsay\nThey cancelled my train again,\nI could scream 1\n{{ text }}", ":3: the text of row p13"),
        ("{% user %}\n{{ text }} {{ label.name }}", ":2: uses {{ label }}, which exists only with `answer: yes_no`"),
        ("{% user %}\n" + "word " * 999 + "{{ text }}", ": max_length=1024 leaves no room for the text"),
    ],
    ids=["unknown variable", "no text", "a label that is none", "answer leaked", "on two lines", "other style", "long"],
)  # fmt: skip
def test_a_template_that_breaks_the_contract_is_refused(recipe, tmp_path, source, said):
    (tmp_path / "bad.jinja").write_text(source)
    everything = open_benchmark(recipe, limit=200)
    good, refused = load_templates(everything, [tmp_path / "bad.jinja", tmp_path / "short.jinja"])
    assert [template.prompt.path for template in good] == [str(tmp_path / "short.jinja")]
    assert str(tmp_path / "bad.jinja") in refused[0]
    assert said in refused[0]


def test_figures_are_kept_until_something_changes(bench, recipe, tmp_path):
    template = prepare(bench, load_prompt(tmp_path / "short.jinja"))
    assert not template.done
    figures = score_template(bench, template, load_generator(bench), silent)
    assert template.done
    assert score_template(bench, template, None, silent) == figures  # no model is needed
    assert figures["log_likelihood"] < 0
    assert figures["tokens"]["shared"] == len(template.encoder.prefix_ids)
    kept = results.read_scored(template.folder, bench.task.label_set)
    assert kept.ids == bench.rows.ids
    assert (kept.gold == bench.rows.gold).all()
    for overrides in (["max_length=300"], ["decode=free"], ["seed=7"]):
        other = open_benchmark(recipe, [f"output_dir={tmp_path / 'out'}", *overrides], limit=20)
        assert prepare(other, load_prompt(tmp_path / "short.jinja")).folder != template.folder
    (tmp_path / "short.jinja").write_text(SHORT + " ")
    assert not prepare(bench, load_prompt(tmp_path / "short.jinja")).done
    (tmp_path / "short.jinja").write_text(SHORT)
    assert prepare(bench, load_prompt(tmp_path / "short.jinja")).done


def test_compare_ranks_and_says_what_is_real(recipe, tmp_path, run):
    words = [
        "compare",
        recipe,
        tmp_path / "short.jinja",
        "prompts/list.jinja",
        "prompts/yes_no.jinja",
        f"output_dir={tmp_path / 'out'}",
    ]
    done = run(*words, "--limit", 30)
    assert done.exit_code == 0, done.output
    for word in ("short", "list", "ln P", "real", "rows; labels by nested thresholds"):
        assert word in done.stdout
    folders = sorted((tmp_path / "out").glob("*-rows-*/*"))
    assert [folder.name.rpartition("-")[0] for folder in folders] == ["list", "short"]
    metrics = folders[0] / "metrics.json"
    before = metrics.stat().st_mtime_ns
    assert run(*words, "--limit", 30).exit_code == 0
    assert metrics.stat().st_mtime_ns == before


def test_the_ranking_fits_a_terminal_of_80_columns_with_all_its_figures(bench, tmp_path):
    (tmp_path / "a_template_with_a_long_name.jinja").write_text("{% user %}\n{{ text }}\n")
    good, _ = load_templates(bench, [tmp_path / "a_template_with_a_long_name.jinja", "prompts/definitions.jinja"])
    generator = load_generator(bench)
    for template in good:
        score_template(bench, template, generator, silent)
    folders = [template.folder for template in good]
    console = Console(width=80, record=True)
    console.print(ranking_table(good, folders, "answer"))
    shown = console.export_text()
    first, second = ranking(folders, "answer")[1]
    for system in (first, second):
        assert f"{system.metrics['f1_macro']:.3f}" in shown
        assert "{:.3f}..{:.3f}".format(*system.interval) in shown
    assert "{:+z.3f}..{:+z.3f}".format(*second.difference_interval) in shown
    assert "…" not in shown


def test_differences_are_to_the_best(bench, tmp_path, labels):
    good, _ = load_templates(bench, [tmp_path / "short.jinja", "prompts/list.jinja"])
    generator = load_generator(bench)
    figures = [score_template(bench, template, generator, silent) for template in good]
    order, systems = ranking([template.folder for template in good], "answer")
    assert [system.metrics["f1_macro"] for system in systems] == sorted(
        (of["f1_macro"] for of in figures), reverse=True
    )
    assert [figures[k]["f1_macro"] for k in order] == [system.metrics["f1_macro"] for system in systems]
    assert systems[1].difference <= 0


def test_a_tuned_model_is_asked_about_rows_that_it_held_out(recipe, tmp_path, run):
    train([str(recipe), "eval_fraction=0.4"])
    bench = open_benchmark(recipe, tuned=tmp_path / "run")
    held = [json.loads(line)["text"] for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert sorted(bench.rows.texts) == sorted(held)
    done = run("compare", recipe, tmp_path / "short.jinja", f"output_dir={tmp_path / 'out'}", "--tuned", tmp_path / "run", "--by", "answer")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert bench.folder.name != open_benchmark(recipe, limit=20).folder.name


def test_each_template_is_tuned_on_the_rows_that_are_not_scored(recipe, tmp_path, run, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["compare", recipe, tmp_path / "short.jinja", f"output_dir={tmp_path / 'out'}", "--limit", 15, "--train-steps", 2, "--by", "answer"]  # fmt: skip
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "short" in done.stdout
    (learnt,) = (tmp_path / "out").glob("*/rows-*/train.jsonl")
    (scored,) = (tmp_path / "out").glob("*/short-*-2-steps-*/predictions.jsonl")
    learnt, scored = ([json.loads(line)["text"] for line in path.read_text().splitlines()] for path in (learnt, scored))
    assert len(learnt) + len(scored) == len(MANY)
    assert not set(learnt) & set(scored)


def test_show_renders_and_tells_templates_apart(recipe, tmp_path, run):
    done = run("show", tmp_path / "short.jinja", "prompts/list.jinja", recipe)
    assert done.exit_code == 0, done.output
    assert "⟦" in done.stdout
    assert "-Feelings (anger" in done.stdout
    assert "+You detect emotions" in done.stdout
    assert "tokens, the same for all rows" in done.stdout
    (tmp_path / "leak.jinja").write_text(f"{{% user %}}\n{MANY[-1][0]}\n{{{{ text }}}}")  # of a row that is not shown
    done = run("show", tmp_path / "short.jinja", tmp_path / "leak.jinja", recipe)
    assert done.stdout.count("supervised") == 1
    assert "leak.jinja:2: the text of row" in done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare", "t.jinja"], "name one recipe"),
        (["compare", "r.yaml"], "at least one template"),
        (["compare", "r.yaml", "t.jinja", "oops"], "oops: neither"),
        (["compare", "r.yaml", "t.jinja", "--by", "luck"], "not luck"),
        (["compare", "r.yaml", "t.jinja", "--tuned", "x", "--train-steps", "3"], "one or the other"),
    ],
)
def test_words_that_make_no_sense(run, words, said):
    done = run(*words)
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())


def test_no_template_left(recipe, tmp_path, run):
    (tmp_path / "bad.jinja").write_text("hello")
    done = run("compare", recipe, tmp_path / "bad.jinja")
    assert isinstance(done.exception, InputError)
    assert "refused" in done.output


def test_a_head_has_no_prompt(tiny_recipe):
    with pytest.raises(InputError, match="no prompt to compare"):
        open_benchmark(tiny_recipe(answer="head"))
