"""Weights: the base model, its adapter or classification head; and the device that they are on."""

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from trl import ModelConfig, get_quantization_config

from emogen import processes
from emogen.errors import ModelError
from emogen.task.labels import LabelSet
from emogen.task.recipe import Recipe

# The names that transformers gives to a classification head. It is never quantised, and always trained in full.
HEADS = ["score", "classifier"]


def load_model(location: str, config: ModelConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a base model, quantised to NF4 if `load_in_4bit` is set.

    Args:
        location: as returned by `sources.locate`.
        config: TRL's configuration of the model.

    Raises:
        ModelError: the model cannot be loaded.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(
            location,
            revision=config.model_revision,
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
            quantization_config=get_quantization_config(config),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    except Exception as error:  # transformers raises anything from OSError to KeyError here
        raise ModelError(f"{location}: the model cannot be loaded: {error}") from error


def load_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PreTrainedModel:
    """Add a trained adapter to a base model.

    Args:
        trainable: whether to train it further; otherwise it is for inference.

    Raises:
        ModelError: the folder has no adapter, or the adapter does not fit the model.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"{folder}: not an adapter: adapter_model.safetensors is missing")
    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except Exception as error:
        raise ModelError(f"{folder}: the adapter cannot be loaded: {error}") from error


def load_head_model(location: str, recipe: Recipe, label_set: LabelSet, tokenizer: Any) -> Any:
    """Load a model with a classification head of L outputs. The head is new unless the weights contain one.

    Raises:
        ModelError: the model cannot be loaded, or its architecture has no such head.
    """
    config = recipe.lm_config()
    quantization = get_quantization_config(config)
    if quantization is not None:
        quantization.llm_int8_skip_modules = HEADS
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            location,
            revision=config.model_revision,
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
            quantization_config=quantization,
            trust_remote_code=recipe.trusts_code,
            use_safetensors=True,
            num_labels=len(label_set),
            id2label=dict(enumerate(label_set.names)),
            label2id={name: i for i, name in enumerate(label_set.names)},
            problem_type="single_label_classification" if label_set.exactly_one else "multi_label_classification",
        )
    except Exception as error:  # transformers raises anything from OSError to KeyError here
        raise ModelError(f"{location}: the model cannot be loaded with a head: {error}") from error
    # A decoder classifies a row by its last token, and needs the padding token to find it.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model


def use_own_gpu() -> None:
    """Select the GPU of this process, which may be one of several on a machine."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def to_device(model: PreTrainedModel) -> PreTrainedModel:
    """Move a model to the GPU, if there is one. A quantised model is there already."""
    if torch.cuda.is_available() and not getattr(model, "is_quantized", False):
        model.to("cuda")
    return model


def use_all_cores() -> None:
    """Use every core if this is the only process and there is no GPU; `accelerate launch` would set one thread."""
    if not torch.cuda.is_available() and processes.world_size() == 1:
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(allowed or 1)
