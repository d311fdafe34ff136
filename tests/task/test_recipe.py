import itertools
import json

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from tiny import save_model

from emogen import paths
from emogen.report import compare
from emogen.task.recipe import RecipeError, load_recipe
from emogen.task.trl_fields import Field, lm_fields, sft_fields
from emogen.task.trl_keys import (
    LIMITS,
    OBEYED_BY_EMOGEN,
    OBEYED_BY_TRAINER,
    OLD_NAMES,
    SETTLED,
    SETTLED_FOR_HEADS,
    SETTLED_FOR_SHARED_PREFIXES,
)
from emogen.training.check import check

RECIPES = [p for p in paths.shipped("recipes").rglob("*.yaml") if p.parent.name != "accelerate"]


def write(tmp_path, text="model_name_or_path: m\ntrain_file: t.csv\n"):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_defaults_and_overrides(tmp_path):
    recipe = load_recipe(write(tmp_path), ["learning_rate=2e-4", "eval_strategy=no", "lora_r=8", "shared_prefix=false"])
    assert recipe.sft_args["learning_rate"] == 2e-4
    assert recipe.sft_args["eval_strategy"] == "no"
    assert recipe.lm_args["lora_r"] == 8
    assert recipe.shared_prefix is False
    assert str(recipe.output_dir) == "runs/mine"
    assert recipe.lm_args["lora_target_modules"] == "all-linear"


def test_all_errors_are_reported_together_with_their_lines(tmp_path):
    path = write(
        tmp_path,
        "model_name_or_path: m\nlerning_rate: 1\npacking: true\nanswer: xml\nlora_r: many\neval_strategy: sometimes\nlora_r: 3\n",
    )
    with pytest.raises(RecipeError) as error:
        load_recipe(path, ["nonsense", "eval_fraction=2"])
    problems = "\n".join(error.value.problems)
    for problem in (
        "mine.yaml:2: lerning_rate: no such key; did you mean learning_rate?",
        "mine.yaml:3: packing: cannot be set",
        "mine.yaml:4: answer: ",
        "mine.yaml:6: eval_strategy: ",
        "mine.yaml:7: lora_r: given twice (first at",
        "'nonsense': expected key=value",
        "'eval_fraction=2': eval_fraction: ",
    ):
        assert problem in problems


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "not valid YAML"),
        ("- a\n", ":1: expected"),
        ("", "model_name_or_path: missing"),
        ("model_name_or_path: m\n", "train_file: missing"),
        ("model_name_or_path: m\ntrain_file: a\ndataset_name: b\n", "choose one"),
        (
            "model_name_or_path: m\ntrain_file: a\nuse_peft: false\n",
            ":3: use_peft: must be true, except with answer: head",
        ),
        ("model_name_or_path: m\ntrain_file: a\neval_file: b\neval_fraction: 0.1\n", "choose one"),
    ],
)
def test_an_invalid_recipe_is_an_error(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, text))


def test_old_names_are_read_with_a_notice(tmp_path):
    recipe = load_recipe(write(tmp_path), ["max_seq_length=99", "lora_rank=3"])
    assert (recipe.max_length, recipe.lm_args["lora_r"]) == (99, 3)
    assert recipe.notices == [
        "'max_seq_length=99': max_seq_length is now called max_length; it is read as that",
        "'lora_rank=3': lora_rank is now called lora_r; it is read as that",
    ]


def test_a_resolved_recipe_is_read_as_the_same_recipe(tmp_path):
    first = load_recipe(write(tmp_path), ["learning_rate=3e-5", "examples=2"])
    second = load_recipe(write(tmp_path, first.to_yaml()))
    assert second.model_dump() == first.model_dump()
    assert (second.sft_args, second.lm_args) == (first.sft_args, first.lm_args)


def test_a_missing_recipe_suggests_a_shipped_one(tmp_path):
    with pytest.raises(RecipeError, match=r"recipes/demo\.yaml"):
        load_recipe("recipes/dmo.yaml")


