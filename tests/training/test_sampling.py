import numpy as np
import pytest

from emogen.training.sampling import label_weights, repeat_rare

# 20 rows: the first label in 10 of them, the second in 5, the third in 1, the fourth in none.
GOLD = np.zeros((20, 4), dtype=np.int8)
GOLD[:10, 0] = GOLD[:5, 1] = GOLD[:1, 2] = 1


def test_weights_within_a_label_are_its_negatives_over_its_positives_up_to_ten():
    assert label_weights(GOLD, "within").tolist() == [1.0, 3.0, 10.0, 10.0]


def test_weights_across_labels_are_the_mean_count_over_the_own_count():
    mean = (10 + 5 + 1 + 1) / 4
    assert label_weights(GOLD, "across") == pytest.approx([mean / 10, mean / 5, mean, mean])
    assert label_weights(GOLD, "none").tolist() == [1, 1, 1, 1]


def test_rows_are_repeated_as_often_as_their_rarest_label_requires():
    gold = np.zeros((900, 3), dtype=np.int8)
    gold[:400, 0] = 1
    gold[400:500, 1] = 1
    gold[500:525, 2] = 1  # 25 of 900, where the median label has 100: sqrt(4) = 2
    index = repeat_rare(gold, seed=1)
    times = np.bincount(index, minlength=900)
    assert set(times[:500]) == {1}
    assert set(times[500:525]) == {2}
    assert set(times[525:]) == {1}
    assert (np.diff(index) >= 0).all()


def test_a_fractional_number_of_repetitions_is_drawn_reproducibly():
    gold = np.zeros((900, 3), dtype=np.int8)
    gold[:400, 0] = 1
    gold[400:500, 1] = 1
    gold[500:545, 2] = 1  # sqrt(100 / 45) = 1.49
    times = np.bincount(repeat_rare(gold, seed=1), minlength=900)[500:545]
    assert set(times) == {1, 2}
    assert (repeat_rare(gold, seed=1) == repeat_rare(gold, seed=1)).all()
