from dataclasses import replace

import numpy as np
import pytest
from tiny import POSTS, make_model, write_recipe

from emogen.model.encode import make_encoder
from emogen.model.tokenizer import TextTokenizer
from emogen.prediction.ensemble import load_run
from emogen.prediction.generator import GenerativeClassifier, predict_prob, predict_texts
from emogen.task.prompt import load_prompt, parse_prompt
from emogen.task.recipe import load_recipe

TEXTS = [text for text, _ in POSTS[:3]]


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory, labels):
    return write_recipe(tmp_path_factory.mktemp("recipe"), labels)


@pytest.fixture
def make_classifier(recipe_file, tokenizer, labels):
    """Makes a classifier by recipe keys."""

    def make(**keys):
        recipe = load_recipe(recipe_file, [f"{key}={value}" for key, value in keys.items()])
        prompt = load_prompt("prompts/yes_no.jinja" if recipe.answer == "yes_no" else "prompts/list.jinja")
        encoder = make_encoder(TextTokenizer.of(tokenizer), prompt, labels, recipe.answer, (), recipe.max_length)
        return GenerativeClassifier(recipe, labels, encoder, make_model())

    return make


@pytest.mark.parametrize("answer", ["list", "yes_no"])
def test_predictions_are_in_the_order_of_the_texts_for_any_batch_size(make_classifier, answer):
    classifier = make_classifier(answer=answer)
    together = classifier.predict(TEXTS)
    alone = [prediction for text in TEXTS for prediction in classifier.predict([text], batch_size=1)]
    assert [prediction.raw for prediction in together] == [prediction.raw for prediction in alone]
    assert [prediction.parsed for prediction in together] == [prediction.parsed for prediction in alone]
    assert all(prediction.parsed.status == "exact" for prediction in together)


def test_yes_no_answers_are_lines_read_off_the_probabilities(make_classifier, labels):
    classifier = make_classifier(answer="yes_no")
    assert classifier.n_questions == len(labels)
    prob = classifier.predict_proba(TEXTS)
    for prediction, row in zip(classifier.predict(TEXTS), prob, strict=True):
        assert prediction.raw.splitlines() == [
            f"{name}: {'yes' if p > 0.5 else 'no'}" for name, p in zip(labels.names, row, strict=True)
        ]
        assert prediction.parsed.vector == tuple((row > 0.5).astype(int))
        assert prediction.prob == pytest.approx(row, abs=1e-6)


def test_generated_answers_hold_no_probabilities(make_classifier, labels):
    (listed,) = make_classifier().predict(TEXTS[:1])
    assert listed.prob is None
    (free,) = make_classifier(answer="yes_no", decode="free").predict(TEXTS[:1])
    assert free.prob is None
    assert [line.partition(":")[0] for line in free.raw.splitlines() if ": " in line][:1] == ["anger"]


@pytest.mark.parametrize("how", ["marginal", "maximum"])
def test_answers_with_probabilities_are_those_without(make_classifier, how):
    classifier = make_classifier(prob=how)
    predictions = classifier.predict(TEXTS, with_prob=True)
    alone = classifier.predict(TEXTS)
    assert [(each.raw, each.parsed) for each in predictions] == [(each.raw, each.parsed) for each in alone]
    np.testing.assert_allclose([each.prob for each in predictions], classifier.predict_proba(TEXTS), atol=1e-6)
    done = []
    classifier.predict(TEXTS, with_prob=True, progress=done.append)
    assert sum(done) == len(TEXTS)
    (free,) = make_classifier(decode="free").predict(TEXTS[:1], with_prob=True)
    assert free.prob is None  # a free answer is none of those that the probabilities are over


def test_recipe_keys_choose_decoding_and_probabilities(make_classifier):
    classifier = make_classifier(decode="free", prob="maximum")
    model, encoder = classifier.model, classifier.encoder
    raws = [prediction.raw for prediction in classifier.predict(TEXTS)]
    assert raws == [prediction.raw for prediction in predict_texts(model, encoder, TEXTS, decode="free")]
    assert raws != [prediction.raw for prediction in predict_texts(model, encoder, TEXTS)]
    prob = classifier.predict_proba(TEXTS)
    np.testing.assert_array_equal(prob, predict_prob(model, encoder, TEXTS, how="maximum"))
    assert (prob != predict_prob(model, encoder, TEXTS)).any()


def test_long_texts_are_cut_and_counted(make_classifier):
    short, long = make_classifier().predict(["a bus", "a bus " * 400])
    assert short.n_cut == 0
    assert long.n_cut > 0


def test_no_texts_make_no_predictions(make_classifier, labels):
    classifier = make_classifier()
    assert classifier.predict([]) == []
    assert classifier.predict_proba([]).shape == (0, len(labels))


def test_a_recipe_file_loads_its_untuned_model(recipe_file, labels):
    classifier = load_run(recipe_file)
    assert classifier.recipe.path == recipe_file
    assert classifier.label_set == labels
    assert not hasattr(classifier.model, "peft_config")
    assert classifier.predict_proba(TEXTS).shape == (len(TEXTS), len(labels))


def test_a_kept_prefix_is_that_of_its_own_prompt(recipe_file, tokenizer, labels):
    """Templates are compared with one loaded model."""
    listed = load_run(recipe_file)
    other = parse_prompt("{% user %}\nFeelings ({{ names | join(' ') }})?\n{{ text }}\n")
    encoder = make_encoder(TextTokenizer.of(tokenizer), other, labels, "list", (), 1024)
    alone, after = replace(listed, encoder=encoder, kept=None), replace(listed, encoder=encoder)
    listed.predict(TEXTS)
    assert after.predict(TEXTS) == alone.predict(TEXTS)
    assert (after.predict_proba(TEXTS) == alone.predict_proba(TEXTS)).all()
    assert len(listed.kept) == 1  # the keys and values of a prefix are large
