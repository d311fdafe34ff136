"""A prompted model behind an endpoint: a fake that fails in every way."""

from contextlib import nullcontext

import pytest
from tiny import invented_posts, write_posts
from typer.testing import CliRunner

import emogen
from emogen.cli.__main__ import app
from emogen.errors import InputError, ModelError
from emogen.evaluation.results import read_records
from emogen.prediction import remote
from emogen.prediction.ensemble import load_run
from emogen.prediction.files import predict_file
from emogen.prediction.remote import BudgetError
from emogen.task.recipe import RecipeError, load_recipe
from emogen.train import main as train
from emogen.training.check import check

TEXTS = ["so happy", "so sad", "nothing"]


def label_file(folder, labels):
    (folder / "labels.yaml").write_text(labels.to_yaml())
    return folder / "labels.yaml"


def load(endpoint, *overrides):
    return load_run("recipes/remote.yaml", [f"api_base={endpoint.base}", "api_model=tiny", *overrides])


def test_it_asks_with_the_prompt_of_the_recipe_and_the_grammar_of_its_labels(endpoint, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    found = load(endpoint).predict(TEXTS)
    assert [prediction.parsed.labels for prediction in found] == [("joy", "love"), ("sadness",), ()]
    body = endpoint.asked[0]
    assert body["model"] == "tiny"
    assert body["temperature"] == 0
    assert body["grammar"].startswith('root ::= ("none" | "anger" (", anticipation")?')
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert endpoint.keys == {"Bearer secret"}
    assert "llama.cpp: answers are constrained by a grammar" in caplog.text
    assert "total_tokens: 21" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("kind", "said"),
    [("vllm", "a regular expression"), ("other", "writes what it likes"), ("lm studio", "writes what it likes")],
)
def test_what_a_server_offers_is_found_out_and_said(endpoint, caplog, kind, said):
    caplog.set_level("INFO")
    endpoint.kind = kind
    load(endpoint).predict(TEXTS[:1])
    assert said in caplog.text
    assert ("structured_outputs" in endpoint.asked[0]) == (kind == "vllm")
    assert "grammar" not in endpoint.asked[0]


def test_a_constrained_answer_may_be_as_long_as_that_with_all_labels(endpoint, tmp_path):
    load(endpoint).predict(TEXTS[:1])
    names = [f"subject number {k}" for k in range(60)]
    (tmp_path / "many.yaml").write_text("name: many\nlabels:\n" + "".join(f"  - name: {name}\n" for name in names))
    load(endpoint, f"labels={tmp_path / 'many.yaml'}").predict(TEXTS[:1])
    load(endpoint, f"labels={tmp_path / 'many.yaml'}", "decode=free").predict(TEXTS[:1])
    assert [body["max_tokens"] for body in endpoint.asked] == [128, len(", ".join(names)), 128]


def test_nothing_is_asked_twice(endpoint):
    first = load(endpoint).predict(TEXTS)
    assert len(endpoint.asked) == 3
    assert load(endpoint).predict(TEXTS) == first
    assert len(endpoint.asked) == 3
    load(endpoint, "prompt=prompts/list.jinja").predict(TEXTS)
    assert len(endpoint.asked) == 6


def test_a_busy_server_is_asked_again_when_it_says(endpoint):
    endpoint.replies = [(429, {"retry-after": "7"}, {}), (503, {}, {}), (200, {}, b"not JSON")]
    found = load(endpoint, "api_requests=1").predict(TEXTS[:1])
    assert found[0].parsed.labels == ("joy", "love")
    assert endpoint.waited[0] == 7
    assert len(endpoint.waited) == 3


