"""Tokenizers: loaded with a chat template and a pad token, and stripped of their special tokens for plain text."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from emogen.errors import InputError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(
    location: str, *, revision: str = "main", trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a located model, with a pad token.

    Raises:
        ModelError: it cannot be loaded, or it is not a fast tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises anything from OSError to KeyError here
        raise ModelError(f"{location}: its tokenizer cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise ModelError(f"{location}: only fast tokenizers are supported (a tokenizer.json is missing)")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# For base models, which have no chat template: sections under headings, each turn ended by the end-of-text token.
PLAIN_CHAT_TEMPLATE = (
    "{{ bos_token | default('') }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ '### Answer\n' + message.content + eos_token + '\n\n' }}"
    "{% elif message.role == 'system' %}{{ '### Instruction\n' + message.content + '\n\n' }}"
    "{% else %}{{ '### Input\n' + message.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Answer\n' }}{% endif %}"
)


def ensure_chat_template(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Give a base model's tokenizer the plain chat template. Returns whether it needed one."""
    if tokenizer.chat_template:
        return False
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    return True


class PlainTokenizer:
    """A tokenizer that knows no special tokens: a copy without its added tokens and without its post-processor."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        description |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self._tokenizer = Tokenizer.from_str(json.dumps(description))
        self._special = added_special_ids(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, character by character what it says. Raises InputError if one would be special."""
        # A lone surrogate (half an emoji, from a broken export) has no UTF-8 form.
        ids = self._tokenizer.encode(text.encode("utf-8", "replace").decode("utf-8"), add_special_tokens=False).ids
        if special := self._special.intersection(ids):
            raise InputError(f"the tokenizer turns this text into the special tokens {sorted(special)}: {text!r}")
        return list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def cut(self, ids: list[int], room: int) -> list[int]:
        """The first `room` ids, or a few less where that would end within a character."""
        if len(ids) <= room:
            return ids
        ids = ids[:room]
        while ids and self.decode(ids).endswith("\ufffd"):
            ids = ids[:-1]
        return ids


def added_special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def encode_texts(tokenizer: Any, texts: Sequence[str], max_length: int | None) -> dict[str, list[Any]]:
    """Token ids of each text, special ones added, cut to `max_length`; and by how many tokens each was cut."""
    # A text is text: what looks like a special token in it is split into characters.
    ids = tokenizer(list(texts), split_special_tokens=True)["input_ids"]
    limit = min(max_length or tokenizer.model_max_length, tokenizer.model_max_length)
    cut = [max(0, len(row) - limit) for row in ids]
    if any(cut):
        ids = tokenizer(list(texts), split_special_tokens=True, truncation=True, max_length=limit)["input_ids"]
    return {"input_ids": ids, "n_cut": cut}
