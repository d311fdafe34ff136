from contextlib import contextmanager

import numpy as np
import pytest

from emogen.evaluation.results import Prediction
from emogen.prediction.classifier import predictions_from_prob, prob_of
from emogen.task.labels import Label, LabelSet
from emogen.task.parse import parse_answer


@pytest.fixture
def three():
    return LabelSet(name="three", labels=tuple(Label(name=name) for name in ("red", "green", "blue")))


def test_labels_above_one_half_are_predicted(three):
    prob = np.array([[0.51, 0.5, 0.9], [0.1, 0.2, 0.3]], dtype=np.float32)
    first, second = predictions_from_prob(prob, three, [0, 7])
    assert first.raw == "red, blue"  # 0.5 is not above 0.5
    assert first.parsed.labels == ("red", "blue")
    assert first.parsed.vector == (1, 0, 1)
    assert first.parsed.status == "exact"
    assert first.prob == pytest.approx((0.51, 0.5, 0.9))
    assert (first.n_cut, second.n_cut) == (0, 7)
    assert second.raw == three.empty
    assert second.parsed.vector == (0, 0, 0)


class ByLength:
    """A classifier whose probability of each label is a tenth of the length of the text."""

    n_questions = 3

    def __init__(self):
        self.n_calls = 0

    def predict_proba(self, texts, *, progress):
        self.n_calls += 1
        progress(len(texts) * self.n_questions)
        return np.array([[len(text) / 10] * 3 for text in texts], dtype=np.float32)


@pytest.fixture
def bars():
    """The bars that `bar` has made: title, total, and how far each was advanced."""
    return []


@pytest.fixture
def bar(bars):
    @contextmanager
    def bar(title, total):
        bars.append([title, total, 0])

        def advance(n):
            bars[-1][2] += n

        yield advance

    return bar


def test_probabilities_that_answers_were_read_off_are_not_computed_again(three, bar, bars):
    predictions = [Prediction("red", parse_answer("red", three), 0, (0.9, 0.1, 0.2))]
    classifier = ByLength()
    prob = prob_of(classifier, ["abc"], predictions, bar, "Probabilities")
    assert prob.dtype == np.float32
    assert prob.tolist() == [[pytest.approx(0.9), pytest.approx(0.1), pytest.approx(0.2)]]
    assert classifier.n_calls == 0
    assert bars == []


@pytest.mark.parametrize("was_asked", [True, False])
def test_other_probabilities_are_computed_under_a_bar_of_all_questions(three, bar, bars, was_asked):
    texts = ["abc", "abcde"]
    predictions = [Prediction("red", parse_answer("red", three), 0)] * 2 if was_asked else []
    prob = prob_of(ByLength(), texts, predictions, bar, "Probabilities")
    np.testing.assert_allclose(prob, [[0.3] * 3, [0.5] * 3])
    assert bars == [["Probabilities", 6, 6]]
