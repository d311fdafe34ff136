"""All valid answers as one automaton over the token ids of a tokenizer.

The grammar is built with the tokenizer itself, because a label may be several tokens, and a comma or a space before it
may change them, as may the comma or the end after it. Training targets are made of the same pieces (`encode_answer`),
so a model is trained on exactly the token sequences that constrained decoding allows.

Terms: a piece is a part of an answer, such as `anger` or `, joy`. A choice is a label, or yes or no. A node is a state
of the automaton over tokens; a node with several allowed tokens is a decision. A jump is what a node leaves no decision
about: the tokens from there to the next decision (see `Jumps`).

Shapes: N nodes, R tokens that can occur in an answer, C choices.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

import numpy as np

from emogen.task.answer import NO, YES, Pieces, counted, pieces
from emogen.task.labels import LabelSet

# The states of the automaton over pieces. State i + C k means that choice i has been made last and k more choices must
# follow; k is 0 unless the answer begins with the number of its labels (style `count`). State i + C k + C C is the same
# for the first choice of an answer.
START, DONE = -1, -2


class Arc(NamedTuple):
    """A step from one state to another.

    The tokens at the end of a piece may depend on the piece after it, as in a tokenizer that makes `y,` one token. Such
    tokens belong to the next arc.

    Attributes:
        ids: the token ids; empty if all tokens of a first piece depend on the next one.
        target: the next state.
        n_previous: the number of ids, the first ones, that spell the end of the piece before.
    """

    ids: tuple[int, ...]
    target: int
    n_previous: int


Arcs = dict[int, list[Arc]]  # the arcs of each state


@dataclass(frozen=True)
class Grammar:
    """A deterministic automaton over tokens. Node 0 is the start, node N - 1 the end.

    A column is an index into `token_ids`.

    Attributes:
        arcs: the automaton over pieces that this one was made from.
        has_count: whether an answer begins with the number of its labels.
        token_ids: int64 [R], the ids that can occur, ascending.
        next_node: int64 [N, R], the node after each token, or -1 if the token is not allowed.
        settles: bool [N, R, C], the choices that are certain to be in the answer once a token is taken.
        max_length: the number of tokens of the longest answer, end tokens included.
    """

    arcs: Arcs
    has_count: bool
    token_ids: np.ndarray
    next_node: np.ndarray
    settles: np.ndarray
    max_length: int

    def accepts(self, ids: Iterable[int]) -> bool:
        """Whether the ids are one complete answer, end tokens included."""
        column = {int(token): r for r, token in enumerate(self.token_ids)}
        node = 0
        for token in ids:
            node = int(self.next_node[node, column[token]]) if token in column else -1
            if node < 0:
                return False
        return node == len(self.next_node) - 1


@dataclass(frozen=True)
class Jumps:
    """What the model is run on when an answer arrives at a node, so that every step decides something.

    Two kinds of tokens are run along with the last one that was chosen:

    - Forced tokens. A node with one allowed token is not a decision. All tokens up to the next decision are known.
    - The continuation. Often, all tokens but one end the answer: after a label comes a comma, or the end of the turn.
      The one token that continues is run as well, with the tokens that it forces, up to the decision after it. If the
      model ends the answer instead, nothing is lost, since the row is finished. If it continues, a step is saved.

    So one step answers up to two decisions. For the list `anger, joy, none`, after `anger` has been chosen:

        forced      (nothing)
        tokens      `,`                 the continuation, and what it forces
        decisions   end or `,`?         then: which label after `,`?

    Attributes:
        forced: for each node the token ids up to the first decision or the end.
        ends: bool [N], whether the forced tokens lead to the end.
        tokens: int64 [N, M], the ids to run: `forced`, then the continuation; padded with -1.
        decisions: int64 [N, 2], the node of the first decision, and of the one after the continuation; -1 for none.
        lengths: int64 [N, 2], the number of `tokens` before each decision.
        continuation: int64 [N], the column of the only token that does not end the answer, or -1 if there are several.
        settles: bool [N, R, C], as `Grammar.settles`, with what the forced tokens after each token settle.
    """

    forced: list[list[int]]
    ends: np.ndarray
    tokens: np.ndarray
    decisions: np.ndarray
    lengths: np.ndarray
    continuation: np.ndarray
    settles: np.ndarray


def find_jumps(grammar: Grammar) -> Jumps:
    """The jumps of a grammar.

    Running the forced tokens along is known as jump-forward decoding. Running the continuation along is added here.
    """
    next_node, n_nodes = grammar.next_node, len(grammar.next_node)
    jumps = [_follow_forced(grammar, node) for node in range(n_nodes)]
    ends = np.array([target == n_nodes - 1 for _, target, _ in jumps])
    settled = np.stack([choices for _, _, choices in jumps])  # [N, C]
    settles = grammar.settles | (settled[next_node] & (next_node >= 0)[:, :, None])
    continuation = np.full(n_nodes, -1)
    for node in range(n_nodes):
        going_on = [c for c in np.flatnonzero(next_node[node] >= 0) if not ends[next_node[node, c]]]
        if len(going_on) == 1:
            continuation[node] = going_on[0]

    tokens, decisions, lengths = [], np.full((n_nodes, 2), -1), np.zeros((n_nodes, 2), dtype=np.int64)
    for node, (forced, first, _) in enumerate(jumps):
        path = list(forced)
        if not ends[node]:
            decisions[node, 0], lengths[node, 0] = first, len(path)
            if continuation[first] >= 0:
                forced_after, second, _ = jumps[next_node[first, continuation[first]]]
                path += [int(grammar.token_ids[continuation[first]]), *forced_after]
                decisions[node, 1], lengths[node, 1] = second, len(path)
        tokens.append(path)
    width = max(map(len, tokens))
    padded = np.array([path + [-1] * (width - len(path)) for path in tokens], dtype=np.int64).reshape(n_nodes, width)
    return Jumps([forced for forced, _, _ in jumps], ends, padded, decisions, lengths, continuation, settles)


def _follow_forced(grammar: Grammar, node: int) -> tuple[list[int], int, np.ndarray]:
    """From a node to the next decision or the end: the token ids, the node there, and the choices settled, bool [C]."""
    tokens, settled = [], np.zeros(grammar.settles.shape[2], dtype=bool)
    while node != len(grammar.next_node) - 1 and (grammar.next_node[node] >= 0).sum() == 1:
        column = int(grammar.next_node[node].argmax())
        tokens.append(int(grammar.token_ids[column]))
        settled |= grammar.settles[node, column]
        node = int(grammar.next_node[node, column])
    return tokens, node, settled


def spell(grammar: Grammar, jumps: Jumps, columns: Iterable[int]) -> list[int]:
    """The token ids of an answer, end tokens included, from the columns taken at its decisions."""
    node, remaining = 0, iter(columns)
    ids: list[int] = []
    while True:
        ids += jumps.forced[node]
        if jumps.ends[node]:
            return ids
        column = next(remaining)
        ids.append(int(grammar.token_ids[column]))
        node = int(grammar.next_node[jumps.decisions[node, 0], column])


def build_grammar(label_set: LabelSet, style: str, encode: Callable[[str], list[int]], end: str) -> Grammar:
    """The grammar of an answer style.

    `list`, `json`: labels in the order of `LabelSet.answer_order`, each at most once, or the empty answer.
    `count`: the number of labels, then a list. `yes_no`: one word. If the label set says `exactly_one`, a list has one
    label, and there is no empty answer.

    Args:
        encode: the beginning of an answer -> its token ids after the prompt.
        end: what follows an answer, up to the token that ends the assistant's turn. No other token of an answer may
            be that one.

    Raises:
        ValueError: `end` is empty, its last token occurs within an answer, the tokenizer joins labels, or `count` is
            asked of `exactly_one`.
    """
    if not end:
        raise ValueError("an answer needs at least one token that ends it")
    if style == "yes_no":
        states = {START: _State("", [(YES, 0), (NO, 1)])}
        states |= {i: _State(word, [(end, DONE)]) for i, word in enumerate((YES, NO))}
        return _determinise(_encode_arcs(states, encode), 2)
    parts = pieces(label_set, "list" if style == "count" else style)
    if label_set.exactly_one and style == "count":
        raise ValueError("count answers need label sets in which a text can have several labels")
    make_states = _single_states if label_set.exactly_one else _count_states if style == "count" else _list_states
    arcs = _encode_arcs(make_states(parts, label_set.answer_order, end), encode)
    return _determinise(_merge_first(arcs, len(label_set)), len(label_set), style == "count")


@dataclass
class _State:
    """A state of the automaton over pieces: the beginning of an answer that leads to it; and its steps (piece, target).

    The first and the last step stand for all others where it matters how a piece is continued.
    """

    beginning: str
    steps: list[tuple[str, int]] = field(default_factory=list)


def _single_states(parts: Pieces, order: tuple[int, ...], end: str) -> dict[int, _State]:
    """The states of `list` and `json` answers with exactly one label."""
    states = {START: _State("", [(parts.first[i], i) for i in order])}
    return states | {i: _State(parts.first[i], [(parts.close + end, DONE)]) for i in order}


def _list_states(parts: Pieces, order: tuple[int, ...], end: str) -> dict[int, _State]:
    """The states of `list` and `json` answers: after each label, a later one in `order` or the end."""
    n = len(order)
    states = {START: _State("", [*((parts.first[i], i + n * n) for i in order), (parts.empty + end, DONE)])}
    states |= {i + n * n: _State(parts.first[i]) for i in order}
    states |= {i: _State(parts.first[before] + parts.following[i]) for before, i in pairwise(order)}
    for k, i in enumerate(order):
        steps = [*((parts.following[j], j) for j in order[k + 1 :]), (parts.close + end, DONE)]
        for state in {i, i + n * n} & states.keys():
            states[state].steps = steps
    return states


def _count_states(parts: Pieces, order: tuple[int, ...], end: str) -> dict[int, _State]:
    """The states of `count` answers: after each label, a later one in `order` that leaves enough for the rest."""
    n = len(order)
    first = [(counted(left + 1, parts.first[i]), i + n * left + n * n) for left in range(n) for i in order[: n - left]]
    states = {START: _State("", [*first, (parts.empty + end, DONE)])}
    states |= {state: _State(beginning) for beginning, state in first}
    for left in reversed(range(n)):
        for k, i in enumerate(order[: n - left]):
            steps = [(parts.following[j], j + n * (left - 1)) for j in order[k + 1 : n - left + 1]]
            state = i + n * left
            if k:
                states[state] = _State(counted(left + 2, parts.first[order[k - 1]]) + parts.following[i])
            for each in {state, state + n * n} & states.keys():
                states[each].steps = steps if left else [(end, DONE)]
    return states


def _encode_arcs(states: dict[int, _State], encode: Callable[[str], list[int]]) -> Arcs:
    """The arcs of all states, with the token ids that are certain at the end of each arc."""
    encode = cache(encode)

    def certain(beginning: str, state: int) -> tuple[int, ...]:
        """The token ids of the beginning of an answer that do not depend on how it is continued."""
        if state == DONE:
            return tuple(encode(beginning))
        steps = states[state].steps
        return tuple(common_beginning([encode(beginning + piece) for piece in ("", steps[0][0], steps[-1][0])]))

    arcs: Arcs = {}
    for state, each in states.items():
        own = certain(each.beginning, state) if state != START else ()
        n_left = len(encode(each.beginning)) - len(own) if state != START else 0
        arcs[state] = []
        for piece, target in each.steps:
            ids = certain(each.beginning + piece, target)[len(own) :]
            if not ids and state != START:
                raise ValueError(f"the tokenizer joins {each.beginning!r} and {piece!r} into one token")
            arcs[state].append(Arc(ids, target, min(n_left, len(ids))))
    return arcs


def common_beginning(sequences: Sequence[Sequence[Any]]) -> list[Any]:
    """The longest list that all sequences begin with."""
    return [each[0] for each in takewhile(lambda each: len(set(each)) == 1, zip(*sequences, strict=False))]


def _merge_first(arcs: Arcs, n: int) -> Arcs:
    """The arcs without the states of first choices that have the arcs of later ones."""
    same = {state + n * n: state for state in arcs if arcs.get(state + n * n) == arcs[state]}
    return {
        state: [arc._replace(target=same.get(arc.target, arc.target)) for arc in own]
        for state, own in arcs.items()
        if state not in same
    }


def encode_answer(grammar: Grammar, choices: Iterable[int]) -> tuple[list[int], list[int]]:
    """The tokens of an answer.

    Args:
        choices: the positions of the labels, in answer order; for `yes_no`, [0] for yes and [1] for no.

    Returns:
        The token ids, end tokens included; and for each token the choice that it names, or -1.
    """
    choices = list(choices)
    n = grammar.settles.shape[2]
    ids: list[int] = []
    named: list[int] = []
    state, last = START, -1
    for k, choice in enumerate([*choices, -1]):
        left = len(choices) - 1 - k if grammar.has_count else 0
        targets = (DONE,) if choice < 0 else (choice + n * left, choice + n * left + n * n)
        arc = next(arc for arc in grammar.arcs[state] if arc.target in targets)
        ids += arc.ids
        named += [last] * arc.n_previous + [choice] * (len(arc.ids) - arc.n_previous)
        state, last = arc.target, choice
    return ids, named


# A piece that may be in progress: state, index of its arc, number of tokens read, and whether the choice that led to
# the state has been settled.
Item = tuple[int, int, int, bool]


def _determinise(arcs: Arcs, n_choices: int, has_count: bool = False) -> Grammar:
    """Subset construction: a node is the set of pieces that may be in progress."""

    def begin(state: int) -> set[Item]:
        items: set[Item] = set()
        for a, arc in enumerate(arcs[state]):
            items |= {(state, a, 0, state == START)} if arc.ids else begin(arc.target)
        return items

    start = frozenset(begin(START))
    number = {start: 0}
    edges: list[_Edge] = []
    todo = [start]
    while todo:
        node = todo.pop()
        taken: dict[int, list[Item]] = {}  # by token
        for item in sorted(node):
            taken.setdefault(arcs[item[0]][item[1]].ids[item[2]], []).append(item)
        for token, items in taken.items():
            settled = _unsettled(items)
            after: set[Item] = set()
            ends = False
            for state, a, read, is_settled in items:
                ids, target, _ = arcs[state][a]
                if read + 1 < len(ids):
                    after.add((state, a, read + 1, is_settled or state in settled))
                elif target == DONE:
                    ends = True
                else:
                    after |= begin(target)
            if ends and after:
                raise ValueError(f"token {token} both ends an answer and continues one")
            if reached := _unsettled(after):
                settled |= reached
                after = {(state, a, read, True) for state, a, read, _ in after}
            key = frozenset(after)
            if not ends and key not in number:
                number[key] = len(number)
                todo.append(key)
            choices = [state % n_choices for state in settled]
            edges.append(_Edge(number[node], token, DONE if ends else number[key], choices))
    return _tabulate(arcs, len(number), edges, n_choices, has_count)


def _unsettled(items: Iterable[Item]) -> set[int]:
    """The state, in a set, that all pieces in progress come from, if the choice that led to it has not been settled."""
    states = {state for state, _, _, _ in items}
    return states if len(states) == 1 and not all(settled for _, _, _, settled in items) else set()


class _Edge(NamedTuple):
    """An edge of the automaton over tokens, with the choices that it settles. The target is DONE for the end."""

    source: int
    token: int
    target: int
    settles: list[int]


def _tabulate(arcs: Arcs, n_nodes: int, edges: list[_Edge], n_choices: int, has_count: bool) -> Grammar:
    """The tables of a grammar, from the number of its nodes (without the end) and its edges."""
    token_ids = np.unique([edge.token for edge in edges])
    next_node = np.full((n_nodes + 1, len(token_ids)), -1, dtype=np.int64)
    settles = np.zeros((*next_node.shape, n_choices), dtype=bool)
    for edge in edges:
        column = np.searchsorted(token_ids, edge.token)
        next_node[edge.source, column] = n_nodes if edge.target == DONE else edge.target
        settles[edge.source, column, edge.settles] = True

    longest = {DONE: 0}
    for state in reversed(arcs):  # arcs lead to later states only
        longest[state] = max(len(arc.ids) + longest[arc.target] for arc in arcs[state])
    return Grammar(arcs, has_count, token_ids, next_node, settles, longest[START])
