"""`emogen.load`: finished runs in Python."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas
import pytest
from tiny import POSTS, write_recipe

import emogen
from emogen.errors import InputError
from emogen.evaluation.run_folder import THRESHOLDS
from emogen.prediction.ensemble import load_run
from emogen.prediction.loaded import rows_of_texts
from emogen.task.yaml_files import as_overrides, read_value
from emogen.train import main as train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory, labels):
    """A run of one step that was scored, so it has thresholds. Tests do not change it."""
    folder = tmp_path_factory.mktemp("scored")
    train([str(write_recipe(folder, labels, max_steps=1, eval_fraction=0.4))])
    return folder / "run"


TEXTS = ["so happy for you!!", "I can't believe they did this to us.", ""]


def test_a_run_labels_texts_as_predict_does(run, labels):
    loaded = emogen.load(run, decide="answer")
    assert loaded.labels == labels.names
    predictions = load_run(run).predict(TEXTS)
    assert loaded.predict(TEXTS) == [prediction.parsed.labels for prediction in predictions]
    prob = loaded.predict_proba(TEXTS)
    assert prob.dtype == np.float32
    np.testing.assert_allclose(prob, load_run(run).predict_proba(TEXTS), atol=1e-5)
    names, same = loaded.classify(TEXTS)
    assert names == loaded.predict(TEXTS)
    np.testing.assert_allclose(same, prob, atol=1e-5)


def test_thresholds_decide_where_the_run_has_them(run, tmp_path, labels):
    assert (run / THRESHOLDS).is_file()
    loaded = emogen.load(str(run))
    assert loaded.decide == "thresholds"
    thresholds = np.array(list(json.loads((run / THRESHOLDS).read_text()).values()))
    above = loaded.predict_proba(TEXTS) > thresholds
    assert loaded.predict(TEXTS) == [tuple(np.array(labels.names)[row]) for row in above]
    assert "by thresholds" in repr(loaded)


def test_what_is_not_a_list_of_texts_is_refused(run):
    loaded = emogen.load(run)
    with pytest.raises(TypeError, match=r"got a single string; write \[text\]"):
        loaded.predict("so happy")
    with pytest.raises(TypeError, match="text 1: expected a string, got float: nan"):
        loaded.predict(["a", float("nan")])
    for table in (pandas.DataFrame({"text": ["a", "b"]}), {"text": "a"}, {"a", "b"}):
        with pytest.raises(
            TypeError, match=r"expected a list or a column of texts, got a .*; name its column of texts"
        ):
            loaded.predict(table)
    for column in (pandas.Series(["a", "b"]), np.array(["a", "b"]), (text for text in "ab")):
        assert loaded.predict(column) == loaded.predict(["a", "b"])
    assert loaded.predict([]) == []
    assert loaded.predict_proba([]).shape == (0, len(loaded.labels))


def test_decide_takes_the_place_of_predict_by(run):
    with pytest.raises(InputError, match=r"predict_by=answer: here `decide` says how .* --decide"):
        emogen.load(run, predict_by="answer")


def test_threads_share_a_classifier(run):
    loaded, texts = emogen.load(run), [f"{text} {k}" for k in range(4) for text, _ in POSTS]
    names, prob = loaded.classify(texts)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(loaded.classify, texts[k : k + 3]) for k in range(16)]
        for k, call in enumerate(asked):
            found, own = call.result()
            assert found == names[k : k + 3]
            np.testing.assert_allclose(own, prob[k : k + 3], atol=1e-4)


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(InputError, match="not a run folder"):
        emogen.load(tmp_path)
    with pytest.raises(InputError, match="name at least one run folder"):
        emogen.load()


def test_importing_emogen_loads_nothing_heavy():
    code = "import sys, emogen; print([m for m in ('torch', 'numpy', 'transformers', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_overrides_are_read_back_as_what_they_are():
    given = {"text_column": None, "separator": ": #", "max_length": 256, "labels": Path("a b.yaml"), "id_column": "yes"}
    given |= {"output_dir": "/runs/é 😀\u2028\x7f\\ud83d", "learning_rate": 1e-5}
    drawn = {"lora_r": np.int64(8), "max_grad_norm": np.float32(0.5), "shared_prefix": np.bool_(False)}  # by a search
    words = (word.partition("=") for word in as_overrides(given | drawn))
    found = {key: read_value(text) for key, _, text in words}
    assert found == given | {"labels": "a b.yaml", "lora_r": 8, "max_grad_norm": 0.5, "shared_prefix": False}
    assert found["shared_prefix"] is False
    with pytest.raises(TypeError):
        as_overrides({"lora_r": object()})


def test_half_a_character_is_replaced_with_a_warning(caplog):
    """No tokenizer takes it, and no file. JSON and JavaScript make it of an emoji that was cut."""
    assert rows_of_texts(["a \ud83d b", "\ud83d\ude00", "😀"]).texts == ["a \ufffd b", "😀", "😀"]
    assert "2 texts with half a character" in caplog.text
