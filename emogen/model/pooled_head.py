"""A classification head on a sentence encoder, which pools the tokens as the encoder was trained to.

transformers gives BERT and its kin a head on their first token, behind a layer of its own. A sentence encoder never
trained that layer: its meaning is in the average of the tokens, as its `1_Pooling/config.json` says (the format of
Sentence Transformers, Reimers and Gurevych 2019, arXiv 1908.10084).
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.hub import cached_file

from emogen.errors import ModelError

POOLING = "1_Pooling/config.json"
_SUPPORTED = {"mean", "cls"}
_OF_DECODERS = "lasttoken"  # transformers' own head for decoders reads the last token


class PooledClassifier(PreTrainedModel):
    """An encoder, its tokens pooled, and a linear layer of L outputs.

    Its configuration is that of the encoder, with `pooling`, `mean` or `cls`.
    """

    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _keys_to_ignore_on_load_unexpected = (r"pooler",)

    def __init__(self, config: PretrainedConfig):
        encoder = MODEL_MAPPING[type(config)]
        for able in ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn"):  # the encoder attends
            setattr(self, able, getattr(encoder, able))
        super().__init__(config)
        self.encoder = AutoModel.from_config(config)
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None
        self.dropout = nn.Dropout(getattr(config, "hidden_dropout_prob", 0.0))
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **more: torch.Tensor
    ) -> SequenceClassifierOutput:
        """The logits of each text, [n, L].

        Args:
            input_ids: [n, tokens].
            attention_mask: [n, tokens], 0 for padding.
            more: other inputs of the encoder.
        """
        pooled = self.pool(input_ids, attention_mask, **more)
        return SequenceClassifierOutput(logits=self.score(self.dropout(pooled)))

    def pool(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        """The pooled tokens of each text, [n, width]. Arguments are those of `forward`."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state
        if self.config.pooling == "cls":
            return hidden[:, 0]
        kept = attention_mask.unsqueeze(2).to(hidden.dtype)
        return (hidden * kept).sum(1) / kept.sum(1)


def pooled_config(location: str, revision: str, *, trust_remote_code: bool, **values: Any) -> PretrainedConfig | None:
    """The configuration for a `PooledClassifier`; None for a model that does not say how it is pooled.

    Args:
        location: as returned by `sources.locate`, or the folder of a trained `PooledClassifier`.
        values: what the configuration says beside, such as `num_labels`.

    Raises:
        ModelError: the model is pooled in another way.
    """
    config = AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=trust_remote_code, **values)
    trained = config.architectures or []
    if trained == [PooledClassifier.__name__]:
        return config
    if any(name.endswith("ForSequenceClassification") for name in trained):
        return None
    file = _pooling_file(location, revision)
    if file is None:
        return None
    modes = _modes(json.loads(file.read_text(encoding="utf-8")))
    if modes == {_OF_DECODERS}:
        return None
    if len(modes) != 1 or not modes <= _SUPPORTED:
        raise ModelError(
            f"{location}: {POOLING} pools by {' and '.join(sorted(modes)) or 'nothing'}; emogen knows "
            f"{' and '.join(sorted(_SUPPORTED))}"
        )
    config.pooling = modes.pop()
    return config


def _modes(settings: dict[str, Any]) -> set[str]:
    """The ways of pooling that a configuration switches on; newer ones name them in `pooling_mode`."""
    if named := settings.get("pooling_mode"):
        return {named} if isinstance(named, str) else set(named)
    names = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max"}
    on = {key.removeprefix("pooling_mode_") for key, value in settings.items() if value is True and "_mode_" in key}
    return {names.get(mode, mode) for mode in on}


def _pooling_file(location: str, revision: str) -> Path | None:
    folder = Path(location)
    if folder.is_dir() and folder.parent.name != "snapshots":
        return folder / POOLING if (folder / POOLING).is_file() else None
    if folder.is_dir():  # of the Hub's cache, where files come one by one
        location, revision = folder.parents[1].name.removeprefix("models--").replace("--", "/"), folder.name
    found = cached_file(
        location, POOLING, revision=revision,
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return Path(found) if found else None
