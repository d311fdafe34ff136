import json

import pytest
from tiny import MANY, POSTS, SHORT, write_posts
from typer.testing import CliRunner

from emogen.cli import prompts as prompts_cli
from emogen.cli.__main__ import app
from emogen.console import PlainConsole, progress_bar
from emogen.errors import InputError
from emogen.evaluation import results
from emogen.evaluation.run_folder import BASELINE, write_manifest
from emogen.experiments.prompts import (
    load_generator,
    load_templates,
    open_benchmark,
    prepare,
)
from emogen.experiments.scores import ranking, ranking_table, score_template
from emogen.task.prompt import load_prompt
from emogen.train import main as train


@pytest.fixture(scope="module")
def generator(recipe):
    return load_generator(open_benchmark(recipe, limit=20))


@pytest.fixture
def benchmark(recipe, tmp_path):
    return open_benchmark(recipe, [f"output_dir={tmp_path / 'out'}"], limit=20)


@pytest.fixture
def short(tmp_path):
    """The file of a short template."""
    (tmp_path / "short.jinja").write_text(SHORT)
    return tmp_path / "short.jinja"


@pytest.fixture
def run(monkeypatch):
    """Runs `emogen prompts`; returns the result."""
    monkeypatch.setattr(prompts_cli, "out", PlainConsole(width=160))
    return lambda *words: CliRunner().invoke(app, ["prompts", *map(str, words)])


def test_the_rows_are_a_fixed_stratified_sample(benchmark, recipe):
    again = open_benchmark(recipe, limit=20)
    assert benchmark.rows.ids == again.rows.ids
    assert len(set(benchmark.rows.ids)) == 20
    assert benchmark.rows.gold.sum(0).min() >= 1  # stratified: each label occurs


def test_few_shot_examples_are_not_scored(recipe):
    benchmark = open_benchmark(recipe, ["examples=6"], limit=30)
    assert len(benchmark.task.examples) == 6
    assert not {example.text for example in benchmark.task.examples} & set(benchmark.rows.texts)


def test_the_rows_of_an_evaluation_file_are_used(recipe, tmp_path, labels):
    write_posts(tmp_path / "eval.csv", labels, [(f"other {text}", names) for text, names in POSTS])
    benchmark = open_benchmark(recipe, [f"eval_file={tmp_path / 'eval.csv'}"], limit=200)
    assert sorted(benchmark.rows.texts) == sorted(f"other {text}" for text, _ in POSTS)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% user %}\n\n{{ answer }} {{ text }}", ":3: undefined variable 'answer'"),
        ("{% user %}\n{{ names }}", ":2: {{ text }} must occur exactly once"),
        ("{% user %}\n{{ names | join(', ') }}, boredom: {{ text }}", ":2: lists 'boredom'"),
        ("{% user %}\nsay\nThey  cancelled my train again, I could scream 1 is anger\n{{ text }}", ":3: the prompt contains the text of row p13, which it is scored on"),
        ("{% user %}\nsay\nThey cancelled my train again,\nI could scream 1\n{{ text }}", ":3: the prompt contains the text of row p13"),
        ("{% user %}\n{{ text }} {{ label.name }}", ":2: {{ label }} is available only with `answer: yes_no`"),
        ("{% user %}\n" + "word " * 999 + "{{ text }}", ": max_length=1024 leaves no room for the text"),
    ],
    ids=["unknown variable", "no text", "unknown label", "leaked answer", "leak on two lines", "other style", "long"],
)  # fmt: skip
def test_invalid_templates_are_refused(recipe, tmp_path, short, source, message):
    (tmp_path / "bad.jinja").write_text(source)
    everything = open_benchmark(recipe, limit=200)
    accepted, refused = load_templates(everything, [tmp_path / "bad.jinja", short])
    assert [template.prompt.path for template in accepted] == [str(short)]
    assert str(tmp_path / "bad.jinja") in refused[0]
    assert message in refused[0]


def test_a_template_that_shows_no_examples_is_pointed_out(benchmark, caplog):
    accepted, _ = load_templates(benchmark, ["prompts/few_shot.jinja"])
    assert len(accepted) == 1
    assert "few_shot.jinja:9: shows {{ examples }}, but `examples` is 0" in caplog.text


def test_an_untuned_model_answers_in_the_style_of_the_template(benchmark, generator, caplog):
    (template,), _ = load_templates(benchmark, ["prompts/json.jinja"])
    assert "json.jinja:2: is used with `answer: json`, which it asks for; the recipe has `answer: list`" in caplog.text
    score_template(benchmark, template, generator, progress_bar)
    records = results.read_records(template.folder / "predictions.jsonl")
    assert all(isinstance(json.loads(record["raw"]), list) for record in records)
    assert json.loads((template.folder / "metrics.json").read_text())["parse"]["exact"] == 1.0


