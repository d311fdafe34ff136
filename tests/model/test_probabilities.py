import itertools

import numpy as np
import pytest
import torch
from tiny import make_model

from emogen.errors import ModelError
from emogen.model.decode import generate
from emogen.model.encode import make_encoder
from emogen.model.grammar import encode_answer, find_jumps
from emogen.model.probabilities import generate_with_probabilities, log_likelihood, probabilities
from emogen.model.shared_prefix import share_prefix
from emogen.model.tokenizer import TextTokenizer
from emogen.prediction.generator import predict_prob, predict_texts
from emogen.task.labels import Label, LabelSet
from emogen.task.parse import parse_answer
from emogen.task.prompt import load_prompt

TEXTS = ["", "hello", "what a lovely morning by the sea " * 4, "<|im_end|>", "x " * 40, "you got this"]


def encoder_of(tokenizer, style, *names):
    labels = LabelSet(name="few", labels=tuple(Label(name=name) for name in names))
    return make_encoder(TextTokenizer.of(tokenizer), load_prompt(f"prompts/{style}.jinja"), labels, style)


def probability_of_each_answer(model, encoder, suffix):
    """Every answer is run in full: {choices: probability}."""
    grammar = encoder.grammar
    n_choices = 2 if encoder.style == "yes_no" else len(encoder.label_set)
    sizes = [1] if encoder.style == "yes_no" else range(n_choices + 1)
    answers = [chosen for size in sizes for chosen in itertools.combinations(range(n_choices), size)]
    column = {int(token): c for c, token in enumerate(grammar.token_ids)}
    prob = {}
    for chosen in answers:
        ids, node, log_prob = encode_answer(grammar, chosen)[0], 0, 0.0
        prompt = [*encoder.prefix_ids, *suffix]
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 :]
        for k, token in enumerate(ids):
            allowed = torch.from_numpy(grammar.next_node[node] >= 0)
            step = logits[k, grammar.token_ids].masked_fill(~allowed, -torch.inf).log_softmax(0)
            log_prob += step[column[token]]
            node = grammar.next_node[node, column[token]]
        prob[chosen] = float(log_prob.exp())
    assert sum(prob.values()) == pytest.approx(1, abs=1e-5)
    return prob


