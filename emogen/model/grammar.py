"""All valid answers as one automaton over the token ids of a tokenizer.

The grammar is built with the tokenizer itself, because a label may be several tokens, and a comma or a space before it
may change them. Training targets are made of the same pieces (`encode_answer`), so a model is trained on exactly the
token sequences that constrained decoding allows.

Terms: a piece is a part of an answer that is encoded as a whole, such as `anger` or `, joy`. A choice is a label, or
yes or no. A node is a state of the automaton over tokens; a node with several allowed tokens is a decision. A jump is
what a node leaves no decision about: the tokens from there to the next decision (see `Jumps`).

Shapes: N nodes, R tokens that can occur in an answer, C choices.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from emogen.task.answer import NO, YES, Pieces, counted, pieces
from emogen.task.labels import LabelSet

# The states of the automaton over pieces. State i + C k means that choice i has been made last and k more choices must
# follow; k is 0 unless the answer begins with the number of its labels (style `count`).
START, DONE = -1, -2
Arcs = dict[int, list[tuple[tuple[int, ...], int]]]  # state -> [(token ids of a piece, next state)]


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


def build_grammar(label_set: LabelSet, style: str, encode: Callable[[str], list[int]], end: list[int]) -> Grammar:
    """The grammar of an answer style.

    `list`, `json`: labels in the order of `LabelSet.answer_order`, each at most once, or the empty answer.
    `count`: the number of labels, then a list. `yes_no`: one word. If the label set says `exactly_one`, a list has one
    label, and there is no empty answer.

    Args:
        encode: plain text -> token ids, without special tokens.
        end: the ids that end the assistant's turn; at least one, and none that occurs within an answer.

    Raises:
        ValueError: `end` is empty, or one of its ids occurs within an answer; or `count` is asked of `exactly_one`.
    """
    if not end:
        raise ValueError("an answer needs at least one token that ends it")
    if style == "yes_no":
        arcs: Arcs = {START: [(tuple(encode(word)), i) for i, word in enumerate((YES, NO))]}
        arcs |= {i: [(tuple(end), DONE)] for i in range(2)}
        return _determinise(arcs, 2)
    parts = pieces(label_set, "list" if style == "count" else style)
    if label_set.exactly_one and style == "count":
        raise ValueError("count answers need label sets in which a text can have several labels")
    make_arcs = _single_arcs if label_set.exactly_one else _count_arcs if style == "count" else _list_arcs
    return _determinise(make_arcs(parts, label_set.answer_order, encode, end), len(label_set), style == "count")


def _single_arcs(parts: Pieces, order: tuple[int, ...], encode: Callable[[str], list[int]], end: list[int]) -> Arcs:
    """The arcs of answers with exactly one label."""
    close = (*(encode(parts.close) if parts.close else ()), *end)
    arcs: Arcs = {START: [(tuple(encode(parts.first[i])), i) for i in order]}
    return arcs | {i: [(close, DONE)] for i in order}


def _list_arcs(parts: Pieces, order: tuple[int, ...], encode: Callable[[str], list[int]], end: list[int]) -> Arcs:
    """The arcs of `list` and `json` answers: after each label, a later one in `order` or the end."""
    close = (*(encode(parts.close) if parts.close else ()), *end)
    following = [tuple(encode(parts.following[i])) for i in order]
    first = [(tuple(encode(parts.first[i])), i) for i in order]
    arcs: Arcs = {START: [*first, ((*encode(parts.empty), *end), DONE)]}
    return arcs | {
        i: [*zip(following[k + 1 :], order[k + 1 :], strict=True), (close, DONE)] for k, i in enumerate(order)
    }


def _count_arcs(parts: Pieces, order: tuple[int, ...], encode: Callable[[str], list[int]], end: list[int]) -> Arcs:
    """The arcs of `count` answers: after each label, a later one in `order` that leaves enough labels for the rest."""
    n = len(order)
    following = [tuple(encode(parts.following[i])) for i in order]
    first = [
        (tuple(encode(counted(left + 1, parts.first[i]))), i + n * left) for left in range(n) for i in order[: n - left]
    ]
    arcs: Arcs = {START: [*first, ((*encode(parts.empty), *end), DONE)]}
    for left in range(n - 1, 0, -1):
        for k, i in enumerate(order[: n - left]):
            later = range(k + 1, n - left + 1)
            arcs[i + n * left] = [(following[m], order[m] + n * (left - 1)) for m in later]
    return arcs | {i: [(tuple(end), DONE)] for i in order}


def encode_answer(grammar: Grammar, choices: Iterable[int]) -> tuple[list[int], list[int]]:
    """The tokens of an answer.

    Args:
        choices: the positions of the labels, in answer order; for `yes_no`, [0] for yes and [1] for no.

    Returns:
        The token ids, end tokens included; and for each token the choice that it names, or -1.
    """
    choices = list(choices)
    n_choices = grammar.settles.shape[2]
    states = [
        choice + n_choices * (len(choices) - 1 - k) if grammar.has_count else choice for k, choice in enumerate(choices)
    ]
    ids: list[int] = []
    named: list[int] = []
    state = START
    for choice, next_state in zip([*choices, -1], [*states, DONE], strict=True):
        piece = next(piece for piece, target in grammar.arcs[state] if target == next_state)
        ids += piece
        named += [choice] * len(piece)
        state = next_state
    return ids, named


Item = tuple[int, int, int]  # a piece that may be in progress: (state, index of its arc, number of tokens read)


def _determinise(arcs: Arcs, n_choices: int, has_count: bool = False) -> Grammar:
    """Subset construction: a node is the set of pieces that may be in progress."""

    def begin(state: int) -> frozenset[Item]:
        return frozenset((state, a, 0) for a in range(len(arcs[state])))

    start = begin(START)
    number = {start: 0}
    edges: list[tuple[int, int, int]] = []  # node, token, next node (DONE for the end)
    todo = [start]
    while todo:
        node = todo.pop()
        after: dict[int, set[Item]] = {}  # by token
        ending: set[int] = set()  # the tokens that end the answer
        for state, a, read in node:
            ids, target = arcs[state][a]
            items = after.setdefault(ids[read], set())
            if read + 1 < len(ids):
                items.add((state, a, read + 1))
            elif target == DONE:
                ending.add(ids[read])
            else:
                items |= begin(target)
        for token, items in after.items():
            if token in ending:
                if items:
                    raise ValueError(f"token {token} both ends an answer and continues one")
                edges.append((number[node], token, DONE))
                continue
            key = frozenset(items)
            if key not in number:
                number[key] = len(number)
                todo.append(key)
            edges.append((number[node], token, number[key]))
    return _tabulate(arcs, list(number), edges, n_choices, has_count)


def _tabulate(
    arcs: Arcs, nodes: list[frozenset[Item]], edges: list[tuple[int, int, int]], n_choices: int, has_count: bool
) -> Grammar:
    """The tables of a grammar, from its nodes (without the end) and its edges (node, token, next node)."""
    token_ids = np.unique([token for _, token, _ in edges])
    next_node = np.full((len(nodes) + 1, len(token_ids)), -1, dtype=np.int64)
    settles = np.zeros((*next_node.shape, n_choices), dtype=bool)
    last_choice = [_last_choice(items, n_choices) for items in nodes]
    for source, token, target in edges:
        column = np.searchsorted(token_ids, token)
        next_node[source, column] = len(nodes) if target == DONE else target
        if target != DONE and last_choice[target] is not None:
            settles[source, column, last_choice[target]] = True
        if last_choice[source] is None:
            # One piece is the beginning of another. The token that begins the next piece tells which one it was.
            begun = {state for state, a, read in nodes[source] if read == 0 and arcs[state][a][0][0] == token}
            settles[source, column, [state % n_choices for state in begun - {START}]] = True

    longest = {DONE: 0}
    for state in reversed(arcs):  # arcs lead to later states only
        longest[state] = max(len(ids) + longest[target] for ids, target in arcs[state])
    return Grammar(arcs, has_count, token_ids, next_node, settles, longest[START])


def _last_choice(items: Iterable[Item], n_choices: int) -> int | None:
    """The choice that was certainly made last if one of these pieces is in progress, or None."""
    made = {state % n_choices if read == 0 and state != START else None for state, _, read in items}
    return made.pop() if len(made) == 1 else None
