"""Sentence encoders as they are, without training: texts -> embeddings."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import DataCollatorWithPadding
from transformers.utils import logging as hf_logging

from emogen.errors import ModelError
from emogen.model.decode import in_batches
from emogen.model.loading import to_device
from emogen.model.plain_rows import evaluating
from emogen.model.pooled_head import POOLING, PooledClassifier, pooled_config
from emogen.model.sources import locate
from emogen.model.tokenizer import TextTokenizer, load_tokenizer

BATCH_SIZE = 32


@cache
def encoder_features(name: str) -> Callable[[Sequence[str]], np.ndarray]:
    """The embeddings of a sentence encoder: its tokens pooled as it was trained to be, at unit length.

    Args:
        name: a name on the Hub, such as sentence-transformers/all-MiniLM-L6-v2, or a folder. The encoder is loaded
            once, and its repository's own code never runs.

    Returns:
        A function from n texts to float32 [n, d]. Texts are cut to the limit of the encoder.

    Raises:
        ModelError: the encoder cannot be loaded, or does not say how it is pooled.
    """
    tokenizer, model = _load(name)
    text_tokenizer, collate = TextTokenizer.of(tokenizer), DataCollatorWithPadding(tokenizer)

    def step(batch: list[list[int]]) -> Sequence[np.ndarray]:
        inputs = collate([{"input_ids": ids} for ids in batch]).to(model.device)
        return functional.normalize(model.pool(**inputs).float()).cpu().numpy()

    @torch.inference_mode()
    def embed(texts: Sequence[str]) -> np.ndarray:
        rows = text_tokenizer.encode_texts(list(texts), None)["input_ids"]
        with evaluating(model):
            vectors = in_batches(step, rows, BATCH_SIZE, None)
        return np.array(vectors, dtype=np.float32).reshape(len(texts), model.config.hidden_size)

    return embed


def _load(name: str) -> tuple[Any, PooledClassifier]:
    location = locate(name)
    tokenizer = load_tokenizer(location)
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # transformers would report that the encoder has no head; none is used
    try:
        config = pooled_config(location, "main", trust_remote_code=False)
        if config is None:
            raise ModelError(f"{name}: not a sentence encoder: it has no {POOLING}, which says how tokens are pooled")
        model = PooledClassifier.from_pretrained(location, config=config, dtype=torch.float32, use_safetensors=True)
    except ModelError:
        raise
    except Exception as error:  # transformers raises anything from OSError to KeyError here
        raise ModelError(f"{name}: the encoder cannot be loaded: {error}") from error
    finally:
        hf_logging.set_verbosity(verbosity)
    return tokenizer, to_device(model)
