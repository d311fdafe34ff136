"""All valid answers as one automaton over a tokenizer's ids.

The grammar is built from the tokenizer, never from guesses about it: a label may be several tokens, and a comma or
a space before it may change them. Training targets are made from the same pieces (`encode_answer`), so what the model
learns to say is exactly what constrained decoding lets it say.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from emogen.answer import NO, YES, pieces
from emogen.labels import LabelSet

START, DONE = -1, -2  # states; the state i >= 0 is "choice i was the last one made"
Arcs = dict[int, list[tuple[tuple[int, ...], int]]]  # state -> (the token ids of a piece, the state after it)


@dataclass(frozen=True)
class Grammar:
    """A deterministic automaton of N nodes over the R tokens that can occur. Node 0 is the start, node N-1 the end.

    Attributes:
        arcs: the pieces that it was made from.
        token_ids: int64 [R], the vocabulary ids that can occur, ascending.
        next_node: int64 [N, R], the node after each token, or -1 where the token is not allowed.
        max_length: the number of tokens of the longest answer, end tokens included.
    """

    arcs: Arcs
    token_ids: np.ndarray
    next_node: np.ndarray
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


def build_grammar(label_set: LabelSet, style: str, encode: Callable[[str], list[int]], end: list[int]) -> Grammar:
    """The grammar of an answer style.

    `list`, `json`: labels of the set in canonical order, each at most once, or the empty answer. `yes_no`: one word.

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
    else:
        parts = pieces(label_set, style)
        first = [(tuple(encode(piece)), i) for i, piece in enumerate(parts.first)]
        following = [(tuple(encode(piece)), i) for i, piece in enumerate(parts.following)]
        close = (*(encode(parts.close) if parts.close else ()), *end)
        arcs = {START: [*first, ((*encode(parts.empty), *end), DONE)]}
        arcs |= {i: [*following[i + 1 :], (close, DONE)] for i in range(len(label_set))}
    return _determinise(arcs)


def encode_answer(grammar: Grammar, choices: Iterable[int]) -> list[int]:
    """The token ids of an answer, end tokens included.

    Args:
        choices: `list`, `json`: the positions of the labels, ascending; `yes_no`: [0] for yes, [1] for no.
    """
    ids: list[int] = []
    state = START
    for choice in (*choices, DONE):
        piece, state = next(arc for arc in grammar.arcs[state] if arc[1] == choice)
        ids += piece
    return ids


def _determinise(arcs: Arcs) -> Grammar:
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
    for source, token, target in edges:
        next_node[source, np.searchsorted(token_ids, token)] = len(number) if target == DONE else target

    longest = {DONE: 0}
    for state in sorted(arcs, reverse=True):  # arcs lead to later states, START (-1) comes last
        longest[state] = max(len(ids) + longest[target] for ids, target in arcs[state])
    return Grammar(arcs, token_ids, next_node, longest[START])