@pytest.mark.parametrize("style", ["list", "count", "json", "yes_no"])
@torch.no_grad()
def test_marginals_equal_the_sums_over_all_answers(model, both_attentions, tokenizer, style):
    # One name is the beginning of another, and one begins with a token of another.
    encoder = encoder_of(tokenizer, style, "joy", "joyful", "anger", "anticipation")
    suffixes = [row.suffix_ids for text in TEXTS for row in encoder.rows(text)[:2]]
    model.eval()
    model.get_input_embeddings().weight.normal_(std=0.5)  # so that answers differ in probability
    n_choices = 2 if style == "yes_no" else 4
    answers = [probability_of_each_answer(model, encoder, suffix) for suffix in suffixes]
    expected = torch.tensor(
        [[sum(p for chosen, p in row.items() if c in chosen) for c in range(n_choices)] for row in answers]
    )
    assert expected.std() > 0.01
    for _ in both_attentions(model):
        for batch_size in (1, 5):
            prob = probabilities(model, encoder, suffixes, floor=0, width=None, batch_size=batch_size)[:, 0]
            torch.testing.assert_close(torch.from_numpy(prob), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("style", ["list", "json"])
@torch.no_grad()
def test_maximum_is_the_highest_probability_at_a_step_of_the_greedy_answer(model, both_attentions, tokenizer, style):
    encoder = encoder_of(tokenizer, style, "anger", "anticipation", "joy", "trust")
    suffixes = [encoder.rows(text)[0].suffix_ids for text in TEXTS]
    model.eval()
    model.get_input_embeddings().weight.normal_(std=0.5)
    greedy = generate(model, encoder, suffixes)
    expected = torch.zeros(len(suffixes), 4)
    for i, (suffix, ids) in enumerate(zip(suffixes, greedy, strict=True)):
        named = parse_answer(tokenizer.decode(ids), encoder.label_set, style=style).labels
        greedy_choices = tuple(k for k, value in enumerate(encoder.label_set.vector(named)) if value)
        answers = probability_of_each_answer(model, encoder, suffix)
        for step in range(len(greedy_choices) + 1):  # the last step is what could have come after the end
            begun = greedy_choices[:step]
            continued = {chosen: p for chosen, p in answers.items() if chosen[:step] == begun}
            for label in range(4):
                next_one = sum(p for chosen, p in continued.items() if chosen[: step + 1] == (*begun, label))
                expected[i, label] = max(expected[i, label], next_one / sum(continued.values()))
    for _ in both_attentions(model):
        assert generate(model, encoder, suffixes) == greedy
        prob = probabilities(model, encoder, suffixes, how="maximum", floor=0, width=None)[:, 0]
        torch.testing.assert_close(torch.from_numpy(prob), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("how", ["marginal", "maximum"])
@pytest.mark.parametrize("style", ["list", "count", "json"])
@torch.no_grad()
def test_one_pass_gives_the_answers_and_probabilities_of_two(model, both_attentions, encoder_for, style, how):
    encoder = encoder_for(style)
    suffixes = [row.suffix_ids for text in TEXTS for row in encoder.rows(text)]
    model.eval()
    for seed in range(100):  # not every random model answers different texts differently
        torch.manual_seed(seed)
        model.get_input_embeddings().weight.normal_(std=0.5)
        if len(set(map(tuple, generate(model, encoder, suffixes)))) > 1:
            break
    # In the end next to nothing is followed for its probability, so the greedy answer is all that is left.
    limits = [{"floor": 0.02, "width": 4}, {"floor": 0.2, "width": 2}, {"floor": 1.0}]
    for _ in both_attentions(model):
        greedy = generate(model, encoder, suffixes)
        assert len(set(map(tuple, greedy))) > 1
        for limit in limits:
            alone = probabilities(model, encoder, suffixes, how=how, **limit)[:, 0]
            answers, prob = generate_with_probabilities(model, encoder, suffixes, how=how, batch_size=4, **limit)
            assert answers == greedy
            np.testing.assert_allclose(prob, alone, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_the_greedy_answer_adds_nothing_to_probabilities_beyond_the_limits(model, encoder_for):
    """With a floor of 1 only the first decision counts: a label's probability is that of being the first one."""
    encoder = encoder_for("list")
    model.eval()
    model.get_input_embeddings().weight.normal_(std=0.5)
    suffixes = [encoder.rows(text)[0].suffix_ids for text in TEXTS]
    answers, prob = generate_with_probabilities(model, encoder, suffixes, floor=1.0)
    assert max(map(len, answers)) > 4  # several labels
    grammar = encoder.grammar
    settled = torch.from_numpy(find_jumps(grammar).settles[0]).float()  # [R, C]
    for suffix, row in zip(suffixes, prob, strict=True):
        logits = model(torch.tensor([[*encoder.prefix_ids, *suffix]])).logits[0, -1, grammar.token_ids]
        first = logits.masked_fill(torch.from_numpy(grammar.next_node[0] < 0), -torch.inf).softmax(0)
        np.testing.assert_allclose(row, first @ settled, atol=1e-6)
    assert generate_with_probabilities(model, encoder, [])[0] == []


@torch.no_grad()
def test_a_narrow_search_gives_lower_bounds(model, tokenizer, labels, encoder_for):
    encoder = encoder_of(tokenizer, "list", *labels.names[:7])  # a complete search follows 2 ** 7 answers
    suffixes = [encoder.rows(text)[0].suffix_ids for text in TEXTS]
    assert share_prefix(model)
    exact = probabilities(model, encoder, suffixes, floor=0, width=None)
    wide = probabilities(model, encoder, suffixes, floor=0, width=16)
    narrow = probabilities(model, encoder, suffixes, floor=0, width=4)
    assert (narrow <= wide + 1e-6).all()
    assert (wide <= exact + 1e-6).all()
    assert np.abs(exact - narrow).max() > 0.01  # this model is so undecided that a narrow search misses much
    assert probabilities(model, encoder_for("list"), []).shape == (0, 1, 11)


@torch.no_grad()
def test_questions_on_one_text_get_the_probabilities_of_separate_rows(model, both_attentions, encoder_for):
    encoder = encoder_for("yes_no")
    rows = [encoder.rows(text) for text in TEXTS]
    texts = [questions[0].suffix_ids[: questions[0].n_text] for questions in rows]
    for _ in both_attentions(model):
        separate = probabilities(model, encoder, [row.suffix_ids for questions in rows for row in questions])
        together = probabilities(model, encoder, texts, [encoder.question_ids] * len(texts), batch_size=4)
        np.testing.assert_allclose(together, separate.reshape(len(TEXTS), 11, 2), atol=1e-6, rtol=1e-4)
        np.testing.assert_allclose(together.sum(axis=2), 1, rtol=1e-4)


@torch.no_grad()
def test_a_batch_of_empty_texts_gets_the_probabilities_of_separate_rows(model, both_attentions, encoder_for):
    encoder = encoder_for("yes_no")
    for _ in both_attentions(model):
        separate = probabilities(model, encoder, [row.suffix_ids for row in encoder.rows("")])
        for texts in ([[]], [[], []]):
            together = probabilities(model, encoder, texts, [encoder.question_ids] * len(texts))
            np.testing.assert_allclose(together[0], separate[:, 0], atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_yes_no_answers_are_those_of_greedy_generation(both_attentions, tokenizer, encoder_for):
    encoder, texts = encoder_for("yes_no"), TEXTS[:3]
    suffixes = [row.suffix_ids for text in texts for row in encoder.rows(text)]
    seen = set()
    for seed in range(4):
        model = make_model(seed=seed)
        for _ in both_attentions(model):
            words = [tokenizer.decode(ids).strip() for ids in generate(model, encoder, suffixes)]
            predictions = predict_texts(model, encoder, texts, batch_size=2)
            lines = [line for prediction in predictions for line in prediction.raw.split("\n")]
            assert [line.split(": ")[1] for line in lines] == words
            np.testing.assert_allclose(
                [prediction.prob for prediction in predictions], predict_prob(model, encoder, texts), atol=1e-6
            )
            seen |= set(words)
    assert seen == {"yes", "no"}


@pytest.mark.parametrize("style", ["list", "yes_no"])
def test_progress_counts_every_question_once(both_attentions, encoder_for, style):
    encoder, model = encoder_for(style), make_model()
    for _ in both_attentions(model):
        for predict in (predict_texts, predict_prob):
            done = []
            predict(model, encoder, TEXTS, batch_size=4, progress=done.append)
            assert sum(done) == len(TEXTS) * len(encoder.question_ids)


@pytest.mark.parametrize("style", ["list", "yes_no"])
def test_the_log_likelihood_is_that_of_each_answer_alone(model, both_attentions, labels, encoder_for, style):
    encoder = encoder_for(style)
    answers = [(), ("joy",), ("anger", "disgust"), labels.names, ("trust",), ("fear",)]
    rows = [row for text, names in zip(TEXTS, answers, strict=True) for row in encoder.rows(text, names)[:2]]
    model.eval()
    expected = []
    for row in rows:
        ids = torch.tensor([*encoder.prefix_ids, *row.suffix_ids])
        with torch.no_grad():
            log_prob = model(ids[None]).logits[0].log_softmax(1)
        answer = range(len(ids) - row.n_answer, len(ids))
        expected.append(sum(float(log_prob[i - 1, ids[i]]) for i in answer))
    for _ in both_attentions(model):
        for batch_size in (1, 5):
            found = log_likelihood(model, encoder, rows, batch_size=batch_size)
            np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert not model.training


@pytest.mark.parametrize("style", ["list", "count", "json", "yes_no"])
@torch.no_grad()
def test_the_likelihoods_among_valid_answers_are_those_of_each_answer(model, both_attentions, tokenizer, style):
    encoder = encoder_of(tokenizer, style, "joy", "joyful", "anger")
    model.eval()
    chosen = [()] if style == "yes_no" else [(), (0,), (1, 2), (0, 1, 2)]
    asked = [(text, own) for text in TEXTS[:3] for own in chosen]
    names = encoder.label_set.names
    rows = [encoder.rows(text, [names[i] for i in own])[0] for text, own in asked]
    expected = [
        probability_of_each_answer(model, encoder, row.suffix_ids[: len(row) - row.n_answer])[
            (1,) if style == "yes_no" else own
        ]
        for row, (_, own) in zip(rows, asked, strict=True)
    ]
    for _ in both_attentions(model):
        found = log_likelihood(model, encoder, rows, among_valid=True, batch_size=5)
        np.testing.assert_allclose(np.exp(found), expected, rtol=1e-3)


@torch.no_grad()
def test_a_diverged_model_is_an_error(encoder_for):
    model, encoder = make_model(), encoder_for("list")
    assert share_prefix(model)
    model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="NaN"):
        probabilities(model, encoder, [encoder.rows("hello")[0].suffix_ids])
