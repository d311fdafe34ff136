import json

import pytest
from tiny import POSTS, write_posts

from emogen.errors import InputError
from emogen.experiments.sweep import load_space, sweep
from emogen.train import main


def write_space(path, text):
    path.write_text(text)
    return path


def test_a_search_is_seeded_goes_on_and_keeps_its_runs(tiny_recipe, tmp_path, labels):
    recipe = str(tiny_recipe(eval_fraction=0.4, max_steps=2))
    write_posts(tmp_path / "train.csv", labels, [(f"{text} {k}", names) for k in range(3) for text, names in POSTS])
    main([recipe])
    space = write_space(tmp_path / "space.yaml", "learning_rate: {low: 1e-3, high: 1e-1, log: true}\nlora_r: [2, 4]\n")
    study = sweep(recipe, space, n_trials=1, seeds=[tmp_path / "run"])
    first, second = study.trials
    assert first.params == {"learning_rate": 0.01, "lora_r": 4}
    assert first.value == json.loads((tmp_path / "run" / "metrics.json").read_text())["f1_macro"]
    assert 1e-3 <= second.params["learning_rate"] <= 1e-1
    assert len(list((tmp_path / "run-sweep").glob("trial-*/metrics.json"))) == 1
    again = sweep(recipe, space, n_trials=2, seeds=[tmp_path / "run"])
    assert [trial.params for trial in again.trials[:2]] == [first.params, second.params]
    assert len(again.trials) == 3


def test_what_is_wrong_is_said_before_anything_is_tried(tiny_recipe, tmp_path):
    recipe = tiny_recipe(eval_fraction=0.4)
    with pytest.raises(InputError, match=r"space.yaml:2: lora_r: expected a list"):
        load_space(write_space(tmp_path / "space.yaml", "learning_rate: [1e-3]\nlora_r: 4\n"))
    with pytest.raises(InputError, match="lora_rr: no such key"):
        sweep(recipe, write_space(tmp_path / "space.yaml", "lora_rr: [1, 2]\n"))
    with pytest.raises(InputError, match="nothing to score on"):
        sweep(recipe, write_space(tmp_path / "space.yaml", "lora_r: [1, 2]\n"), ["eval_fraction=0"])
    assert not (tmp_path / "run-sweep").exists()
