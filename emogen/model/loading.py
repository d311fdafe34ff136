"""Weights: the base model, an adapter on it, a classification head; and the device that they run on."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from trl import ModelConfig, get_quantization_config

from emogen import processes
from emogen.errors import ModelError
from emogen.task.labels import LabelSet
from emogen.task.recipe import Recipe


def load_model(location: str, config: ModelConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The base model of a located name, quantised to NF4 where `load_in_4bit` asks for it.

    Raises:
        ModelError: it cannot be loaded.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            location,
            revision=config.model_revision,
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
            quantization_config=get_quantization_config(config),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    except Exception as error:  # as above; a broken file and a missing one differ only in the text
        raise ModelError(f"{location}: the model cannot be loaded: {error}") from error
    return model


def load_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PreTrainedModel:
    """A base model with a trained adapter on it, for inference or to train it further.

    Raises:
        ModelError: the folder holds no adapter, or one that does not fit the model.
    """
    from peft import PeftModel

    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"{folder}: no adapter here (adapter_model.safetensors is missing)")
    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except Exception as error:
        raise ModelError(f"{folder}: the adapter cannot be loaded: {error}") from error


HEADS = ["score", "classifier"]  # what transformers calls the head; it is never quantised, and always trained


def load_head_model(location: str, recipe: Recipe, label_set: LabelSet, tokenizer: Any) -> Any:
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
            problem_type="multi_label_classification",
        )
    except Exception as error:  # transformers raises anything from OSError to KeyError here
        raise ModelError(f"{location}: the model cannot be loaded with a head: {error}") from error
    # Decoders read a row at its last token that is no padding, and have to know which that is.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model


def use_own_gpu() -> None:
    """Let this process, which may be one of several on a machine, use the GPU that is meant for it."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def to_device(model: PreTrainedModel) -> PreTrainedModel:
    """Move a model to the GPU if there is one. A quantised model is there already."""
    if torch.cuda.is_available() and not getattr(model, "is_quantized", False):
        model.to("cuda")
    return model


def use_all_cores() -> None:
    """Let one process on a machine without a GPU use every core: `accelerate launch` would give it a single thread."""
    import torch

    if not torch.cuda.is_available() and processes.world_size() == 1:
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(allowed or 1)
