"""Chats -> token ids, with the supervised tokens marked and the shortened texts counted.

A row is encoded as `prefix | text | question | answer`, and its ids are those that the chat template gives the finished
chat. The prefix (what precedes the text) is the same for all rows of a run; shared-prefix training and decoding rest on
that. Where a tokenizer joins characters across a boundary, such as a space and the word after it, the boundary moves:
the prefix ends where no text can change its tokens, and the prompt ends where no answer can.

A text can never become a special token. If it looks like one, its ids are not those of the chat template.
"""

import logging
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from emogen.errors import InputError, ModelError
from emogen.model.chat_template import apply_chat_template
from emogen.model.grammar import Grammar, build_grammar, common_beginning, encode_answer
from emogen.model.tokenizer import (
    PLAIN_CHAT_TEMPLATE,
    PlainTokenizer,
    TextTokenizer,
    clean,
    control_tokens,
    read_chat_tokenizer,
)
from emogen.task.answer import NO, YES, answer_text
from emogen.task.labels import LabelSet
from emogen.task.prompt import MARK, TEXT_MARK, Example, Message, Prompt, PromptError, fill, render
from emogen.task.task import Task

log = logging.getLogger(__name__)
_ANSWER_MARK = TEXT_MARK.replace("0", "9999999")
IGNORE = -100  # the label of an unsupervised token, as in torch and transformers


