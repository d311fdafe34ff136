"""The difference that an export makes, by hand."""

import numpy as np
import pytest

from emogen.errors import ModelError
from emogen.exporting.shift import Labelled, describe, measure_shift, require_small

GOLD = np.array([[1, 0], [0, 1], [1, 1], [0, 0]], dtype=np.int8)
NAMES = ("a", "b")


def test_a_shift_by_hand():
    # after: row 3 loses b. F1 of b: 2 * 1 / (2 + 1) = 2/3 instead of 1; macro (1 + 2/3) / 2
    after = GOLD.copy()
    after[2, 1] = 0
    prob = np.full(GOLD.shape, 0.5)
    moved = prob.copy()
    moved[0, 0] = 0.75
    shift = measure_shift(GOLD, NAMES, Labelled(GOLD, prob), Labelled(after, moved))
    assert shift["rows"] == 4
    assert shift["changed"] == 1
    assert shift["f1_macro_change"] == pytest.approx(-1 / 6)
    assert shift["interval"] is None  # four rows are too few
    assert shift["prob_change_max"] == 0.25
    assert shift["prob_change_mean"] == 0.25 / 8
    assert describe(shift) == (
        "1 of 4 answers changed; macro-F1 1.0000 -> 0.8333 (-0.1667); probabilities: 0.2500 at most, 0.03125 on average"
    )
    with pytest.raises(ModelError, match=r"the export does not score as the run: 1 of 4.*--force keeps it"):
        require_small(shift, "the export")


def test_what_is_the_same_passes_and_many_rows_have_an_interval():
    gold = np.tile(GOLD, (20, 1))
    other = gold.copy()
    other[0] = 1 - other[0]
    shift = measure_shift(gold, NAMES, Labelled(gold, None), Labelled(other, None))
    low, high = shift["interval"]
    assert low < shift["f1_macro_change"] < high <= 0
    assert "prob_change_max" not in shift
    require_small(measure_shift(gold, NAMES, Labelled(gold, None), Labelled(gold, None)), "the export")
