"""Tokenizers: loaded with a pad token and a chat template, or reduced to plain text without special tokens."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from emogen.errors import InputError, ModelError
from emogen.model.sources import locate
from emogen.task.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For base models, which have no chat template: sections with headings. The end-of-text token ends each turn.
PLAIN_CHAT_TEMPLATE = (
    "{{ bos_token | default('') }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ '### Answer\n' + message.content + eos_token + '\n\n' }}"
    "{% elif message.role == 'system' %}{{ '### Instruction\n' + message.content + '\n\n' }}"
    "{% else %}{{ '### Input\n' + message.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Answer\n' }}{% endif %}"
)


def load_tokenizer(
    location: str, *, revision: str = "main", trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """Load a tokenizer and give it a pad token if it has none.

    Args:
        location: as returned by `sources.locate`.

    Raises:
        ModelError: it cannot be loaded, or it is not a fast tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises anything from OSError to KeyError here
        raise ModelError(f"{location}: the tokenizer cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise ModelError(f"{location}: only fast tokenizers are supported; tokenizer.json is missing")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_chat_tokenizer(recipe: Recipe, location: str | None = None) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a recipe's model, with a chat template.

    Args:
        location: where to load it from instead of the model, such as a trained adapter.

    Raises:
        ModelError: it cannot be loaded, or it is not a fast tokenizer.
    """
    revision = recipe.lm_args.get("model_revision", "main")
    location = location or locate(recipe.model_name, revision)
    tokenizer = load_tokenizer(location, revision=revision, trust_remote_code=recipe.trusts_code)
    ensure_chat_template(tokenizer)
    return tokenizer


def ensure_chat_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Give the tokenizer of a base model the plain chat template."""
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE


class PlainTokenizer:
    """A copy of a tokenizer that encodes plain text: without added tokens and without a post-processor."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        description |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self._tokenizer = Tokenizer.from_str(json.dumps(description))
        self._special = added_special_ids(tokenizer)

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, in which `<|im_end|>`, say, is ten characters.

        Raises:
            InputError: the tokenizer has a special token that it also makes of plain text.
        """
        # A lone surrogate (half an emoji, from a broken export) has no UTF-8 form.
        ids = self._tokenizer.encode(text.encode("utf-8", "replace").decode("utf-8"), add_special_tokens=False).ids
        if special := self._special.intersection(ids):
            raise InputError(f"the tokenizer turns this text into the special tokens {sorted(special)}: {text!r}")
        return list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def cut(self, ids: list[int], length: int) -> list[int]:
        """The first `length` ids, or a few less so that no character is cut in two."""
        if len(ids) <= length:
            return ids
        ids = ids[:length]
        while ids and self.decode(ids).endswith("\ufffd"):
            ids = ids[:-1]
        return ids


def added_special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def encode_texts(tokenizer: Any, texts: Sequence[str], max_length: int | None) -> dict[str, list[Any]]:
    """Encode texts without a prompt, for a classification head.

    Args:
        max_length: the limit in tokens, special tokens included; None for the limit of the tokenizer.

    Returns:
        `input_ids`, the token ids of each text; and `n_cut`, the number of tokens that were cut off each text.
    """
    # What looks like a special token in a text is split into characters.
    ids = tokenizer(list(texts), split_special_tokens=True)["input_ids"]
    limit = min(max_length or tokenizer.model_max_length, tokenizer.model_max_length)
    cut = [max(0, len(row) - limit) for row in ids]
    if any(cut):
        ids = tokenizer(list(texts), split_special_tokens=True, truncation=True, max_length=limit)["input_ids"]
    return {"input_ids": ids, "n_cut": cut}