@dataclass(frozen=True)
class Row:
    """One encoded row.

    Attributes:
        suffix_ids: the token ids after the prefix: text and question, then the answer if it is known.
        n_text: the number of tokens of the text, the first of `suffix_ids`. They include what precedes the text and is
            not in the prefix, and what a token joins to the end of the text.
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


_warn_once = cache(log.warning)


@dataclass(frozen=True)
class Frame:
    """What the chat template writes around a text, protected (see `PlainTokenizer`).

    Attributes:
        before: what precedes the text, from a control token in the prefix on, or from the beginning of the chat.
        n_prefix: the number of characters of `before` that are in the prefix.
        prefix_ids: their token ids.
        after: for each question, what lies between the text and the answer, as far as no answer can change it.
        empty: for each question, `before` and `after` without a text between them: a template may trim what is left.
        lead: what the template writes before an answer, and is encoded with it.
        end: what the template writes after an answer, up to the token that ends it.
    """

    before: str
    n_prefix: int
    prefix_ids: list[int]
    after: tuple[str, ...]
    empty: tuple[str, ...]
    lead: str
    end: str


@dataclass(frozen=True)
class Encoder:
    """Encodes the rows of a run; see `make_encoder`.

    Attributes:
        prefix_ids: the P token ids that all rows begin with.
        question_ids: the token ids between an ordinary text and the answer, one list for each question: L for `yes_no`,
            otherwise one. In a row, the first of them may be joined with the end of the text.
        end_ids: the token that ends an answer, in a list of one.
        max_length: the limit in tokens of a row with its answer; None for no limit.
        grammar: the valid answers.
        protected_prefix: the text of the prefix, protected.
    """

    tokenizer: TextTokenizer
    label_set: LabelSet
    style: str
    prefix_ids: list[int]
    question_ids: list[list[int]]
    end_ids: list[int]
    max_length: int | None
    grammar: Grammar = field(repr=False)
    frame: Frame = field(repr=False)
    plain: PlainTokenizer = field(repr=False)
    protected_prefix: str = field(repr=False)

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
        text = clean(text).strip()
        prompts, starts = self._prompts(text)
        longest = max(map(len, prompts))
        if self.max_length is not None:
            room = self.max_length - len(self.prefix_ids) - self.grammar.max_length
            kept, all_starts = len(starts), starts
            while max(map(len, prompts)) > room and kept > 0:
                kept = max(0, min(kept - 1, len(all_starts) - (longest - room)))
                prompts, starts = self._prompts(text[: all_starts[kept]].rstrip())
        n_cut = longest - max(map(len, prompts))
        rows = []
        for k, prompt in enumerate(prompts):
            answer: list[int] = []
            names: list[int] = []
            if labels is not None:
                answer, names = encode_answer(self.grammar, self._choices(labels, k))
            if self.style == "yes_no":
                names = [k if choice == 0 else -1 for choice in names]
            rows.append(Row([*prompt, *answer], len(starts), len(answer), names, n_cut))
        return rows

    def _prompts(self, text: str) -> tuple[list[list[int]], list[int]]:
        """The ids between prefix and answer for each question; and where each token of the text starts in it."""
        before, prompts, starts = self.frame.before, [], []
        for after, empty in zip(self.frame.after, self.frame.empty, strict=True):
            ids, positions = self._after_prefix(before + text + after if text else empty)
            prompts.append(ids)
            n_before = len(before)
            starts = [max(0, i - n_before) for i in positions if i < n_before + len(text)] if text else []
        if len(prompts) > 1:
            starts = starts[: len(common_beginning(prompts))]
        return prompts, starts

    def _after_prefix(self, chat: str) -> tuple[list[int], list[int]]:
        """The ids of a protected chat after the prefix, and the position of the first character of each."""
        frame = self.frame
        ids, starts = self.plain.encode_with_starts(chat)
        n = len(frame.prefix_ids)
        if ids[:n] == frame.prefix_ids:
            return ids[n:], starts[n:]
        _warn_once("The tokenizer joins some texts with the end of the instruction; they are encoded apart from it.")
        # After a control token, some tokenizers write no space before the first word.
        head = next((frame.before[start:end] for start, end in control_tokens(frame.before)), "")
        ids, starts = self.plain.encode_with_starts(head + chat[frame.n_prefix :])
        n = 1 if head else 0
        return ids[n:], [start - len(head) + frame.n_prefix for start in starts[n:]]

    def answer_text(self, ids: Sequence[int]) -> str:
        """The text of an answer, without what the chat template writes around it."""
        lead, end = self.frame.lead, self.frame.end[: control_tokens(self.frame.end)[-1][0]]
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()
        return text.removeprefix(self.plain.reveal(lead).strip()).removesuffix(self.plain.reveal(end).strip()).strip()

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
    return make_task_encoder(task, read_chat_tokenizer(task.recipe, location))


def make_task_encoder(task: Task, tokenizer: TextTokenizer) -> Encoder:
    """The encoder of a task, with a tokenizer that is already loaded; see `make_encoder`."""
    recipe = task.recipe
    return make_encoder(tokenizer, task.prompt, task.label_set, recipe.answer, task.examples, recipe.max_length)


def make_encoder(
    tokenizer: TextTokenizer,
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
        InputError: the instruction leaves no room for a text in `max_length`; or the tokenizer cannot write a label.
        ModelError: the chat template fails, does not end an answer, or drops or repeats a text or the answer.
    """
    chats = [
        _with_empty_examples(render(prompt, label_set, examples, label), examples)
        for label in (label_set.labels if style == "yes_no" else (None,))
    ]
    plain = tokenizer.plain
    before, frame = _make_frame(tokenizer, plain, prompt, chats, examples, _sample_answers(label_set, style))
    prefix_ids = plain.encode(before)
    try:
        grammar = build_grammar(label_set, style, _answer_encoder(tokenizer, plain, frame), frame.end)
    except ValueError as error:  # the tokenizer joins labels
        raise InputError(f"{tokenizer.name}: no answers in the style {style!r}: {error}") from None
    end_ids = plain.encode(frame.end)[-1:]
    encoder = Encoder(tokenizer, label_set, style, prefix_ids, [], end_ids, None, grammar, frame, plain, before)
    ordinary, empty = encoder.rows("x"), encoder.rows("")
    question_ids = [row.suffix_ids[row.n_text :] for row in ordinary]
    n_question = max(len(ids) for ids in [*question_ids, *(row.suffix_ids for row in empty)])
    n_fixed = len(prefix_ids) + n_question + grammar.max_length
    if max_length is not None and n_fixed >= max_length:
        raise InputError(
            f"{prompt.path}: max_length={max_length} leaves no room for the text: the instruction takes "
            f"{len(prefix_ids)} tokens, the rest of the prompt {n_question}, the longest answer "
            f"{grammar.max_length}; set max_length to {n_fixed + 64} or more"
        )
    _check_chats(encoder, chats, examples)
    return replace(encoder, question_ids=question_ids, max_length=max_length)


