"""Tokenizers: loaded with a pad token and a chat template, or reduced to plain text without special tokens."""

import json
import re
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


# A noncharacter of Unicode, which is reserved for use within a program. No text keeps one.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


class PlainTokenizer:
    """A copy of a tokenizer in which control tokens have private names, so that no text contains one.

    It encodes a whole chat as the tokenizer itself does, without a post-processor. In `protect(template) +
    clean(text)`, the control tokens of the template are control tokens, and those of the text are characters. All added
    tokens are control tokens, except for words and white space that are not special.

    Attributes:
        unk_id: the token for what the vocabulary cannot spell, which texts may contain; None if there is none.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        description |= {"post_processor": None, "truncation": None, "padding": None}
        added = description["added_tokens"]
        self._special_ids = added_special_ids(tokenizer) | set(tokenizer.all_special_ids)
        self._control = {token["content"]: token | {"name": f"{_OPEN}{k}{_CLOSE}"} for k, token in enumerate(added)}
        for token in added:
            if _is_text(token) and token["id"] not in self._special_ids:
                del self._control[token["content"]]
        _hide(description["model"], self._control)
        ids = {token["content"]: token["id"] for token in added}
        description["added_tokens"] = [
            token | {"content": self._control[token["content"]]["name"], "normalized": False, "single_word": False}
            if token["content"] in self._control
            else token
            for token in added
        ]
        self._tokenizer = Tokenizer.from_str(json.dumps(description))
        # The copy numbers its added tokens anew.
        names = {content: self._control.get(content, {"name": content})["name"] for content in ids}
        self._id_of = {self._tokenizer.token_to_id(name): ids[content] for content, name in names.items()}
        self.unk_id = _unk_id(description["model"])
        self._forbidden = self._special_ids - {self.unk_id}

    def protect(self, template: str) -> str:
        """Text that a chat template has written, with the private names of its control tokens."""
        found = sorted((content for content in self._control if content in template), key=len, reverse=True)
        if not found:
            return clean(template)
        patterns = (
            rf"(?<!\w){re.escape(content)}(?!\w)" if self._control[content]["single_word"] else re.escape(content)
            for content in found
        )
        return re.sub("|".join(patterns), lambda match: self._control[match[0]]["name"], clean(template))

    def reveal(self, protected: str) -> str:
        """The inverse of `protect`."""
        for content, token in self._control.items():
            protected = protected.replace(token["name"], content)
        return protected

    def is_special(self, protected: str) -> bool:
        """Whether a protected text is a single special token."""
        return self._id_of.get(self._tokenizer.token_to_id(protected)) in self._special_ids

    def encode(self, protected: str) -> list[int]:
        """The token ids of a text, protected or clean.

        Raises:
            InputError: the tokenizer has a special token that it also makes of plain text.
        """
        return self.encode_with_starts(protected)[0]

    def encode_with_starts(self, protected: str) -> tuple[list[int], list[int]]:
        """The token ids of a text, as `encode`; and for each the position of its first character."""
        encoding = self._tokenizer.encode(protected, add_special_tokens=False)
        if special := self._forbidden.intersection(encoding.ids):
            raise InputError(f"the tokenizer turns this text into the special tokens {sorted(special)}: {protected!r}")
        return [self._id_of.get(i, i) for i in encoding.ids], [start for start, _ in encoding.offsets]


def clean(text: str) -> str:
    """A text as it can be encoded: half an emoji from a broken export becomes `?`, a noncharacter U+FFFD."""
    return text.encode("utf-8", "replace").decode("utf-8").replace(_OPEN, "\ufffd")


def control_tokens(protected: str) -> list[tuple[int, int]]:
    """The positions of the control tokens in a protected text: (first character, character after the last)."""
    return [match.span() for match in re.finditer(f"{_OPEN}\\d+{_CLOSE}", protected)]


def _is_text(token: dict[str, Any]) -> bool:
    """Whether an added token is a word or white space that texts may contain."""
    return not token["special"] and all(c.isalnum() or c.isspace() or c == "▁" for c in token["content"])


def _unk_id(model: dict[str, Any]) -> int | None:
    """The token of a model for what its vocabulary cannot spell. Texts may contain it."""
    if model["type"] == "Unigram":
        return model.get("unk_id")
    return model["vocab"].get(model.get("unk_token"))


def _hide(model: dict[str, Any], control: dict[str, dict[str, Any]]) -> None:
    """Rename the control tokens in the vocabulary of a model that looks up whole words or pieces in it."""
    hidden = {content: f"{token['name']}." for content, token in control.items()}
    vocab, unk_id = model["vocab"], _unk_id(model)
    if model["type"] == "Unigram":
        model["vocab"] = [[p if k == unk_id else hidden.get(p, p), score] for k, (p, score) in enumerate(vocab)]
    elif model["type"] != "BPE" or model.get("ignore_merges"):
        # What merges make of plain text cannot be renamed.
        made = {
            merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in model.get("merges", ())
        }
        model["vocab"] = {p if i == unk_id or p in made else hidden.get(p, p): i for p, i in vocab.items()}


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