def test_a_server_that_refuses_or_never_answers_is_an_error_and_what_it_answered_is_kept(endpoint):
    one = ["api_requests=1"]
    load(endpoint, *one).predict(TEXTS[:1])
    endpoint.replies = [(401, {}, {"error": "no key"})]
    with pytest.raises(ModelError, match=r"the server refuses: 401: .*no key"):
        load(endpoint, *one).predict(TEXTS)
    endpoint.replies = [(500, {}, {})] * remote.TRIES
    with pytest.raises(ModelError, match=f"no answer after {remote.TRIES} tries; the last one: 500"):
        load(endpoint, *one).predict(["another text"])
    endpoint.replies = [(200, {}, {"choices": []})]
    with pytest.raises(ModelError, match="not an answer of a chat endpoint"):
        load(endpoint, *one).predict(["another text"])
    asked = len(endpoint.asked)
    load(endpoint, *one).predict(TEXTS[:1])
    assert len(endpoint.asked) == asked


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((307, {"location": "https://other/v1/chat"}, b""), "the server refuses: 307: moved to https://other/v1/chat"),
        (
            (200, {}, {"choices": [{"message": {"content": [{"type": "thinking"}]}}]}),
            "not an answer of a chat endpoint",
        ),
        ((200, {}, {"choices": ["joy"]}), "not an answer of a chat endpoint"),
        ((200, {}, ["joy"]), "not an answer of a chat endpoint"),
        (
            (200, {}, b"<html>log in first</html>"),
            "no answer after 6 tries; the last one: 200, but no JSON: <html>log in",
        ),
        ((200, {}, b"\xff\xfe\x00"), "but no JSON"),
        ((200, {}, b"[" * 100_000), "but no JSON"),
        ((200, {"content-encoding": "gzip"}, b"not zipped"), "DecodingError"),
    ],
)
def test_what_is_no_answer_is_an_error_that_shows_it(endpoint, reply, message):
    endpoint.replies = [reply] * remote.TRIES
    with pytest.raises(ModelError, match=message):
        load(endpoint, "api_requests=1").predict(TEXTS[:1])


def reply_of(content, **choice):
    usage = {"prompt_tokens": 6, "completion_tokens": 1}
    return 200, {}, {"choices": [{"message": {"content": content}, **choice}], "usage": usage}


def test_an_answer_that_was_cut_off_is_a_warning_and_is_asked_again(endpoint, caplog):
    endpoint.replies = [reply_of("<think>is it joy? or", finish_reason="length")]
    found = load(endpoint).predict(TEXTS[:1])
    assert found[0].parsed.failed
    assert "the model did not end each answer within 128 tokens (finish_reason: length)" in caplog.text
    caplog.clear()
    assert load(endpoint).predict(TEXTS[:1])[0].parsed.labels == ("joy", "love")
    assert "finish_reason" not in caplog.text


def test_nothing_and_half_a_character_are_answers(endpoint):
    endpoint.replies = [reply_of(None, finish_reason="content_filter"), reply_of("joy \ud83d", finish_reason="stop")]
    classifier = load(endpoint, "api_requests=1")
    found = classifier.predict(TEXTS[:2])
    assert [prediction.raw for prediction in found] == ["", "joy \ufffd"]
    assert found[0].parsed.status == "empty"
    assert classifier.predict(TEXTS[:2]) == found


def test_a_text_that_is_repeated_is_asked_about_once(endpoint):
    done = []
    found = load(endpoint).predict(["so happy", "so sad"] * 20, progress=done.append)
    assert len(endpoint.asked) == 2
    assert [prediction.parsed.labels for prediction in found] == [("joy", "love"), ("sadness",)] * 20
    assert sum(done) == 40


def test_the_first_request_of_a_limited_call_goes_alone(endpoint):
    """Nothing is known of its cost, so eight at once could exceed the limit eight times."""
    limited = ["api_prices=[1e6, 0]", "max_dollars=6", "api_requests=8"]  # six dollars for each request
    with pytest.raises(BudgetError):
        load(endpoint, *limited).predict([f"text {k}" for k in range(8)])
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize("key", ["sk-secret\r", "sk secret", "sk-s\u00e9cret"])
def test_a_key_that_no_header_holds_is_named_and_not_printed(endpoint, monkeypatch, key):
    monkeypatch.setenv("EMOGEN_REMOTE_KEY", key)
    with pytest.raises(InputError, match=r"^EMOGEN_REMOTE_KEY: it has a blank, the end of a line") as raised:
        load(endpoint).predict(TEXTS[:1])
    assert "sk" not in str(raised.value)


