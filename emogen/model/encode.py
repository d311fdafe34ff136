"""Chat -> token ids with the supervised part marked, and the audit of what was cut.

A row is `prefix | text | question | answer`. The prefix (all that precedes the row's own text) is the same for every
row of a run, which is what shared-prefix training and decoding live on. Prompt and answer are encoded piece by piece,
so a text can never become a special token, and no token straddles a boundary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from emogen.errors import InputError, ModelError
from emogen.model.grammar import Grammar, build_grammar, encode_answer
from emogen.model.sources import locate
from emogen.model.tokenizer import PlainTokenizer, added_special_ids, ensure_chat_template, load_tokenizer
from emogen.task.labels import LabelSet
from emogen.task.prompt import MARK, TEXT_MARK, Example, Message, Prompt, PromptError, render
from emogen.task.recipe import Recipe
from emogen.task.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER_MARK = TEXT_MARK.replace("0", "9999999")
_IGNORE = -100  # the label of a token that is not supervised, as in torch and transformers


@dataclass(frozen=True)
class Row:
    """One encoded row.

    Attributes:
        suffix_ids: token ids after the shared prefix: text and question, then the answer if it is known.
        n_text: how many of the first `suffix_ids` are the text.
        n_answer: how many of the last `suffix_ids` are the answer, end tokens included; 0 for a row to predict.
        names: of each token of the answer, the label (its position) that it says is there, or -1.
        n_cut: how many tokens of the text were left out to fit `max_length`.
    """

    suffix_ids: list[int]
    n_text: int
    n_answer: int
    names: list[int]
    n_cut: int

    def __len__(self) -> int:
        return len(self.suffix_ids)


@dataclass(frozen=True)
class Encoder:
    """Everything that is needed to encode any row of a run; see `make_encoder`.

    Attributes:
        prefix_ids: the P token ids that every row begins with.
        question_ids: token ids between text and answer, one list a question: one for `list` and `json`, L for `yes_no`.
        end_ids: the ids that end an answer.
        grammar: the valid answers.
        max_length: the most tokens that a row may have, its answer included; None for no limit.
    """

    tokenizer: "PreTrainedTokenizerBase"
    label_set: LabelSet
    style: str
    prefix_ids: list[int]
    question_ids: list[list[int]]
    end_ids: list[int]
    max_length: int | None
    grammar: Grammar = field(repr=False)

    @cached_property
    def plain(self) -> "PlainTokenizer":
        return PlainTokenizer(self.tokenizer)

    def rows(self, text: str, labels: Sequence[str] | None = None) -> list[Row]:
        """Encode one text: a row for each question.

        Training and prediction cut a text at the same place, since room is always kept for the longest answer.

        Args:
            labels: the label names of the text if it is to be learnt from.
        """
        text_ids = self.plain.encode(text.strip())
        rows = []
        for k, question in enumerate(self.question_ids):
            kept, n_cut = text_ids, 0
            if self.max_length is not None:
                longest = max(map(len, self.question_ids))
                room = self.max_length - len(self.prefix_ids) - longest - self.grammar.max_length
                kept = self.plain.cut(text_ids, room)
                n_cut = len(text_ids) - len(kept)
            answer: list[int] = []
            names: list[int] = []
            if labels is not None:
                answer, names = encode_answer(self.grammar, self._choices(labels, k))
            if self.style == "yes_no":
                names = [k if choice == 0 else -1 for choice in names]
            rows.append(Row([*kept, *question, *answer], len(kept), len(answer), names, n_cut))
        return rows

    def _choices(self, labels: Sequence[str], question: int) -> list[int]:
        vector = self.label_set.vector(labels)
        if self.style == "yes_no":
            return [0 if vector[question] else 1]
        return [i for i in self.label_set.answer_order if vector[i]]

    def training_example(
        self, row: Row, label_weights: Sequence[float] | None = None, text_weight: float = 0.0
    ) -> dict[str, list[Any]]:
        """A row as TRL's `SFTTrainer` takes it.

        Args:
            label_weights: [L], how much the tokens that name each label count in the loss.
            text_weight: how much the tokens of the text count. The first one has nothing of the row before it, and does
                not.

        Returns:
            `input_ids`; `labels`, with -100 wherever nothing is learnt; and, if either weight is given, `weights`.
        """
        input_ids = [*self.prefix_ids, *row.suffix_ids]
        n_prefix, n_masked = len(self.prefix_ids), len(input_ids) - row.n_answer
        labels = [_IGNORE] * n_masked + input_ids[n_masked:]
        if label_weights is None and not text_weight:
            return {"input_ids": input_ids, "labels": labels}
        weights = [1.0] * len(input_ids)
        if label_weights is not None:
            weights[n_masked:] = [label_weights[name] if name >= 0 else 1.0 for name in row.names]
        if text_weight:
            learnt = slice(n_prefix + 1, n_prefix + row.n_text)
            labels[learnt] = input_ids[learnt]
            weights[learnt] = [text_weight] * len(labels[learnt])
        return {"input_ids": input_ids, "labels": labels, "weights": weights}

    def branched_example(
        self, rows: Sequence[Row], label_weights: Sequence[float] | None = None, text_weight: float = 0.0
    ) -> dict[str, list[Any]]:
        """The rows of one text, for each question one, as one example: `training_example`'s entries, in which the text
        stands once and what follows it for each question after that; and `branches`, the lengths of these."""
        examples = [self.training_example(row, label_weights, text_weight) for row in rows]
        n_shared = len(self.prefix_ids) + rows[0].n_text
        joined = {name: list(values[:n_shared]) for name, values in examples[0].items()}
        for example in examples:
            for name, values in example.items():
                joined[name] += values[n_shared:]
        return joined | {"branches": [len(example["input_ids"]) - n_shared for example in examples]}


def make_encoder(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Prompt,
    label_set: LabelSet,
    style: str = "list",
    examples: Sequence[Example] = (),
    max_length: int | None = None,
) -> Encoder:
    """Render the prompt once, and encode all of it that does not depend on the row.

    Raises:
        PromptError: the template breaks the contract, or the questions change what precedes the text.
        InputError: the instruction leaves no room in `max_length`.
        ModelError: the chat template does not say how an answer ends.
    """
    questions = label_set.labels if style == "yes_no" else (None,)
    texts = ["", *(example.text.strip() for example in examples)]
    prefix_ids: list[int] | None = None
    question_ids = []
    plain = PlainTokenizer(tokenizer)
    for label in questions:
        messages = render(prompt, label_set, examples, label)
        before, _, after = chat_text(tokenizer, messages).partition(TEXT_MARK)
        ids = _encode_marked(tokenizer, plain, before, texts)
        if prefix_ids is not None and ids != prefix_ids:
            raise PromptError(
                f"{prompt.at('label')}: the question must stand after {{{{ text }}}}, for what precedes it is shared"
            )
        prefix_ids = ids
        question_ids.append(_encode_marked(tokenizer, plain, after, texts))
    assert prefix_ids is not None
    end_ids = _end_ids(tokenizer, render(prompt, label_set, examples, questions[0]))
    grammar = build_grammar(label_set, style, plain.encode, end_ids)
    encoder = Encoder(tokenizer, label_set, style, prefix_ids, question_ids, end_ids, max_length, grammar)
    fixed = len(prefix_ids) + max(map(len, question_ids)) + grammar.max_length
    if max_length is not None and fixed >= max_length:
        raise InputError(
            f"{prompt.path}: max_length={max_length} leaves no room for the text: the instruction takes "
            f"{len(prefix_ids)} tokens, the rest of the prompt {max(map(len, question_ids))}, the longest answer "
            f"{grammar.max_length}; set max_length to {fixed + 64} or more"
        )
    return encoder


def load_encoder(task: Task, location: str | None = None) -> tuple["Encoder", bool]:
    """The encoder of a task, and whether the model is a base model that was given the plain chat template.

    Args:
        location: where to load the tokenizer from, if not from the recipe's model.

    Raises:
        InputError: prompt, label set and `max_length` do not go together.
        ModelError: the tokenizer cannot be had.
    """
    tokenizer, plain = load_chat_tokenizer(task.recipe, location)
    return encoder_of(task, tokenizer), plain


def load_chat_tokenizer(recipe: Recipe, location: str | None = None) -> tuple["PreTrainedTokenizerBase", bool]:
    """The tokenizer of a recipe with a chat template, and whether that is the plain one; see `load_encoder`."""

    revision = recipe.lm_args.get("model_revision", "main")
    tokenizer = load_tokenizer(
        location or locate(recipe.model_name, revision),
        revision=revision,
        trust_remote_code=recipe.trusts_code,
    )
    return tokenizer, ensure_chat_template(tokenizer)


def encoder_of(task: Task, tokenizer: "PreTrainedTokenizerBase") -> "Encoder":
    """The encoder of a task whose tokenizer is loaded; see `load_encoder`."""

    recipe = task.recipe
    return make_encoder(tokenizer, task.prompt, task.label_set, recipe.answer, task.examples, recipe.max_length)


def chat_text(tokenizer: "PreTrainedTokenizerBase", messages: list[Message]) -> str:
    """Messages -> the text that the model reads up to its answer, marks included.

    A chat template without a system role gets the system text at the head of the first user turn. Reasoning is
    switched off.
    """
    text = _apply(tokenizer, _supported(tokenizer, messages), add_generation_prompt=True)
    if text.rstrip().endswith("<think>"):  # a template that always opens the reasoning: close it at once
        text = text.rstrip() + "\n\n</think>\n\n"
    return text


def _supported(tokenizer: "PreTrainedTokenizerBase", messages: list[Message]) -> list[Message]:
    """The messages, with the system turn folded into the first user turn where the template has no place for it."""
    if messages[0]["role"] != "system":
        return messages
    try:
        if messages[0]["content"] in _apply(tokenizer, messages, add_generation_prompt=True):
            return messages
    except Exception:  # noqa: S110 - templates refuse a system role in ways of their own; what they say does not matter
        pass
    system, user, *rest = messages
    return [user | {"content": f"{system['content']}\n\n{user['content']}"}, *rest]


def _apply(tokenizer: "PreTrainedTokenizerBase", messages: list[Message], *, add_generation_prompt: bool) -> str:
    # Llama 3's template prints today's date unless it is given a `date_string`, and a prompt must not change overnight.
    return str(
        tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,
            date_string="26 Jul 2024",
        )
    )


def _end_ids(tokenizer: "PreTrainedTokenizerBase", messages: list[Message]) -> list[int]:
    """What the chat template puts after an answer, up to its first special token (the one that stops generation)."""
    dialogue = [*_supported(tokenizer, messages), {"role": "assistant", "content": _ANSWER_MARK}]
    tail = _apply(tokenizer, dialogue, add_generation_prompt=False).rpartition(_ANSWER_MARK)[2]
    ids = tokenizer.encode(tail, add_special_tokens=False)
    special = set(tokenizer.all_special_ids) | added_special_ids(tokenizer)
    for k, token in enumerate(ids):
        if token in special:
            return ids[: k + 1]
    if tokenizer.eos_token_id is None:
        raise ModelError("the chat template does not end an answer, and the tokenizer has no end-of-text token")
    return [tokenizer.eos_token_id]


def _encode_marked(
    tokenizer: "PreTrainedTokenizerBase", plain: "PlainTokenizer", marked: str, texts: Sequence[str]
) -> list[int]:
    """Encode template text, where special tokens count, around marks, whose texts are plain."""
    ids: list[int] = []
    for k, part in enumerate(MARK.split(marked)):  # template text, mark number, template text, ...
        if k % 2:
            ids += plain.encode(texts[int(part)])
        elif part:
            ids += tokenizer.encode(part, add_special_tokens=False)
    return ids
