"""Jumps through the automaton of all answers. (The automaton itself is tested in test_encode.py.)"""

import numpy as np
import pytest

from emogen.model.encode import make_encoder
from emogen.model.grammar import encode_answer, find_jumps, spell
from emogen.task.prompt import load_prompt


def encoder_of(labels, tokenizer, style="list"):
    return make_encoder(tokenizer, load_prompt(f"prompts/{style}.jinja"), labels, style)


@pytest.mark.parametrize("style", ["list", "count", "json", "yes_no"])
def test_jumps_lead_along_the_grammar(labels, tokenizer, style):
    grammar = encoder_of(labels, tokenizer, style).grammar
    jumps = find_jumps(grammar)
    column = {int(token): c for c, token in enumerate(grammar.token_ids)}
    end = len(grammar.next_node) - 1

    def walk(node, ids):
        for token in ids:
            node = grammar.next_node[node, column[token]]
            assert node >= 0
        return node

    for node in range(end):
        reached = walk(node, jumps.forced[node])
        if jumps.ends[node]:
            assert reached == end
            continue
        assert reached == jumps.choice[node, 0]
        assert (grammar.next_node[reached] >= 0).sum() > 1
        path = [int(token) for token in jumps.tokens[node] if token >= 0]
        assert path[: jumps.length[node, 0]] == jumps.forced[node]
        if jumps.choice[node, 1] >= 0:  # all other ways from the first choice end the answer
            assert walk(node, path) == jumps.choice[node, 1]
            others = set(np.flatnonzero(grammar.next_node[reached] >= 0)) - {jumps.on[reached]}
            assert all(jumps.ends[grammar.next_node[reached, c]] for c in others)


def test_a_comma_is_run_along_and_a_single_answer_is_never_stepped_through(labels, tokenizer):
    encoder = encoder_of(labels, tokenizer)
    grammar, jumps = encoder.grammar, find_jumps(encoder.grammar)
    ids, _ = encode_answer(grammar, [4])  # "joy", which may be followed by a comma or the end
    node = 0
    for token in ids[: -len(encoder.end_ids)]:
        node = int(grammar.next_node[node, list(grammar.token_ids).index(token)])
    assert jumps.forced[node] == []
    assert int(jumps.tokens[node][0]) == encoder.plain.encode(",")[0]
    yes_no = encoder_of(labels, tokenizer, "yes_no").grammar
    assert find_jumps(yes_no).ends[1:].all()  # after the word itself, nothing is left to choose


def test_answers_are_spelt_by_their_choices(labels, tokenizer):
    grammar = encoder_of(labels, tokenizer).grammar
    jumps = find_jumps(grammar)
    for choices in ([], [0], [10], [0, 4, 10], list(range(11))):
        ids, _ = encode_answer(grammar, choices)
        node, columns = 0, []
        for token in ids:
            c = list(grammar.token_ids).index(token)
            if (grammar.next_node[node] >= 0).sum() > 1:
                columns.append(c)
            node = int(grammar.next_node[node, c])
        assert spell(grammar, jumps, columns) == ids