def test_every_published_system_has_a_recipe():
    published = {path.stem: load_recipe(path) for path in RECIPES if path.parent.name == "published"}
    assert published.keys() == {system["id"] for system in compare.published()["systems"]}
    for system in compare.published()["systems"]:
        recipe = published[system["id"]]
        assert recipe.model_name == system["model"]
        assert (recipe.answer == "head") == ("head" in system["kind"])
        assert f"--folds {system['folds']} " in recipe.path.read_text()
        assert f"{system['f1_macro']:.4f}" in recipe.path.read_text()


def test_a_secret_is_rejected_and_not_repeated(tmp_path):
    with pytest.raises(RecipeError, match=r"hub_token: cannot be set: .* HF_TOKEN") as error:
        load_recipe(write(tmp_path), ["hub_token=hf_abc123"])
    assert "abc123" not in str(error.value)


def test_the_tests_find_the_recipes():
    assert {"demo", "smollm2-135m", "gemma3-270m", "qwen1.5b", "llama3b", "qwen14b"} <= {p.stem for p in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_valid_and_begins_with_its_command(path):
    recipe = load_recipe(path)
    command = (
        "emogen cv recipes/published"
        if path.parent.name == "published"
        else "emogen predict recipes"
        if recipe.api_base
        else "accelerate launch emogen/train.py recipes"
    )
    assert path.read_text().startswith(f"# {command}/{path.name}")
    assert json.dumps(recipe.lm_args)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """Provides the tokenizer in place of a recipe's own model, which would have to be downloaded."""
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_check_passes_on_every_recipe_without_a_gpu(path, tiny_model):
    findings = check(path, [f"model_name_or_path={tiny_model}", "max_length=1024"])
    assert not findings.failed, findings.problems
    assert len(findings.facts) == 3


def test_qwen14b_has_the_published_qlora_settings(tmp_path):
    lm = load_recipe("recipes/qwen14b.yaml").lm_config()
    assert (lm.load_in_4bit, lm.bnb_4bit_quant_type, lm.use_bnb_nested_quant, lm.dtype) == (
        True,
        "nf4",
        True,
        "bfloat16",
    )
    assert (lm.lora_r, lm.lora_alpha, lm.lora_target_modules) == (128, 256, "all-linear")


@pytest.mark.parametrize("path", sorted(paths.shipped("recipes/accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_reads_every_launch_configuration_and_each_names_its_command(path):
    assert load_config_from_file(str(path)).num_processes >= 1  # raises on a key that it does not know
    (command,) = [line for line in path.read_text().splitlines() if line.startswith("# accelerate launch")]
    _, _, config_file, *words = command[2:].split()[1:]
    assert config_file == f"recipes/accelerate/{path.name}"
    script = words.index("emogen/train.py")
    load_recipe(words[script + 1], words[script + 2 :])


# ------------------------------------------------------------------------------------------ TRL's keys


def test_every_key_of_trl_is_in_exactly_one_list():
    """A key that a newer TRL or transformers adds fails here: does a run obey it, or must it be refused?"""
    keys = set(sft_fields() | lm_fields())
    lists = (set(SETTLED), OBEYED_BY_EMOGEN, OBEYED_BY_TRAINER)
    assert keys - set().union(*lists) == set()
    assert all(not a & b for a, b in itertools.combinations(lists, 2))
    assert set().union(SETTLED_FOR_HEADS, SETTLED_FOR_SHARED_PREFIXES, LIMITS) <= OBEYED_BY_EMOGEN | OBEYED_BY_TRAINER
    assert not keys & set(OLD_NAMES)
    assert set(OLD_NAMES.values()) <= keys


@pytest.mark.parametrize("key", ["push_to_hub", "packing", "use_liger_kernel", "warmup_ratio", "include_for_metrics"])
def test_what_a_run_would_not_obey_is_refused_with_the_reason(tmp_path, key):
    with pytest.raises(RecipeError, match=f"mine.yaml:3: {key}: cannot be set: .{{20}}"):
        load_recipe(write(tmp_path, f"model_name_or_path: m\ntrain_file: t.csv\n{key}: true\n"))


def test_a_key_that_nobody_has_checked_is_refused(tmp_path, monkeypatch):
    newer = sft_fields() | {"new_loss": Field(float, 0.0)}
    monkeypatch.setattr("emogen.task.recipe.sft_fields", lambda: newer)
    with pytest.raises(RecipeError, match="new_loss: a newer TRL has added this key"):
        load_recipe(write(tmp_path), ["new_loss=1.0"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora_r='8'", "valid integer, got '8'"),
        ("lora_r=8.0", "valid integer, got 8.0"),
        ("lora_r=true", "valid integer, got True"),
        ("lora_r=0", "greater than or equal to 1, got 0"),
        ("bf16='false'", "valid boolean, got 'false'"),
        ("bf16=no", "valid boolean, got 'no'"),
        ("bf16=0", "valid boolean, got 0"),
        ("learning_rate='2e-4'", "valid number, got '2e-4'"),
        ("learning_rate=-1", "greater than or equal to 0, got -1"),
        ("num_train_epochs=0", "greater than 0, got 0"),
        ("max_steps=0", "expected at least 1, or -1 for no limit, got 0"),
        ("warmup_steps=1.5", "a whole number of steps, or a share of all steps below 1, got 1.5"),
        ("examples='4'", "valid integer, got '4'"),
        ("examples=4.0", "valid integer, got 4.0"),
        ("shared_prefix=1", "valid boolean, got 1"),
        ("train_file=[a.csv]", r"valid string, got \['a.csv'\]"),
        ("select_best={within: '0.1'}", "select_best: .*valid number"),
        ("label_smoothing_factor=1.5", "less than 1, got 1.5"),
    ],
)
def test_values_are_not_converted(tmp_path, override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path), [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["neftune_noise_alpha=5"],
            "neftune_noise_alpha: cannot be combined with shared_prefix: true: the noise depends",
        ),
        (["torch_compile=true"], "torch_compile: cannot be combined with shared_prefix: true"),
        (["answer=head", "loss_type=dft"], "loss_type: cannot be combined with answer: head"),
        (["answer=head", "label_smoothing_factor=0.1"], "label_smoothing_factor: cannot be combined with answer: head"),
    ],
)
def test_keys_that_would_mean_something_else_are_refused(tmp_path, overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path), overrides)
    if "shared_prefix" in message:
        assert load_recipe(write(tmp_path), [*overrides, "shared_prefix=false"]).shared_prefix is False


@pytest.mark.parametrize(
    ("overrides", "notice"),
    [
        (["eval_steps=5"], "'eval_steps=5': no effect, as eval_strategy is no: eval_steps"),
        (
            ["answer=head", "decode=free"],
            "'decode=free': no effect, as a classification head reads the text alone: decode",
        ),
        (["bnb_4bit_quant_type=fp4"], "'bnb_4bit_quant_type=fp4': no effect, as load_in_4bit is not set"),
        (["metric_for_best_model=f1"], "'metric_for_best_model=f1': no effect, as nothing is chosen by it"),
        (["save_strategy=no", "save_total_limit=3"], "'save_total_limit=3': no effect, as save_strategy is no"),
    ],
)
def test_keys_without_effect_are_warned_about(tmp_path, overrides, notice):
    notices = load_recipe(write(tmp_path), overrides).notices
    assert len(notices) == 1
    assert notices[0].startswith(notice)


def test_no_file_switches_on_the_code_of_others(tmp_path):
    path = write(tmp_path, "model_name_or_path: m\ntrain_file: t.csv\ntrust_remote_code: true\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml:3: trust_remote_code: a file cannot allow the code of others"):
        load_recipe(path)
    assert load_recipe(path, ["trust_remote_code=true"]).trusts_code
    assert not load_recipe(path, ["trust_remote_code=false"]).trusts_code


@pytest.mark.parametrize("modules", [["q_proj"], ["q_proj", "v_proj"]])
def test_a_list_of_modules_stays_a_list(tmp_path, modules):
    """peft takes a string for a pattern of whole paths, which matches no module of that name."""
    recipe = load_recipe(write(tmp_path), [f"lora_target_modules={modules}"])
    assert recipe.lm_config().lora_target_modules == modules
