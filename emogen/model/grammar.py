"""All valid answers as one automaton over a tokenizer's ids.

The grammar is built from the tokenizer, never from guesses about it: a label may be several tokens, and a comma or
a space before it may change them. Training targets are made from the same pieces (`encode_answer`), so what the model
learns to say is exactly what constrained decoding lets it say.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from emogen.task.answer import NO, YES, counted, pieces
from emogen.task.labels import LabelSet

# States. Of C choices, the state i + C n >= 0 is "choice i was the last one made", and n more are to come where an
# answer says how many there are (`count`).
START, DONE = -1, -2
Arcs = dict[int, list[tuple[tuple[int, ...], int]]]  # state -> (the token ids of a piece, the state after it)


@dataclass(frozen=True)
class Grammar:
    """A deterministic automaton of N nodes over the R tokens that can occur. Node 0 is the start, node N-1 the end.

    Attributes:
        arcs: the pieces that it was made from.
        counted: whether an answer begins with the number of its choices.
        token_ids: int64 [R], the vocabulary ids that can occur, ascending.
        next_node: int64 [N, R], the node after each token, or -1 where the token is not allowed.
        settles: bool [N, R, C], the choices (labels; yes and no) that are known to be made once a token is taken.
        max_length: the number of tokens of the longest answer, end tokens included.
    """

    arcs: Arcs
    counted: bool
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
    """What to run through the model on arriving at each of a grammar's N nodes, so that no step decides nothing.

    A node with one way out is never asked about: the tokens up to the next choice go along. And where all ways but one
    end the answer (a comma, or the end of the turn), the one that goes on is run along as well, up to the next choice
    after it: if the model ends there, nothing more was to come and nothing is lost; if it goes on, a step is saved.

    Attributes:
        forced: the tokens that must follow each node, up to the first choice or the end.
        ends: bool [N], whether that is the end.
        tokens: int64 [N, M], what to run: `forced`, and the way on as far as it goes; filled up with -1.
        choice: int64 [N, 2], the nodes of the first choice and of the one on the way on, or -1.
        length: int64 [N, 2], how many of `tokens` lead up to each choice.
        on: int64 [N], for a node of a choice with one way on, the column of that token, or -1.
        settles: bool [N, R, C], as the grammar's, with what the tokens forced after each token settle.
    """

    forced: list[list[int]]
    ends: np.ndarray
    tokens: np.ndarray
    choice: np.ndarray
    length: np.ndarray
    on: np.ndarray
    settles: np.ndarray


def find_jumps(grammar: Grammar) -> Jumps:
    """The jumps of a grammar (known as jump-forward decoding; here the way on is taken along too)."""
    next_node, n_nodes = grammar.next_node, len(grammar.next_node)
    end = n_nodes - 1

    def run(node: int) -> tuple[list[int], int, np.ndarray]:
        tokens, settled = [], np.zeros(grammar.settles.shape[2], dtype=bool)
        while node != end and (next_node[node] >= 0).sum() == 1:
            column = int(next_node[node].argmax())
            tokens.append(int(grammar.token_ids[column]))
            settled |= grammar.settles[node, column]
            node = int(next_node[node, column])
        return tokens, node, settled

    runs = [run(node) for node in range(n_nodes)]
    ends = np.array([node == end for _, node, _ in runs])
    after = np.stack([settled for _, _, settled in runs])  # [N, C]
    settles = grammar.settles | (after[next_node] & (next_node >= 0)[:, :, None])
    on = np.full(n_nodes, -1)
    for node in range(n_nodes):
        ways_on = [c for c in np.flatnonzero(next_node[node] >= 0) if not ends[next_node[node, c]]]
        if len(ways_on) == 1:
            on[node] = ways_on[0]

    tokens, choice, length = [], np.full((n_nodes, 2), -1), np.zeros((n_nodes, 2), dtype=np.int64)
    for node, (forced, first, _) in enumerate(runs):
        path = list(forced)
        if not ends[node]:
            choice[node, 0], length[node, 0] = first, len(path)
            if on[first] >= 0:
                beyond, second, _ = runs[next_node[first, on[first]]]
                path += [int(grammar.token_ids[on[first]]), *beyond]
                choice[node, 1], length[node, 1] = second, len(path)
        tokens.append(path)
    width = max(map(len, tokens))
    padded = np.array([path + [-1] * (width - len(path)) for path in tokens], dtype=np.int64).reshape(n_nodes, width)
    return Jumps([forced for forced, _, _ in runs], ends, padded, choice, length, on, settles)


def spell(grammar: Grammar, jumps: Jumps, columns: Iterable[int]) -> list[int]:
    """The token ids of an answer, end tokens included, by the columns of `token_ids` taken at its choices."""
    node, left = 0, iter(columns)
    ids: list[int] = []
    while True:
        ids += jumps.forced[node]
        if jumps.ends[node]:
            return ids
        column = next(left)
        ids.append(int(grammar.token_ids[column]))
        node = int(grammar.next_node[jumps.choice[node, 0], column])


def build_grammar(label_set: LabelSet, style: str, encode: Callable[[str], list[int]], end: list[int]) -> Grammar:
    """The grammar of an answer style.

    `list`, `json`: labels of the set in the order of `LabelSet.answer_order`, each at most once, or the empty answer.
    `count`: a list after its number of labels. `yes_no`: one word.

    Args:
        encode: plain text -> token ids, without special tokens.
        end: the ids that close the assistant's turn; at least one, and none that occurs within an answer.
    """
    if not end:
        raise ValueError("an answer needs at least one token that ends it")
    arcs: Arcs
    if style == "yes_no":
        arcs = {START: [(tuple(encode(word)), i) for i, word in enumerate((YES, NO))]}
        arcs |= {i: [(tuple(end), DONE)] for i in range(2)}
        return _determinise(arcs, 2)
    parts = pieces(label_set, "list" if style == "count" else style)
    order, n = label_set.answer_order, len(label_set)
    close = (*(encode(parts.close) if parts.close else ()), *end)
    nothing = ((*encode(parts.empty), *end), DONE)
    following = [tuple(encode(parts.following[i])) for i in order]
    if style != "count":
        arcs = {START: [*((tuple(encode(parts.first[i])), i) for i in order), nothing]}
        arcs |= {i: [*zip(following[k + 1 :], order[k + 1 :], strict=True), (close, DONE)] for k, i in enumerate(order)}
        return _determinise(arcs, n)
    first = [
        (tuple(encode(counted(left + 1, parts.first[i]))), i + n * left)
        for left in range(n)
        for i in order[: n - left]  # as many have to come after it
    ]
    arcs = {START: [*first, nothing]}
    for left in range(n - 1, 0, -1):
        for k, i in enumerate(order[: n - left]):
            later = range(k + 1, n - left + 1)
            arcs[i + n * left] = [(following[m], order[m] + n * (left - 1)) for m in later]
    arcs |= {i: [(close, DONE)] for i in order}
    return _determinise(arcs, n, with_count=True)


def encode_answer(grammar: Grammar, choices: Iterable[int]) -> tuple[list[int], list[int]]:
    """The token ids of an answer, end tokens included; and, as many, the choice that each one belongs to (or -1).

    Args:
        choices: the positions of the labels, in their order; for `yes_no`, [0] for yes and [1] for no.
    """
    choices = list(choices)
    ids: list[int] = []
    of: list[int] = []
    state = START
    for left, choice in zip(range(len(choices) - 1, -2, -1), [*choices, -1], strict=True):
        n_choices = grammar.settles.shape[2]
        target = DONE if choice < 0 else choice + n_choices * left if grammar.counted else choice
        piece, state = next(arc for arc in grammar.arcs[state] if arc[1] == target)
        ids += piece
        of += [choice] * len(piece)
    return ids, of


def _determinise(arcs: Arcs, n_choices: int, *, with_count: bool = False) -> Grammar:
    """Subset construction. A node is the set of pieces that may be under way, each as (state, arc, tokens read)."""

    def entry(state: int) -> frozenset[tuple[int, int, int]]:
        return frozenset((state, a, 0) for a in range(len(arcs[state])))

    start = entry(START)
    number = {start: 0}
    edges: list[tuple[int, int, int]] = []  # node, token, next node (DONE for the end)
    todo = [start]
    while todo:
        node = todo.pop()
        after: dict[int, set[tuple[int, int, int]]] = {}
        done: set[int] = set()
        for state, a, read in node:
            ids, target = arcs[state][a]
            items = after.setdefault(ids[read], set())
            if read + 1 < len(ids):
                items.add((state, a, read + 1))
            elif target == DONE:
                done.add(ids[read])
            else:
                items |= entry(target)
        for token, items in after.items():
            if token in done:
                if items:
                    raise ValueError(f"token {token} ends an answer and also goes on with one")
                edges.append((number[node], token, DONE))
                continue
            key = frozenset(items)
            if key not in number:
                number[key] = len(number)
                todo.append(key)
            edges.append((number[node], token, number[key]))

    token_ids = np.unique([token for _, token, _ in edges])
    next_node = np.full((len(number) + 1, len(token_ids)), -1, dtype=np.int64)
    settles = np.zeros((*next_node.shape, n_choices), dtype=bool)
    items_of = list(number)
    made = [_made(items, n_choices) for items in items_of]
    for source, token, target in edges:
        column = np.searchsorted(token_ids, token)
        next_node[source, column] = len(number) if target == DONE else target
        if target != DONE and made[target] is not None:
            settles[source, column, made[target]] = True
        if made[source] is None:  # where one piece begins with another one, what follows tells which it was
            begun = {state for state, a, read in items_of[source] if read == 0 and arcs[state][a][0][0] == token}
            settles[source, column, [state % n_choices for state in begun - {START}]] = True

    longest = {DONE: 0}
    for state in reversed(arcs):  # arcs lead to later states
        longest[state] = max(len(ids) + longest[target] for ids, target in arcs[state])
    return Grammar(arcs, with_count, token_ids, next_node, settles, longest[START])


def _made(items: Iterable[tuple[int, int, int]], n_choices: int) -> int | None:
    """The choice that was certainly the last one made where these pieces may be under way, or None."""
    made = {state % n_choices if read == 0 and state != START else None for state, _, read in items}
    return made.pop() if len(made) == 1 else None
