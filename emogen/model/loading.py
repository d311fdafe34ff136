"""Weights: the base model, its adapter or classification head; and the device that they are on."""

import logging
import os
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from trl import ModelConfig, get_peft_config, get_quantization_config

from emogen import accelerators, processes
from emogen.errors import ModelError
from emogen.model.plain_rows import problem
from emogen.model.pooled_head import PooledClassifier, pooled_config
from emogen.task.labels import LabelSet
from emogen.task.recipe import Recipe

log = logging.getLogger(__name__)

# The names that transformers gives to a classification head. It is never quantised, and always trained in full.
HEADS = ["score", "classifier"]


def load_model(location: str, config: ModelConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a base model, quantised to NF4 if `load_in_4bit` is set.

    The routers of a mixture of experts get no loss of their own: it would depend on the tokens that share a batch.

    Args:
        location: as returned by `sources.locate`.
        config: TRL's configuration of the model.

    Raises:
        ModelError: the model cannot be loaded, or is not a decoder.
    """
    try:
        declared = AutoConfig.from_pretrained(
            location, revision=config.model_revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise ModelError(f"{location}: the model cannot be loaded: {error}") from error
    if declared.is_encoder_decoder:
        raise ModelError(
            f"{location}: a model of type {declared.model_type} is an encoder with a decoder; emogen generates with a "
            "causal language model (a decoder alone)"
        )
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
    except Exception as error:  # transformers raises anything from OSError to KeyError here
        raise ModelError(f"{location}: the model cannot be loaded: {error}") from error
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        model.config.get_text_config().output_router_logits = False
    return model


def new_adapter(model: PreTrainedModel, config: ModelConfig, task_type: str = "CAUSAL_LM") -> PeftConfig | None:
    """The configuration of a new adapter for a model, tried on a copy of the model without weights.

    Where peft cannot do what the recipe says for this architecture, there is a warning.

    Args:
        task_type: `CAUSAL_LM` or `SEQ_CLS`, for which peft trains the head in full.

    Returns:
        The configuration; None if the model is tuned in full.

    Raises:
        ModelError: peft cannot add such an adapter to the model.
    """
    wanted = get_peft_config(config)
    if wanted is None:
        return None
    wanted.task_type = task_type
    unusual = _unusual_layers(model)
    if unusual:
        wanted.exclude_modules = unusual
        log.warning(f"no LoRA on {', '.join(unusual)} of this {model.config.model_type} model: not linear layers")
    without_dropout = deepcopy(wanted)
    without_dropout.lora_dropout = 0.0
    without_state_space = deepcopy(wanted)
    without_state_space.exclude_modules = [*unusual, "out_proj", "conv1d"]
    reason = refusal = _adapter_refusal(model, wanted)
    for changed, what in [
        (without_dropout, f"lora_dropout: 0 instead of {wanted.lora_dropout:g}"),
        (without_state_space, "no LoRA on out_proj and conv1d of its state-space layers"),
    ]:
        if reason is None:
            break
        reason = _adapter_refusal(model, changed)
        if reason is None:
            log.warning(f"{what} for this {model.config.model_type} model, because peft refuses it: {refusal}")
            wanted = changed
    if reason:
        raise ModelError(
            f"LoRA cannot be added to this {model.config.model_type} model ({refusal}); name other "
            "lora_target_modules, or set use_peft: false"
        )
    return wanted


def _unusual_layers(model: PreTrainedModel) -> list[str]:
    """The names of an architecture's own linear layers that LoRA breaks, because they do not return a plain product.

    Such are the routers of Llama 4, which return a pair, and grouped layers.
    """
    names: list[str] = []
    is_plain: dict[type, bool] = {}
    for path, module in model.named_modules():
        kind, name = type(module), path.rpartition(".")[2]
        if not isinstance(module, torch.nn.Linear) or not kind.__module__.startswith("transformers.models"):
            continue
        if kind not in is_plain:
            is_plain[kind] = _returns_product(module)
        if not is_plain[kind] and name not in names:
            names.append(name)
    return names


def _returns_product(layer: torch.nn.Linear) -> bool:
    try:
        with torch.no_grad():
            product = layer(layer.weight.new_zeros(1, layer.in_features))
    except Exception:  # whatever a layer raises, it does not take what a linear layer takes
        return False
    return isinstance(product, torch.Tensor) and product.shape == (1, layer.out_features)


def _adapter_refusal(model: PreTrainedModel, config: PeftConfig) -> str | None:
    """Why peft refuses to add an adapter to a model, or None."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copy = type(model)(deepcopy(model.config))
        try:
            get_peft_model(copy, deepcopy(config))
        except Exception as error:  # peft raises anything from ValueError to AttributeError here
            return problem(error)
    return None


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
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")  # they would stay untrained
            return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except Exception as error:
        raise ModelError(f"{folder}: the adapter cannot be loaded: {error}") from error


def load_head_model(location: str, recipe: Recipe, label_set: LabelSet, tokenizer: Any) -> Any:
    """Load a model with a classification head of L outputs. The head is new unless the weights contain one.

    A sentence encoder gets a head on its pooled tokens, other models the head that transformers has for them.

    Raises:
        ModelError: the model cannot be loaded, or its architecture has no such head.
    """
    config = recipe.lm_config()
    quantization = get_quantization_config(config)
    if quantization is not None:
        quantization.llm_int8_skip_modules = HEADS
    outputs = {
        "num_labels": len(label_set),
        "id2label": dict(enumerate(label_set.names)),
        "label2id": {name: i for i, name in enumerate(label_set.names)},
        "problem_type": "single_label_classification" if label_set.exactly_one else "multi_label_classification",
    }
    try:
        pooled = pooled_config(location, config.model_revision, trust_remote_code=recipe.trusts_code, **outputs)
        kind = AutoModelForSequenceClassification if pooled is None else PooledClassifier
        model = kind.from_pretrained(
            location,
            revision=config.model_revision,
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
            quantization_config=quantization,
            use_safetensors=True,
            **(outputs | {"trust_remote_code": recipe.trusts_code} if pooled is None else {"config": pooled}),
        )
    except ModelError:
        raise
    except Exception as error:  # transformers raises anything from OSError to KeyError here
        raise ModelError(f"{location}: the model cannot be loaded with a head: {error}") from error
    # A decoder classifies a row by its last token, and needs the padding token to find it.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model


def to_device(model: PreTrainedModel) -> PreTrainedModel:
    """Move a model to the accelerator of this process, if there is one. A quantised model is there already."""
    device = accelerators.own_device()
    if device.type != "cpu" and not getattr(model, "is_quantized", False):
        model.to(device)
    return model


def use_all_cores() -> None:
    """Use every core if this is the only process, without an accelerator; `accelerate launch` would set one thread."""
    if not torch.accelerator.is_available() and processes.world_size() == 1:
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(min(allowed or 1, int(os.environ.get(processes.CORES, allowed or 1))))
