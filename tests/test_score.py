import io
import json
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console
from sklearn import metrics as sk

from emogen.score import footnote, score, table

NAMES = ["a", "b", "c"]
GOLD = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]], dtype=np.int8)
PRED = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 0]], dtype=np.int8)


def test_by_hand():
    # a: tp 1, fp 1, fn 1 -> P R F1 = 1/2; b: tp 2 -> 1; c: fp 1, no positives -> F1 0, and it counts
    # Jaccard: 1, 1/3, 1 (both empty), 1/2; exact: rows 1 and 3; Hamming: 3 of 12 differ
    result = score(GOLD, PRED, NAMES)
    assert [result["per_label"][n]["f1"] for n in NAMES] == [0.5, 1.0, 0.0]
    assert result["f1_macro"] == pytest.approx(1.5 / 3)
    assert result["f1_micro"] == pytest.approx(2 * 3 / (2 * 3 + 2 + 1))
    assert result["jaccard_samples"] == pytest.approx((1 + 1 / 3 + 1 + 1 / 2) / 4)
    assert result["exact_match"] == 0.5
    assert result["hamming_loss"] == pytest.approx(3 / 12)
    assert result["no_positives"] == ["c"]
    assert result["per_label"]["b"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 2, "predicted": 2}
    json.dumps(result)


def test_equals_scikit_learn_and_does_not_mind_the_order():
    rng = np.random.default_rng(0)
    gold, pred = (rng.random((2, 200, 11)) < 0.25).astype(np.int8)
    names = [str(k) for k in range(11)]
    result = score(gold, pred, names)
    assert result["f1_macro"] == pytest.approx(sk.f1_score(gold, pred, average="macro"))
    assert result["f1_micro"] == pytest.approx(sk.f1_score(gold, pred, average="micro"))
    assert result["hamming_loss"] == pytest.approx(sk.hamming_loss(gold, pred))
    some = gold.any(1) | pred.any(1)
    assert score(gold[some], pred[some], names)["jaccard_samples"] == pytest.approx(
        sk.jaccard_score(gold[some], pred[some], average="samples")
    )
    order = rng.permutation(200)
    assert score(gold[order], pred[order], names)["f1_macro"] == pytest.approx(result["f1_macro"])


def test_perfect_and_nothing():
    perfect = score(GOLD[:, :2], GOLD[:, :2], NAMES[:2])
    assert [perfect[k] for k in ("f1_macro", "f1_micro", "jaccard_samples", "exact_match", "hamming_loss")] == [
        1,
        1,
        1,
        1,
        0,
    ]
    nothing = score(GOLD, np.zeros_like(GOLD), NAMES)
    assert nothing["f1_macro"] == 0
    assert nothing["jaccard_samples"] == 0.25


@pytest.mark.parametrize(
    ("gold", "pred", "said"),
    [
        (GOLD, PRED[:3], "must both be"),
        (GOLD[:, :2], PRED[:, :2], "must both be"),
        (GOLD[0], PRED[0], "must both be"),
        (GOLD[:0], PRED[:0], "no rows"),
        (GOLD * 2, PRED, "only 0 and 1"),
    ],
)
def test_what_cannot_be_scored(gold, pred, said):
    with pytest.raises(ValueError, match=said):
        score(gold, pred, NAMES)


@pytest.mark.parametrize("n_systems", [1, 2, 3])
def test_the_table_fits_a_terminal(n_systems):
    console = Console(width=80, file=io.StringIO())
    titles = ["zero-shot", "tuned", "other"][:n_systems]
    console.print(table([(title, score(GOLD, PRED, NAMES)) for title in titles]))
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    assert all(title in shown for title in titles)
    assert "0.500" in shown
    assert ("+0.000" in shown) == (n_systems == 2)


def test_footnote_only_where_it_is_needed():
    assert "c: F1 counts as 0" in footnote(score(GOLD, PRED, NAMES))
    assert footnote(score(GOLD[:, :2], PRED[:, :2], NAMES[:2])) is None


def test_scoring_needs_no_torch():
    code = "import sys, emogen.score, emogen.parse; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