def test_an_address_that_is_none_is_an_error(endpoint):
    with pytest.raises(InputError, match=r"api_base: .*: not an address"):
        load_run("recipes/remote.yaml", ['api_base="http://\\0/v1"', "api_model=x"]).predict(TEXTS[:1])


def test_damaged_answers_on_disk_are_named(endpoint, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "remote-answers.sqlite").write_bytes(b"x" * 5000)
    with pytest.raises(ModelError, match=r"remote-answers\.sqlite: the answers .* not a database.*delete it"):
        load(endpoint).predict(TEXTS[:1])


def test_an_answer_that_cannot_be_read_gives_no_label_where_each_text_has_one(endpoint, tmp_path):
    (tmp_path / "topics.yaml").write_text("name: topics\nexactly_one: true\nlabels: [{name: sport}, {name: science}]\n")
    endpoint.answer = staticmethod(lambda messages: "I cannot say")
    for by in ("answer", "thresholds"):
        loaded = emogen.load(
            "recipes/remote.yaml",
            decide=by,
            api_base=endpoint.base,
            api_model="x",
            labels=str(tmp_path / "topics.yaml"),
        )
        assert loaded.predict(["so happy"]) == [()]


def test_an_address_where_nothing_listens_is_an_error(endpoint, monkeypatch):
    with pytest.raises(ModelError, match="no answer after 6 tries"):
        load_run("recipes/remote.yaml", ["api_base=http://127.0.0.1:9/v1", "decode=free"]).predict(["a"])


def test_where_nothing_listens_nothing_is_said_about_the_server(endpoint, caplog):
    with pytest.raises(ModelError, match=r"^http://127\.0\.0\.1:9/v1: cannot connect: .*refused"):
        load_run("recipes/remote.yaml", ["api_base=http://127.0.0.1:9/v1"]).predict(TEXTS)
    assert caplog.text == ""
    assert endpoint.waited == []


def test_a_file_is_labelled_in_one_command_and_in_python(endpoint, tmp_path, labels):
    source, output = write_posts(tmp_path / "posts.csv", labels), tmp_path / "out.csv"
    overrides = [f"api_base={endpoint.base}", "api_model=tiny"]
    summary = predict_file(
        [remote.paths.find("recipes/remote.yaml")],
        source,
        overrides,
        csv_file=output,
        bar=lambda *_: nullcontext(lambda n: None),
    )
    assert summary.n_rows == len(output.read_text().splitlines()) - 1
    loaded = emogen.load("recipes/remote.yaml", api_base=endpoint.base, api_model="tiny")
    assert loaded.predict(["so happy"]) == [("joy", "love")]
    assert loaded.predict_proba(["so happy"]).sum() == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("api_model=null", "api_base: needs api_model"),
        ("api_base=localhost:8080", "begins with http"),
        ("answer=yes_no", "cannot be combined with answer: yes_no"),
        ("max_dollars=2", "max_dollars: needs api_prices"),
        ("api_prices=[-1, 2]", "expected prices of 0 or more"),
        ("api_prices=[1]", "api_prices: list should have at least 2 items"),
        ("examples_by=nearest", "nearest needs `examples`"),
    ],
)
def test_what_an_endpoint_cannot_do_is_an_error(override, message):
    with pytest.raises(RecipeError, match=message):
        load_run("recipes/remote.yaml", [override])


def test_check_asks_no_endpoint():
    findings = check("recipes/remote.yaml")
    assert not findings.problems
    assert "http://127.0.0.1:8080/v1, which is not asked" in findings.facts[-1]