def _make_frame(
    tokenizer: TextTokenizer,
    plain: PlainTokenizer,
    prompt: Prompt,
    chats: Sequence[list[Message]],
    examples: Sequence[Example],
    answers: Sequence[str],
) -> tuple[str, Frame]:
    """What precedes the text and is the same for all rows, protected; and the rest of the chat.

    Args:
        chats: the messages of each question.
        answers: answers that begin in every way in which one can begin.
    """
    parts = [_split(_finished_chat(tokenizer, messages)) for messages in chats]
    if len({before for before, _, _ in parts}) > 1:
        raise PromptError(
            f"{prompt.at('label')}: the question must stand after {{{{ text }}}}, because what stands before the "
            "text is shared by all questions"
        )
    before = _protected(plain, parts[0][0], examples)
    after = [_protected(plain, part, examples) for _, part, _ in parts]
    end = _end(tokenizer, plain, parts[0][2])

    contexts = [part if control_tokens(part) else f"{before}x{part}" for part in after]
    n_lead = _n_joined(plain, contexts, [answer + end for answer in answers])
    lead = after[0][len(after[0]) - n_lead :]
    after = [part[: len(part) - n_lead] for part in after]

    start = max((first for first, _ in control_tokens(before)), default=0)
    n_rest = _n_joined(plain, [before[start:]], [text + after[0] for text in _PROBES])
    prefix = before[: len(before) - n_rest]
    prefix_ids, last_ids = plain.encode(prefix), plain.encode(prefix[start:])
    if prefix_ids[len(prefix_ids) - len(last_ids) :] != last_ids:  # the control token takes what precedes it along
        start, last_ids = 0, prefix_ids

    empty = []
    for messages, part in zip(chats, after, strict=True):
        whole = _protected(plain, _without_text(tokenizer, messages), examples)
        fits = whole.startswith(prefix) and whole.endswith(lead)
        empty.append(whole[start : len(whole) - n_lead] if fits else before[start:] + part)
    n_prefix = len(prefix) - start
    return prefix, Frame(before[start:], n_prefix, last_ids, tuple(after), tuple(empty), lead, end)


# Beginnings of texts that a tokenizer might join with what precedes them: each printable ASCII character, alone,
# doubled or before a letter; and one or two of each other kind.
_PROBES = [
    *(first + second for first in string.printable.strip() for second in ("", first, "a", f"{first}a")),
    *("Hello there", "the", "I'm", "123", ":)", "...", "http://", "<|im_end|>", "[/INST]", "\u00e9t\u00e9", "\u00df"),
    *("\U0001f600", "\u2764\ufe0f", "\U0001f468\u200d\U0001f469", "\u6211\u7231", "\u3042", "\uff01", "\ud55c"),
    *("\u043f\u0440", "\u03b1", "\u0645", "\u05e9", "\u0939\u093f", "\u0e01", "\u0301", "\u200b", "\u200d", "\u2026"),
    *("\u201chi", "\u2019s", "\u2014", "\u20ac5", "\u00a1", "\u00bf", "\u00bd", "\u2160", "\x00", "\u2581", "\ufffd"),
]


def _n_joined(plain: PlainTokenizer, contexts: Sequence[str], continuations: Iterable[str]) -> int:
    """The number of characters at the end of the contexts whose tokens depend on what follows.

    Args:
        contexts: protected texts.
        continuations: what may follow any of them.

    Returns:
        The smallest number that fits all contexts: without these characters, the ids of a context begin the ids of the
        context with any continuation.
    """
    joint = [plain.encode(context + continuation) for continuation in continuations for context in contexts]
    limit = min(len(context) - max((end for _, end in control_tokens(context)), default=0) for context in contexts)
    for n in range(limit):
        fixed = [plain.encode(context[: len(context) - n]) for context in contexts]
        if all(ids[: len(fixed[i % len(fixed)])] == fixed[i % len(fixed)] for i, ids in enumerate(joint)):
            return n
    return limit


