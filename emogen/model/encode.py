"""Chats -> token ids, with the supervised tokens marked and the shortened texts counted.

A row is encoded as `prefix | text | question | answer`. The prefix (everything before the text) is the same for all
rows of a run; shared-prefix training and decoding rest on that. The pieces are encoded separately, so a text can never
become a special token, and no token spans a boundary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from emogen.errors import InputError, ModelError
from emogen.model.grammar import Grammar, build_grammar, encode_answer
from emogen.model.tokenizer import PLAIN_CHAT_TEMPLATE, PlainTokenizer, added_special_ids, load_chat_tokenizer
from emogen.task.labels import LabelSet
from emogen.task.prompt import MARK, TEXT_MARK, Example, Message, Prompt, PromptError, render
from emogen.task.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER_MARK = TEXT_MARK.replace("0", "9999999")
IGNORE = -100  # the label of an unsupervised token, as in torch and transformers


@dataclass(frozen=True)
class Row:
    """One encoded row.

    Attributes:
        suffix_ids: the token ids after the prefix: text and question, then the answer if it is known.
        n_text: the number of tokens of the text, the first of `suffix_ids`.
        n_answer: the number of tokens of the answer and its end, the last of `suffix_ids`; 0 without an answer.
        names: for each token of the answer, the position of the label that it names, or -1.
        n_cut: the number of tokens that the text was shortened by to fit `max_length`.
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
    """Encodes the rows of a run; see `make_encoder`.

    Attributes:
        prefix_ids: the P token ids that all rows begin with.
        question_ids: the token ids between text and answer, one list for each question: L for `yes_no`, otherwise one.
        end_ids: the token ids that end an answer.
        max_length: the limit in tokens of a row with its answer; None for no limit.
        grammar: the valid answers.
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
    def plain(self) -> PlainTokenizer:
        """The tokenizer without special tokens, for texts."""
        return PlainTokenizer(self.tokenizer)

    @property
    def has_plain_template(self) -> bool:
        """Whether the chat is written with the plain template, because the model has none of its own."""
        return bool(self.tokenizer.chat_template == PLAIN_CHAT_TEMPLATE)

    def rows(self, text: str, labels: Sequence[str] | None = None) -> list[Row]:
        """Encode one text, as one row for each question.

        A text is shortened at the same place in training and in prediction, because room is always kept for the longest
        answer.

        Args:
            labels: the label names of the text, for training; None for rows without an answer.
        """
        text_ids = kept = self.plain.encode(text.strip())
        if self.max_length is not None:
            longest = max(map(len, self.question_ids))
            room = self.max_length - len(self.prefix_ids) - longest - self.grammar.max_length
            kept = self.plain.cut(text_ids, room)
        rows = []
        for k, question in enumerate(self.question_ids):
            answer: list[int] = []
            names: list[int] = []
            if labels is not None:
                answer, names = encode_answer(self.grammar, self._choices(labels, k))
            if self.style == "yes_no":
                names = [k if choice == 0 else -1 for choice in names]
            row_ids = [*kept, *question, *answer]
            rows.append(Row(row_ids, len(kept), len(answer), names, len(text_ids) - len(kept)))
        return rows

    def _choices(self, labels: Sequence[str], question: int) -> list[int]:
        """Label names -> the choices of the grammar that answer a question."""
        vector = self.label_set.vector(labels)
        if self.style == "yes_no":
            return [0 if vector[question] else 1]
        return [i for i in self.label_set.answer_order if vector[i]]

    def training_example(
        self, row: Row, label_weights: Sequence[float] | None = None, text_weight: float = 0.0
    ) -> dict[str, list[Any]]:
        """A row in the format of TRL's `SFTTrainer`.

        Args:
            label_weights: [L], the weight in the loss of the tokens that name each label.
            text_weight: the weight in the loss of the tokens of the text. The first one is not supervised, since the
                row gives it no context.

        Returns:
            `input_ids`; `labels`, with -100 for unsupervised tokens; and `weights`, if either weight is given.
        """
        input_ids = [*self.prefix_ids, *row.suffix_ids]
        n_prefix, n_prompt = len(self.prefix_ids), len(input_ids) - row.n_answer
        labels = [IGNORE] * n_prompt + input_ids[n_prompt:]
        if label_weights is None and not text_weight:
            return {"input_ids": input_ids, "labels": labels}
        weights = [1.0] * len(input_ids)
        if label_weights is not None:
            weights[n_prompt:] = [label_weights[name] if name >= 0 else 1.0 for name in row.names]
        if text_weight:
            supervised = slice(n_prefix + 1, n_prefix + row.n_text)
            labels[supervised] = input_ids[supervised]
            weights[supervised] = [text_weight] * len(labels[supervised])
        return {"input_ids": input_ids, "labels": labels, "weights": weights}

    def branched_example(
        self, rows: Sequence[Row], label_weights: Sequence[float] | None = None, text_weight: float = 0.0
    ) -> dict[str, list[Any]]:
        """All questions on one text as a single example, in which the text occurs once.

        Args:
            rows: the rows of the text, one for each question.
            label_weights, text_weight: see `training_example`.

        Returns:
            The entries of `training_example`, each for prefix, text and then one branch (question and answer) after
            another; and `branches`, the number of tokens of each branch.
        """
        examples = [self.training_example(row, label_weights, text_weight) for row in rows]
        n_shared = len(self.prefix_ids) + rows[0].n_text
        joined = {name: list(values[:n_shared]) for name, values in examples[0].items()}
        for example in examples:
            for name, values in example.items():
                joined[name] += values[n_shared:]
        return joined | {"branches": [len(example["input_ids"]) - n_shared for example in examples]}


def load_encoder(task: Task, location: str | None = None) -> Encoder:
    """Load the tokenizer of a task and make its encoder.

    Args:
        location: where to load the tokenizer from instead of the recipe's model, such as a trained adapter.

    Raises:
        InputError: prompt, label set and `max_length` do not fit together.
        ModelError: the tokenizer cannot be loaded.
    """
    return make_task_encoder(task, load_chat_tokenizer(task.recipe, location))


def make_task_encoder(task: Task, tokenizer: "PreTrainedTokenizerBase") -> Encoder:
    """The encoder of a task, with a tokenizer that is already loaded; see `make_encoder`."""
    recipe = task.recipe
    return make_encoder(tokenizer, task.prompt, task.label_set, recipe.answer, task.examples, recipe.max_length)


def make_encoder(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Prompt,
    label_set: LabelSet,
    style: str = "list",
    examples: Sequence[Example] = (),
    max_length: int | None = None,
) -> Encoder:
    """Render a prompt and encode everything that is the same for all rows.

    Args:
        tokenizer: one with a chat template.
        style: the style of the answers.
        examples: the few-shot examples that the prompt shows.
        max_length: the limit in tokens of a row with its answer; None for no limit.

    Raises:
        PromptError: the template is not valid, or a question changes what stands before the text.
        InputError: the instruction leaves no room for a text in `max_length`.
        ModelError: the chat template does not end an answer.
    """
    questions = label_set.labels if style == "yes_no" else (None,)
    texts = ["", *(example.text.strip() for example in examples)]
    prefixes, question_ids = [], []
    plain = PlainTokenizer(tokenizer)
    for label in questions:
        messages = render(prompt, label_set, examples, label)
        before, _, after = chat_text(tokenizer, messages).partition(TEXT_MARK)
        prefixes.append(_encode_marked(tokenizer, plain, before, texts))
        question_ids.append(_encode_marked(tokenizer, plain, after, texts))
        if prefixes[-1] != prefixes[0]:
            raise PromptError(
                f"{prompt.at('label')}: the question must stand after {{{{ text }}}}, because what stands before the "
                "text is shared by all questions"
            )
    prefix_ids = prefixes[0]
    end_ids = _end_ids(tokenizer, render(prompt, label_set, examples, questions[0]))
    grammar = build_grammar(label_set, style, plain.encode, end_ids)
    n_question = max(map(len, question_ids))
    n_fixed = len(prefix_ids) + n_question + grammar.max_length
    if max_length is not None and n_fixed >= max_length:
        raise InputError(
            f"{prompt.path}: max_length={max_length} leaves no room for the text: the instruction takes "
            f"{len(prefix_ids)} tokens, the rest of the prompt {n_question}, the longest answer "
            f"{grammar.max_length}; set max_length to {n_fixed + 64} or more"
        )
    return Encoder(tokenizer, label_set, style, prefix_ids, question_ids, end_ids, max_length, grammar)


def chat_text(tokenizer: "PreTrainedTokenizerBase", messages: list[Message]) -> str:
    """Messages -> the text that the model reads before its answer, marks included.

    If the chat template has no system role, the system text precedes the first user turn. Reasoning is switched off.
    """
    text = _apply(tokenizer, _supported(tokenizer, messages), add_generation_prompt=True)
    if text.rstrip().endswith("<think>"):  # the template always opens the reasoning, so close it
        text = text.rstrip() + "\n\n</think>\n\n"
    return text


def _supported(tokenizer: "PreTrainedTokenizerBase", messages: list[Message]) -> list[Message]:
    """The messages, with the system turn merged into the first user turn if the template has no system role."""
    if messages[0]["role"] != "system":
        return messages
    try:
        if messages[0]["content"] in _apply(tokenizer, messages, add_generation_prompt=True):
            return messages
    except Exception:  # noqa: S110 - templates refuse a system role in different ways, all of which mean the same
        pass
    system, user, *rest = messages
    return [user | {"content": f"{system['content']}\n\n{user['content']}"}, *rest]


def _apply(tokenizer: "PreTrainedTokenizerBase", messages: list[Message], *, add_generation_prompt: bool) -> str:
    # Llama 3's template prints today's date unless it gets a `date_string`. A prompt must not change from day to day.
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
    """What the chat template writes after an answer, up to the first special token, which stops generation."""
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
    tokenizer: "PreTrainedTokenizerBase", plain: PlainTokenizer, marked: str, texts: Sequence[str]
) -> list[int]:
    """Encode a rendered prompt: template text with its special tokens, and in the place of each mark its plain text."""
    ids: list[int] = []
    for k, part in enumerate(MARK.split(marked)):  # template text, mark number, template text, ...
        if k % 2:
            ids += plain.encode(texts[int(part)])
        elif part:
            ids += tokenizer.encode(part, add_special_tokens=False)
    return ids
