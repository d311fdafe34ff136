"""A run with its adapter merged into the base model, as a run folder that plain transformers can load.

FOLDER/model/      config.json, *.safetensors in the base model's own dtype, the tokenizer with its chat template
FOLDER/            recipe.yaml, prompt.jinja, labels.yaml, examples.jsonl, thresholds.json, manifest.json, README.md,
                   export.json
"""

import shutil
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig
from trl import ModelConfig

from emogen import paths
from emogen.evaluation.run_folder import (
    ADAPTER,
    CARD,
    LABELS,
    MODEL,
    PROMPT,
    RECIPE,
    RUN,
    THRESHOLDS,
    read_manifest,
    read_recipe,
    write_manifest,
)
from emogen.model.loading import load_adapter, load_head_model, load_model
from emogen.model.sources import locate
from emogen.model.tokenizer import ensure_chat_template, load_tokenizer
from emogen.prediction.weights import BASE, check_weights, hash_weights
from emogen.task.labels import LabelSet
from emogen.task.recipe import Recipe
from emogen.task.task import EXAMPLES

# Keys of the recipe that say how the base model was quantised, or where files of this machine are.
_LEFT_OUT = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage", "output_dir", "init_adapter")


def write_merged(run: Path, folder: Path, *, force: bool = False) -> None:
    """Merge the adapter of a run, and write what `emogen predict` and transformers need.

    A base model that was quantised for training is merged in its own, unquantised weights. A head that was tuned in
    full is copied: there is nothing to merge.

    Args:
        run: a finished run.
        folder: a new folder.
        force: see `check_weights`.

    Raises:
        InputError: its weights were changed.
        ModelError: the model cannot be loaded.
    """
    recipe, label_set = read_recipe(run)
    if (run / MODEL).is_dir():
        check_weights(run, None, force=force)
        shutil.copytree(run / MODEL, folder / MODEL)
    else:
        _merge(run, folder, recipe, label_set, force)
    for name in (PROMPT, LABELS, EXAMPLES, THRESHOLDS):
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)
    _write_recipe(recipe, folder)
    before = read_manifest(run)
    digests = {name: digest for name, digest in before["sha256"].items() if name != BASE}
    write_manifest(
        folder, RUN, model=recipe.model_name, seed=recipe.seed, sha256=digests, weights=hash_weights(folder),
        exported_from=before.get("weights", {}),
    )  # fmt: skip
    if (run / CARD).is_file():
        shutil.copyfile(run / CARD, folder / CARD)


def _merge(run: Path, folder: Path, recipe: Recipe, label_set: LabelSet, force: bool) -> None:
    location = locate(recipe.model_name, recipe.lm_args.get("model_revision", "main"))
    check_weights(run, location, force=force)
    dtype = _own_dtype(location, recipe)
    tokenizer = load_tokenizer(str(run / ADAPTER), trust_remote_code=recipe.trusts_code)
    if recipe.answer == "head":
        plain = recipe.model_copy(update={"lm_args": recipe.lm_args | _unquantised(dtype)})
        model = load_head_model(location, plain, label_set, tokenizer)
    else:
        ensure_chat_template(tokenizer)
        config = ModelConfig(**{**recipe.lm_args, **_unquantised(dtype)} | {"lora_target_modules": None})
        model = load_model(location, config, trust_remote_code=recipe.trusts_code)
    merged = load_adapter(model, run / ADAPTER).merge_and_unload(safe_merge=True)
    merged.save_pretrained(folder / MODEL)
    tokenizer.save_pretrained(folder / MODEL)


def _own_dtype(location: str, recipe: Recipe) -> str:
    """The precision in which the base model was published."""
    declared = AutoConfig.from_pretrained(location, trust_remote_code=recipe.trusts_code)
    return str(getattr(declared, "dtype", None) or torch.float32).removeprefix("torch.")


def _unquantised(dtype: str) -> dict[str, object]:
    return {"load_in_4bit": False, "load_in_8bit": False, "dtype": dtype}


def _write_recipe(recipe: Recipe, folder: Path) -> None:
    dtype = _own_dtype(str(folder / MODEL), recipe)
    values = yaml.safe_load(recipe.to_yaml(prompt=PROMPT, labels=LABELS, resume_from_checkpoint=None))
    values |= _unquantised(dtype) | ({"use_peft": False} if recipe.answer == "head" else {})
    kept = {key: value for key, value in values.items() if key not in _LEFT_OUT}
    with paths.writing(folder / RECIPE) as file:
        file.write(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))