def _answer_encoder(tokenizer: TextTokenizer, plain: PlainTokenizer, frame: Frame) -> Callable[[str], list[int]]:
    """The function that encodes the beginning of an answer as it is after a prompt."""
    after = frame.after[0]
    context = after[max((start for start, _ in control_tokens(after)), default=0) :]
    if not control_tokens(after):
        context = f"{frame.before}x{after}"
    n_context = len(plain.encode(context))

    def encode(answer: str) -> list[int]:
        ids = plain.encode(context + frame.lead + answer)[n_context:]
        if plain.unk_id in ids:
            raise InputError(f"{tokenizer.name}: the tokenizer has no tokens for the answer {answer!r}")
        return ids

    return encode


def _sample_answers(label_set: LabelSet, style: str) -> list[str]:
    """Answers that begin in every way in which one can begin: the empty one, one for each label, and the longest."""
    if style == "yes_no":
        return [YES, NO]
    return [answer_text(chosen, label_set, style) for chosen in _sample_choices(label_set)]


def _sample_choices(label_set: LabelSet) -> list[tuple[str, ...]]:
    """One label after another, and, where these are answers, no label and all labels."""
    single: list[tuple[str, ...]] = [(name,) for name in label_set.names]
    return single if label_set.exactly_one else [(), *single, label_set.names]


# ------------------------------------------------------------------------------------------ chat templates


def chat_text(tokenizer: TextTokenizer, messages: list[Message]) -> str:
    """Messages -> the text that precedes the answer in a finished chat, marks included.

    If the chat template has no system role, the system text precedes the first user turn. Reasoning is switched off.

    Raises:
        ModelError: the chat template fails, or it drops or repeats a text or the answer.
    """
    return _finished_chat(tokenizer, messages).partition(_ANSWER_MARK)[0]


def _finished_chat(tokenizer: TextTokenizer, messages: list[Message]) -> str:
    """Messages -> the finished chat, with a mark in the place of the answer; see `chat_text`."""
    messages = [*_supported(tokenizer, messages), _answer(_ANSWER_MARK)]
    chat = apply_chat_template(tokenizer, messages, add_generation_prompt=False)
    contents = "".join(message["content"] for message in messages)
    for mark in {match[0] for match in MARK.finditer(contents)}:
        if (n := chat.count(mark)) != (wanted := contents.count(mark)):
            what = {TEXT_MARK: "the user's text", _ANSWER_MARK: "the answer"}.get(mark, "the text of an example")
            does = "drops" if n < wanted else "repeats"
            raise ModelError(f"{tokenizer.name}: the chat template {does} {what}; another one is needed")
    if TEXT_MARK in contents and chat.index(TEXT_MARK) > chat.index(_ANSWER_MARK):
        raise ModelError(f"{tokenizer.name}: the chat template writes the answer before the user's text")
    return chat


def _split(chat: str) -> tuple[str, str, str]:
    """A finished chat -> what precedes the text; what lies between it and the answer; and what follows the answer."""
    before, _, rest = chat.partition(TEXT_MARK)
    between, _, after = rest.partition(_ANSWER_MARK)
    return before, between, after