@pytest.mark.parametrize(
    "words",
    [
        ["show"], ["plan"], ["prompts", "show", "prompts/list.jinja"], ["lab"], ["train"],
        ["prompts", "compare", "prompts/list.jinja", "--train-steps", "2"],
    ],
)  # fmt: skip
def test_commands_for_a_model_that_is_here_say_so(words):
    result = CliRunner().invoke(app, [*words[:2], "recipes/remote.yaml", *words[2:]])
    assert isinstance(result.exception, InputError)
    assert "api_base: the model of an endpoint" in str(result.exception)


def test_the_model_of_an_endpoint_is_not_tuned():
    with pytest.raises(InputError, match="the model of an endpoint is not tuned"):
        train(["recipes/remote.yaml"])


def test_nearest_examples_are_for_an_endpoint_alone():
    with pytest.raises(RecipeError, match="examples_by: nearest is for the model of an endpoint"):
        load_recipe("recipes/demo.yaml", ["examples=4", "examples_by=nearest"])


def shown(body):
    """The example texts of a few-shot prompt."""
    return [message["content"] for message in body["messages"][:-1] if message["role"] == "user"]


FEW = ("prompt=prompts/few_shot.jinja", "examples=2", "examples_by=nearest")


def test_the_nearest_rows_are_shown_the_most_similar_last_and_never_the_text_itself(endpoint, tmp_path, labels):
    posts = [("my dog died", ["sadness"]), ("my dog is happy", ["joy"]), ("Rain again", []), ("my DOG  died", ["fear"])]
    train_file = write_posts(tmp_path / "train.csv", labels, posts)
    found = load(endpoint, *FEW, f"train_file={train_file}", f"labels={label_file(tmp_path, labels)}")
    found.predict(["my dog died"])
    assert shown(endpoint.asked[0]) == ["Rain again", "my dog is happy"]
    answers = [message["content"] for message in endpoint.asked[0]["messages"] if message["role"] == "assistant"]
    assert answers == ["none", "joy"]
    assert endpoint.asked[0]["messages"][-1]["content"] == "my dog died"