def test_scores_are_kept_until_something_changes(benchmark, recipe, generator, tmp_path, short):
    template = prepare(benchmark, load_prompt(short))
    assert not template.done
    metrics = score_template(benchmark, template, generator, progress_bar)
    assert template.done
    assert score_template(benchmark, template, None, progress_bar) == metrics  # no model is needed
    assert metrics["log_likelihood"] < 0
    assert metrics["tokens"]["shared"] == len(template.encoder.prefix_ids)
    kept = results.read_scored(template.folder, benchmark.task.label_set)
    assert kept.ids == benchmark.rows.ids
    assert (kept.gold == benchmark.rows.gold).all()
    assert json.loads((template.folder / "manifest.json").read_text())["kind"] == "prompts"
    for overrides in (["max_length=300"], ["decode=free"], ["seed=7"]):
        other = open_benchmark(recipe, [f"output_dir={tmp_path / 'out'}", *overrides], limit=20)
        assert prepare(other, load_prompt(short)).folder != template.folder
    short.write_text(SHORT + " ")
    assert not prepare(benchmark, load_prompt(short)).done
    short.write_text(SHORT)
    assert prepare(benchmark, load_prompt(short)).done


def test_a_template_scores_the_same_whatever_was_scored_before_it(benchmark, recipe, tmp_path, short):
    alone = score_template(benchmark, prepare(benchmark, load_prompt(short)), load_generator(benchmark), progress_bar)
    again = open_benchmark(recipe, [f"output_dir={tmp_path / 'again'}"], limit=20)
    model = load_generator(again)
    score_template(again, prepare(again, load_prompt("prompts/definitions.jinja")), model, progress_bar)
    second = score_template(again, prepare(again, load_prompt(short)), model, progress_bar)
    assert second["calibration"] == alone["calibration"]
    assert second["log_likelihood"] == alone["log_likelihood"]


def test_an_endpoint_is_not_asked_one_question_for_each_label(endpoint, tmp_path):
    words = [f"api_base={endpoint.base}", f"output_dir={tmp_path / 'out'}"]
    remote = open_benchmark("recipes/remote.yaml", words, limit=20)
    accepted, refused = load_templates(remote, ["prompts/list.jinja", "prompts/yes_no.jinja"])
    assert [template.prompt.path for template in accepted] == ["prompts/list.jinja"]
    assert "prompts/yes_no.jinja:2: the model of an endpoint is not asked one question for each label" in refused[0]


def test_compare_ranks_templates_and_tests_their_differences(recipe, tmp_path, short, run):
    (tmp_path / "bad.jinja").write_text("{% user %}\n{{ label.name }}: {{ text }}")
    words = ["compare", recipe, short, "prompts/list.jinja", tmp_path / "bad.jinja", f"output_dir={tmp_path / 'out'}"]
    done = run(*words, "--limit", 20)
    assert done.exit_code == 0, done.output
    assert "bad.jinja:2: {{ label }} is available only with `answer: yes_no`" in done.stderr
    for word in ("short", "list", "ln P", "real", "rows; labels decided by nested thresholds"):
        assert word in done.stdout
    (grid,) = (tmp_path / "out").glob("*-rows-*/grid.html")
    assert f"Row by row: {grid}" in done.stdout
    folders = sorted((tmp_path / "out").glob("*-rows-*/*/"))
    assert [folder.name.rpartition("-")[0] for folder in folders] == ["list", "short"]
    metrics = folders[0] / "metrics.json"
    before = metrics.stat().st_mtime_ns
    assert run(*words, "--limit", 20).exit_code == 0
    assert metrics.stat().st_mtime_ns == before


@pytest.fixture
def scored(benchmark, generator, tmp_path):
    """Two templates, scored."""
    (tmp_path / "a_template_with_a_long_name.jinja").write_text("{% user %}\n{{ text }}\n")
    files = [tmp_path / "a_template_with_a_long_name.jinja", "prompts/definitions.jinja"]
    templates, _ = load_templates(benchmark, files)
    metrics = [score_template(benchmark, template, generator, progress_bar) for template in templates]
    return templates, metrics


