"""Tokenizers: read with a chat template, or reduced to plain text without special tokens.

transformers and torch take seconds to import, and a prompt is looked at often. So what emogen needs of a tokenizer is
remembered when transformers has loaded it once.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from emogen.errors import InputError, ModelError
from emogen.memo import remembered
from emogen.model.sources import TOKENIZER_FILES, locate, locate_tokenizer
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
    """Load the tokenizer of a recipe's model, with a chat template, for the libraries that train with it.

    Args:
        location: where to load it from; by default where the model is.

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


@dataclass(frozen=True)
class TextTokenizer:
    """What emogen needs of a tokenizer.

    Attributes:
        name: where it comes from, for messages.
        special_ids: the ids of its special tokens.
        added_tokens: its tokens that are not made of the vocabulary, as `tokenizers` describes them.
        unk_id: the token for what the vocabulary cannot spell; None if there is none.
        special_tokens: what chat templates see, such as `bos_token`.
        chat_template: the source of its chat template; empty for a base model.
        pad_token_id: the token that fills up rows.
        model_max_length: the limit in tokens that it declares.
        truncation_side: `right` or `left`, the end at which texts are cut.
        read_backend: reads its description by the library `tokenizers`, JSON.
        read_plain: reads that of its `PlainTokenizer`.
    """

    name: str
    special_ids: frozenset[int]
    added_tokens: list[dict[str, Any]] = field(repr=False)
    unk_id: int | None
    special_tokens: dict[str, Any]
    chat_template: str
    pad_token_id: int
    model_max_length: int
    truncation_side: str
    read_backend: Callable[[], str] = field(repr=False)
    read_plain: Callable[[], str] = field(repr=False)

    @staticmethod
    def of(tokenizer: "PreTrainedTokenizerBase") -> "TextTokenizer":
        """The tokenizer that transformers has loaded.

        Raises:
            ModelError: it has several chat templates, and none of them is the default.
        """
        backend = _backend(tokenizer)
        facts = _facts(tokenizer, backend)
        return TextTokenizer(
            **facts | {"name": tokenizer.name_or_path, "special_ids": frozenset(facts["special_ids"])},
            read_backend=lambda: backend,
            read_plain=lambda: _plain_backend(backend, facts),
        )

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(self.read_backend())

    @cached_property
    def plain(self) -> "PlainTokenizer":
        """The copy for texts that are not trusted."""
        return PlainTokenizer(self)

    @property
    def eos_token(self) -> str | None:
        """The end-of-text token."""
        return self.special_tokens.get("eos_token")

    def encode(self, chat: str) -> list[int]:
        """The token ids of a whole chat, in which control tokens are control tokens."""
        return list(self._tokenizer.encode(chat, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def encode_texts(self, texts: Sequence[str], max_length: int | None) -> dict[str, list[Any]]:
        """Encode texts without a prompt, for a classification head.

        What looks like a special token in a text is split into characters. A symbol that the vocabulary lacks, such as
        an emoji, is spelt out by its Unicode name: it would be unknown, and so would be the word that it touches.

        A text without tokens, such as an empty one, is encoded as a blank: a model reads one token or more.

        Args:
            max_length: the limit in tokens, special tokens included; None for the limit of the tokenizer.

        Returns:
            `input_ids`, the token ids of each text; and `n_cut`, the number of tokens that were cut off each text.
        """
        tokenizer = Tokenizer.from_str(self.read_backend())
        tokenizer.encode_special_tokens = True
        if self.unk_id is not None:
            texts = _spell_out_symbols(tokenizer, self.unk_id, texts)
        ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
        limit = min(max_length or self.model_max_length, self.model_max_length)
        cut = [max(0, len(row) - limit) for row in ids]
        if any(cut):
            tokenizer.enable_truncation(limit, direction=self.truncation_side)
            ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
        return {"input_ids": [row or tokenizer.encode(" ").ids for row in ids], "n_cut": cut}


def _spell_out_symbols(tokenizer: Tokenizer, unk_id: int, texts: Sequence[str]) -> list[str]:
    """Texts with the names of the symbols that a tokenizer does not know. An emoji's skin tone is left out."""
    symbols = {c for c in set().union(*texts) if unicodedata.category(c) in ("So", "Sk")}
    unknown = {c for c in symbols if unk_id in tokenizer.encode(c, add_special_tokens=False).ids}
    names = {ord(c): f" {unicodedata.name(c, c).lower()} " if unicodedata.category(c) == "So" else " " for c in unknown}
    return [text.translate(names) for text in texts]


def _backend(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The description of a tokenizer, without what transformers has switched on for its last texts."""
    return json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None})


def _facts(tokenizer: "PreTrainedTokenizerBase", backend: str) -> dict[str, Any]:
    """The attributes of a `TextTokenizer` as JSON values, but for its name and its descriptions."""
    template = tokenizer.chat_template or ""
    if isinstance(template, dict):
        if "default" not in template:
            names = ", ".join(sorted(template))
            raise ModelError(f"{tokenizer.name_or_path}: has the chat templates {names}, and none is the default")
        template = template["default"]
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    description = json.loads(backend)
    return {
        "special_ids": sorted(added | set(tokenizer.all_special_ids)),
        "added_tokens": description["added_tokens"],
        "unk_id": _unk_id(description["model"]),
        "special_tokens": dict(tokenizer.special_tokens_map),
        "chat_template": template,
        "pad_token_id": tokenizer.pad_token_id,
        "model_max_length": tokenizer.model_max_length,
        "truncation_side": tokenizer.truncation_side,
    }


def _plain_backend(backend: str, facts: dict[str, Any]) -> str:
    """The description of a tokenizer without a post-processor, in which control tokens have private names."""
    description = json.loads(backend) | {"post_processor": None}
    names = _control_names(facts["added_tokens"], set(facts["special_ids"]))
    _hide(description["model"], names)
    description["added_tokens"] = [
        token | {"content": names[token["content"]], "normalized": False, "single_word": False}
        if token["content"] in names
        else token
        for token in facts["added_tokens"]
    ]
    return json.dumps(description)


def read_tokenizer(location: str, *, revision: str = "main", trust_remote_code: bool = False) -> TextTokenizer:
    """Read a tokenizer, without transformers if it has been read before.

    Args:
        location: as returned by `sources.locate` or `sources.locate_tokenizer`.

    Raises:
        ModelError: it cannot be loaded, or it is not a fast tokenizer.
    """

    @cache
    def load() -> "PreTrainedTokenizerBase":
        return load_tokenizer(location, revision=revision, trust_remote_code=trust_remote_code)

    folder = Path(location)
    if trust_remote_code or not folder.is_dir():  # code of others may do anything; a name on the Hub may be renewed
        return TextTokenizer.of(load())
    known, packages = _digests(folder), ("transformers", "tokenizers")

    @cache
    def backend() -> str:
        text = remembered("tokenizers", known, lambda: _backend(load()), packages=packages, is_text=True)
        return str(text)

    facts = remembered("tokenizer-facts", known, lambda: _facts(load(), backend()), packages=packages)

    def plain() -> str:
        text = remembered(
            "plain-tokenizers", known, lambda: _plain_backend(backend(), facts), packages=packages, is_text=True
        )
        return str(text)

    return TextTokenizer(
        **facts | {"name": location, "special_ids": frozenset(facts["special_ids"])},
        read_backend=backend,
        read_plain=plain,
    )


def _digests(folder: Path) -> dict[str, str]:
    """The digests of the files that a tokenizer is read from."""
    files = [path for path in folder.iterdir() if any(fnmatch(path.name, pattern) for pattern in TOKENIZER_FILES)]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def read_chat_tokenizer(recipe: Recipe, location: str | None = None) -> TextTokenizer:
    """Read the tokenizer of a recipe's model, with a chat template: that of a base model is the plain one.

    Args:
        location: where to read it from instead of the model, such as a trained adapter.

    Raises:
        ModelError: it cannot be loaded, or it is not a fast tokenizer.
    """
    revision = recipe.lm_args.get("model_revision", "main")
    location = location or locate_tokenizer(recipe.model_name, revision)
    tokenizer = read_tokenizer(location, revision=revision, trust_remote_code=recipe.trusts_code)
    return tokenizer if tokenizer.chat_template else replace(tokenizer, chat_template=PLAIN_CHAT_TEMPLATE)


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

    def __init__(self, tokenizer: TextTokenizer):
        self._tokenizer = Tokenizer.from_str(tokenizer.read_plain())
        self._special_ids = tokenizer.special_ids
        self._names = _control_names(tokenizer.added_tokens, tokenizer.special_ids)
        self._single_words = {token["content"] for token in tokenizer.added_tokens if token["single_word"]}
        # The copy numbers its added tokens anew.
        self._id_of = {
            self._tokenizer.token_to_id(self._names.get(token["content"], token["content"])): token["id"]
            for token in tokenizer.added_tokens
        }
        self.unk_id = tokenizer.unk_id
        self._forbidden = self._special_ids - {self.unk_id}

    def protect(self, template: str) -> str:
        """Text that a chat template has written, with the private names of its control tokens."""
        found = sorted((content for content in self._names if content in template), key=len, reverse=True)
        if not found:
            return clean(template)
        patterns = (
            rf"(?<!\w){re.escape(content)}(?!\w)" if content in self._single_words else re.escape(content)
            for content in found
        )
        return re.sub("|".join(patterns), lambda match: self._names[match[0]], clean(template))

    def reveal(self, protected: str) -> str:
        """The inverse of `protect`."""
        for content, name in self._names.items():
            protected = protected.replace(name, content)
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


def _control_names(added_tokens: Sequence[dict[str, Any]], special_ids: Set[int]) -> dict[str, str]:
    """The private names of control tokens, by their contents."""
    return {
        token["content"]: f"{_OPEN}{k}{_CLOSE}"
        for k, token in enumerate(added_tokens)
        if token["id"] in special_ids or not _is_text(token)
    }


def _is_text(token: dict[str, Any]) -> bool:
    """Whether an added token is a word or white space that texts may contain."""
    return not token["special"] and all(c.isalnum() or c.isspace() or c == "▁" for c in token["content"])


def _unk_id(model: dict[str, Any]) -> int | None:
    """The token of a model for what its vocabulary cannot spell. Texts may contain it."""
    if model["type"] == "Unigram":
        return model.get("unk_id")
    return model["vocab"].get(model.get("unk_token"))


def _hide(model: dict[str, Any], names: dict[str, str]) -> None:
    """Rename the control tokens in the vocabulary of a model that looks up whole words or pieces in it."""
    hidden = {content: f"{name}." for content, name in names.items()}
    vocab, unk_id = model["vocab"], _unk_id(model)
    if model["type"] == "Unigram":
        model["vocab"] = [[p if k == unk_id else hidden.get(p, p), score] for k, (p, score) in enumerate(vocab)]
    elif model["type"] != "BPE" or model.get("ignore_merges"):
        # What merges make of plain text cannot be renamed.
        made = {
            merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in model.get("merges", ())
        }
        model["vocab"] = {p if i == unk_id or p in made else hidden.get(p, p): i for p, i in vocab.items()}