def test_the_nearest_rows_are_those_of_the_features_of_the_recipe(endpoint, tmp_path, labels, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lengths.py").write_text("def lengths(texts):\n    return [[len(text), 10] for text in texts]\n")
    posts = [("so sad", ["sadness"]), ("so sad, so sad, so sad, so sad", ["joy"])]
    train_file = write_posts(tmp_path / "train.csv", labels, posts)
    one = [*FEW, "examples=1", f"train_file={train_file}", f"labels={label_file(tmp_path, labels)}"]
    load(endpoint, *one, "features=[lengths:lengths]").predict(["x" * 30])
    assert shown(endpoint.asked[0]) == [posts[1][0]]


@pytest.fixture
def prompted(endpoint, tmp_path, labels):
    """Cross-validates an endpoint on invented posts; returns its folder."""
    train_file = write_posts(tmp_path / "train.csv", labels, invented_posts(40))

    def run(*overrides):
        words = [f"train_file={train_file}", f"labels={label_file(tmp_path, labels)}", f"api_base={endpoint.base}"]
        words += ["api_model=tiny", f"output_dir={tmp_path / 'cv'}", *overrides]
        result = CliRunner().invoke(app, ["cv", "recipes/remote.yaml", "--folds", "4", *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return tmp_path / "cv"

    return run


def test_an_endpoint_is_cross_validated_with_examples_of_the_other_folds(endpoint, prompted):
    folder = prompted(*FEW)
    records = {record["text"]: record for record in read_records(folder / "predictions.jsonl")}
    assert len(endpoint.asked) == len(records) == 40
    for body in endpoint.asked:
        own = records[body["messages"][-1]["content"]]
        assert {records[text]["fold"] for text in shown(body)}.isdisjoint({own["fold"]})
        assert own["raw"] in ("joy, love", "sadness", "none")
        assert sum(own["prob"].values()) == len(own["labels"])
    assert "prompted" in (folder / "report.html").read_text()


def test_an_endpoint_is_compared_and_stacked_with_others(endpoint, prompted, tmp_path):
    folder, baseline = prompted(), tmp_path / "baseline"
    words = [f"train_file={tmp_path / 'train.csv'}", f"labels={tmp_path / 'labels.yaml'}", f"output_dir={baseline}"]
    for command in (
        ["baseline", "recipes/demo.yaml", "--folds", "4", *words],
        ["compare", baseline, folder, "--by", "answer"],
        ["compare", baseline, folder, "--by", "stack", "--ensemble"],
        ["report", baseline, folder, "--output", tmp_path / "report.html"],
    ):
        result = CliRunner().invoke(app, [str(word) for word in command], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    loaded = emogen.load(baseline, folder, decide="stack")
    assert len(loaded.predict(["so happy today", "so sad"])) == 2


def test_a_cross_validated_endpoint_labels_new_texts_with_examples_from_all_its_rows(endpoint, prompted):
    folder = prompted(*FEW)
    gold = {record["text"]: record["gold"] for record in read_records(folder / "predictions.jsonl")}
    loaded = load_run(folder, [f"api_base={endpoint.base}"])
    endpoint.asked.clear()
    loaded.predict(["so happy today"])
    (body,) = endpoint.asked
    answers = [message["content"] for message in body["messages"] if message["role"] == "assistant"]
    assert answers == [
        ", ".join(gold[text]) or "none" for text in shown(body)
    ]  # the gold labels, not the predicted ones


def test_an_interrupted_cross_validation_goes_on_with_a_higher_limit(endpoint, prompted):
    limits = ["api_prices=[0, 1000000]", "api_requests=1"]  # a dollar for a token, of which each answer has one
    with pytest.raises(ModelError, match=r"max_dollars: \$27\.0000 of \$27 are spent"):
        prompted(*limits, "max_dollars=27")  # a fold has ten rows: the limit is that of all folds together
    assert len(endpoint.asked) == 27
    prompted(*limits, "max_dollars=100")
    assert len(endpoint.asked) == 40


def test_a_limit_needs_a_server_that_counts(endpoint):
    endpoint.replies = [(200, {}, {"choices": [{"message": {"content": "joy"}}]})]
    with pytest.raises(ModelError, match="does not count tokens"):
        load(endpoint, "api_prices=[1, 1]", "max_dollars=1").predict(TEXTS[:1])


def test_templates_are_compared_for_an_endpoint(endpoint, tmp_path, labels):
    eval_file = write_posts(tmp_path / "eval.csv", labels, invented_posts(40))
    words = ["prompts/list.jinja", "prompts/few_shot.jinja", f"api_base={endpoint.base}", "examples=2"]
    words += [f"eval_file={eval_file}", f"labels={label_file(tmp_path, labels)}", f"output_dir={tmp_path / 'out'}"]
    words += [f"train_file={write_posts(tmp_path / 'train.csv', labels)}", "examples_by=nearest"]
    result = CliRunner().invoke(app, ["prompts", "compare", "recipes/remote.yaml", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "few_shot" in result.output
    assert len(endpoint.asked) == 80
    assert {len(shown(body)) for body in endpoint.asked} == {0, 2}
    words += ["prompts/count.jinja", "prompts/json.jinja", "api_prices=[0, 1000000]", "max_dollars=50"]
    result = CliRunner().invoke(app, ["prompts", "compare", "recipes/remote.yaml", *words])
    assert isinstance(result.exception, BudgetError)  # of both further templates together


@pytest.mark.parametrize("options", [["--jobs", "2"], ["--pods"], ["--on", "ray"]])
def test_options_of_training_are_refused_for_an_endpoint(options):
    result = CliRunner().invoke(app, ["cv", "recipes/remote.yaml", *options])
    assert result.exit_code == 2
    assert "the model of an endpoint is not tuned" in " ".join(result.output.split())