def test_the_ranking_fits_a_terminal_of_80_columns(scored):
    templates, _ = scored
    folders = [template.folder for template in templates]
    console = PlainConsole(width=80, record=True)
    table, notes = ranking_table(templates, folders, "answer")
    console.print(table)
    shown = console.export_text()
    first, second = ranking(folders, "answer")[1]
    for system in (first, second):
        assert f"{system.metrics['f1_macro']:.3f}" in shown
        assert system.interval is None  # 20 rows are too few
    assert f"{second.difference:+z.3f}" in shown
    assert shown.count("(no") == 3  # a cell breaks before "interval)"
    assert any("20 rows: too few for an interval (30 are needed)" in note for note in notes)
    assert "…" not in shown


def test_differences_are_to_the_best_template(scored):
    templates, metrics = scored
    order, systems = ranking([template.folder for template in templates], "answer")
    f1 = [template_metrics["f1_macro"] for template_metrics in metrics]
    assert [system.metrics["f1_macro"] for system in systems] == sorted(f1, reverse=True)
    assert [f1[k] for k in order] == [system.metrics["f1_macro"] for system in systems]
    assert systems[0].difference == 0
    assert systems[1].difference <= 0


@pytest.mark.slow
def test_a_tuned_model_is_scored_on_its_held_out_rows(recipe, tmp_path, short, run):
    train([str(recipe), "eval_fraction=0.4", f"output_dir={tmp_path / 'run'}", "max_steps=1"])
    benchmark = open_benchmark(recipe, tuned=tmp_path / "run")
    held = [json.loads(line)["text"] for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert sorted(benchmark.rows.texts) == sorted(held)
    words = ["compare", recipe, short, f"output_dir={tmp_path / 'out'}", "--tuned", tmp_path / "run", "--by", "answer"]
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert benchmark.folder.name != open_benchmark(recipe, limit=20).folder.name


@pytest.mark.slow
def test_templates_are_tuned_on_rows_that_are_not_scored(recipe, tmp_path, short, run, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["compare", recipe, short, f"output_dir={tmp_path / 'out'}", "--limit", 15, "--train-steps", 2]
    done = run(*words, "--by", "answer")
    assert done.exit_code == 0, done.output
    assert "short" in done.stdout
    (train_file,) = (tmp_path / "out").glob("*/rows-*/train.jsonl")
    (predictions,) = (tmp_path / "out").glob("*/short-*-2-steps-*/predictions.jsonl")
    trained, scored = (
        [json.loads(line)["text"] for line in path.read_text().splitlines()] for path in (train_file, predictions)
    )
    assert len(trained) + len(scored) == len(MANY)
    assert not set(trained) & set(scored)


def test_show_renders_templates_and_their_differences(recipe, tmp_path, short, run):
    done = run("show", short, "prompts/list.jinja", recipe)
    assert done.exit_code == 0, done.output
    assert "⟦" in done.stdout
    assert "-Feelings (anger" in done.stdout
    assert "+Detect the emotions" in done.stdout
    assert "tokens, the same for all rows" in done.stdout
    (tmp_path / "leak.jinja").write_text(f"{{% user %}}\n{MANY[-1][0]}\n{{{{ text }}}}")  # of a row that is not shown
    done = run("show", short, tmp_path / "leak.jinja", recipe)
    assert done.stdout.count("supervised") == 1
    assert "leak.jinja:2: the prompt contains the text of row" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "t.jinja"], "name one recipe"),
        (["compare", "r.yaml"], "at least one template"),
        (["compare", "r.yaml", "t.jinja", "oops"], "oops: neither"),
        (["compare", "r.yaml", "t.jinja", "--by", "luck"], "not luck"),
        (["compare", "r.yaml", "t.jinja", "--tuned", "x", "--train-steps", "3"], "exclude each other"),
    ],
)
def test_invalid_arguments(run, words, message):
    done = run(*words)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_without_a_valid_template_nothing_is_compared(recipe, tmp_path, run):
    (tmp_path / "bad.jinja").write_text("hello")
    done = run("compare", recipe, tmp_path / "bad.jinja")
    assert isinstance(done.exception, InputError)
    assert "no valid template is left" in str(done.exception)
    assert "refused" in done.output


def test_a_head_has_no_prompt_to_compare(recipe):
    with pytest.raises(InputError, match="a head reads each text without a prompt"):
        open_benchmark(recipe, ["answer=head"])


def test_a_baseline_has_no_prompt_to_compare(recipe, tmp_path, labels):
    (tmp_path / "recipe.yaml").write_text(recipe.read_text())
    (tmp_path / "labels.yaml").write_text(labels.to_yaml())
    write_manifest(tmp_path, BASELINE)
    with pytest.raises(InputError, match="a baseline reads each text without a prompt"):
        open_benchmark(recipe, (), limit=20, tuned=tmp_path)