def _answer(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _with_empty_examples(messages: list[Message], examples: Sequence[Example]) -> list[Message]:
    """The messages without the marks of empty example texts: a template may trim what is left."""
    empty = {str(k) for k, example in enumerate(examples, start=1) if not example.text.strip()}
    return [m | {"content": MARK.sub(lambda mark: "" if mark[1] in empty else mark[0], m["content"])} for m in messages]


def _without_text(tokenizer: TextTokenizer, messages: list[Message]) -> str:
    """What precedes the answer in a finished chat on an empty text; empty if the chat template refuses that."""
    messages = [m | {"content": m["content"].replace(TEXT_MARK, "")} for m in messages]
    try:
        return chat_text(tokenizer, messages)
    except ModelError:
        return ""


def _protected(plain: PlainTokenizer, marked: str, examples: Sequence[Example]) -> str:
    """A part of a chat with its control tokens protected, and the texts of the examples in place of their marks."""
    parts = MARK.split(marked)  # template text, mark number, template text, ...
    return "".join(
        clean(examples[int(part) - 1].text).strip() if k % 2 else plain.protect(part) for k, part in enumerate(parts)
    )


def _supported(tokenizer: TextTokenizer, messages: list[Message]) -> list[Message]:
    """The messages, with the system turn merged into the first user turn if the template has no system role."""
    if messages[0]["role"] != "system":
        return messages
    try:
        if messages[0]["content"] in apply_chat_template(tokenizer, messages, add_generation_prompt=True):
            return messages
    except ModelError:  # templates refuse a system role in different ways, all of which mean the same
        pass
    system, user, *rest = messages
    return [user | {"content": f"{system['content']}\n\n{user['content']}"}, *rest]


def _end(tokenizer: TextTokenizer, plain: PlainTokenizer, tail: str) -> str:
    """What the chat template writes after an answer, up to the first special token, which stops generation; protected.

    If there is none, it is the end-of-text token.
    """
    tail = plain.protect(tail)
    for start, end in control_tokens(tail):
        if plain.is_special(tail[start:end]):
            return tail[:end]
    if tokenizer.eos_token is None:
        raise ModelError(
            f"{tokenizer.name}: the chat template does not end an answer, and the tokenizer has no end-of-text token"
        )
    return plain.protect(tokenizer.eos_token)


def _check_each_turn_once(tokenizer: TextTokenizer, messages: list[Message], name: str) -> None:
    """Refuse a chat template that drops a turn or writes it several times.

    Raises:
        ModelError: it does; the message names the turn.
    """
    words = [f"turn{k}of{len(messages)}" for k in range(len(messages))]
    chat = chat_text(tokenizer, [m | {"content": word} for m, word in zip(messages, words, strict=True)])
    for k, (message, word) in enumerate(zip(messages, words, strict=True), start=1):
        if (n := chat.count(word)) != 1:
            what = f"writes turn {k} ({message['role']}) {n} times" if n else f"drops turn {k} ({message['role']})"
            raise ModelError(f"{name} {what}; choose another model, or give its tokenizer another chat template")


def _check_chats(encoder: Encoder, chats: Sequence[list[Message]], examples: Sequence[Example]) -> None:
    """Warn of a chat template that changes a turn, or begins an answer in two ways, or is otherwise not reproduced."""
    tokenizer, label_set = encoder.tokenizer, encoder.label_set
    name = f"{tokenizer.name}: the chat template"
    texts = [_SAMPLE_TEXT, *(clean(example.text).strip() for example in examples)]
    messages = _supported(tokenizer, chats[0])
    _check_each_turn_once(tokenizer, messages, name)
    chat = chat_text(tokenizer, messages)
    generation_prompt = apply_chat_template(tokenizer, messages, add_generation_prompt=True)
    if not chat.startswith(generation_prompt):
        common = len(common_beginning([chat, generation_prompt]))
        log.warning(
            f"{name} begins an answer with {generation_prompt[common:]!r} in a generation prompt, and with "
            f"{chat[common:]!r} in a finished chat; emogen writes finished chats."
        )
    if changed := [message for message in messages if message["content"] not in chat]:
        log.warning(f"{name} changes the {changed[0]['role']} turn {changed[0]['content'][:80]!r}.")
        return
    if any(encoder.plain.protect(text) != text for text in texts):
        return  # an example looks like a control token: emogen writes it as text
    for k, question in enumerate(chats):
        for labels in _sample_choices(label_set):
            row = encoder.rows(_SAMPLE_TEXT, labels)[k]
            choices = encoder._choices(labels, k)
            answer = (
                (YES, NO)[choices[0]] if encoder.style == "yes_no" else answer_text(labels, label_set, encoder.style)
            )
            finished = [*_supported(tokenizer, fill(question, texts)), _answer(answer)]
            chat = apply_chat_template(tokenizer, finished, add_generation_prompt=False)
            ids = tokenizer.encode(chat)
            own = [*encoder.prefix_ids, *row.suffix_ids]
            if ids[: len(own)] != own[: len(ids)]:
                n = len(common_beginning([ids, own]))
                log.warning(
                    f"{name} does not write a chat as emogen does: {tokenizer.decode(ids[n : n + 8])!r} instead of "
                    f"{tokenizer.decode(own[n : n + 8])!r} after {tokenizer.decode(own[max(0, n - 8) : n])!r}."
                )
                return


_SAMPLE_TEXT = "It's \"5 < 6 & 7\",\n\nisn't it?  {{ \\o/ }} Yes!"
