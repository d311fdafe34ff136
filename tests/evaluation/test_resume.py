import numpy as np

from emogen.evaluation.resume import changed_keys, digest_of
from emogen.task.rows import Rows


def test_what_changes_a_result_is_named_with_both_values():
    before = {"learning_rate": 1e-3, "lora_r": 8, "seed": 1}
    now = {"learning_rate": 1e-4, "lora_r": 8, "seed": 1}
    assert changed_keys(before, now) == ["learning_rate (0.001 before, 0.0001 now)"]
    assert changed_keys(before, before) == []


def test_logs_and_places_may_change():
    before = {"logging_steps": 1, "save_steps": 10, "train_file": "a.csv", "output_dir": "a"}
    assert changed_keys(before, {"logging_steps": 5, "save_steps": 2, "train_file": "b.csv", "output_dir": "b"}) == []


def test_a_key_that_is_missing_has_its_default():
    assert changed_keys({}, {"answer": "list", "examples": 0}) == []
    assert changed_keys({}, {"answer": "json"}) == ["answer (list before, json now)"]
    assert changed_keys({"max_steps": 4}, {}) == ["max_steps (4 before, -1 now)"]


def test_the_digest_of_rows_depends_on_texts_labels_and_order():
    def digest(texts, truth):
        return digest_of(Rows("x.csv", ["1", "2"], texts, np.array(truth, dtype=np.int8), [2, 3]))

    base = digest(["a", "b"], [[1, 0], [0, 1]])
    assert digest(["a", "b"], [[1, 0], [0, 1]]) == base
    assert (
        len(
            {
                base,
                digest(["a", "c"], [[1, 0], [0, 1]]),
                digest(["a", "b"], [[1, 0], [1, 1]]),
                digest(["b", "a"], [[0, 1], [1, 0]]),
            }
        )
        == 4
    )
