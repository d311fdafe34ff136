"""The automaton of all answers, and the jumps through it."""

import itertools

import numpy as np
import pytest

from emogen.model.grammar import build_grammar, encode_answer, find_jumps, spell

ALL_SETS = [chosen for size in range(12) for chosen in itertools.combinations(range(11), size)]


def assert_every_set_is_accepted(grammar):
    assert len(ALL_SETS) == 2**11
    for chosen in ALL_SETS:
        ids, names = encode_answer(grammar, chosen)
        assert grammar.accepts(ids)
        assert len(ids) <= grammar.max_length
        assert tuple(dict.fromkeys(name for name in names if name >= 0)) == chosen


@pytest.mark.parametrize("style", ["list", "count", "json"])
def test_every_set_of_labels_in_canonical_order_is_accepted(encoder_for, style):
    assert_every_set_is_accepted(encoder_for(style).grammar)


@pytest.mark.parametrize("text", ["joy, anger", "joy, joy", "joy,", "", "none, joy", "happy", "joy anger", "Joy"])
def test_other_lists_are_refused(encoder_for, text):
    encoder = encoder_for("list")
    assert not encoder.grammar.accepts([*encoder.plain.encode(text), *encoder.end_ids])


@pytest.mark.parametrize(
    "text", ["2: joy", "1: anger, joy", "0: none", "2: joy, anger", "2: anger, joy, trust", "joy", "12: joy"]
)
def test_lists_with_another_count_are_refused(encoder_for, text):
    encoder = encoder_for("count")
    assert not encoder.grammar.accepts([*encoder.plain.encode(text), *encoder.end_ids])


def test_an_answer_without_its_end_is_refused(encoder_for):
    grammar = encoder_for("list").grammar
    assert not grammar.accepts(encode_answer(grammar, [4])[0][:-1])


def test_end_tokens_are_required_and_must_not_occur_in_an_answer(labels):
    encode = lambda text: [ord(character) for character in text]  # noqa: E731
    with pytest.raises(ValueError, match="at least one token"):
        build_grammar(labels, "list", encode, "")
    with pytest.raises(ValueError, match=f"token {ord(',')} both ends an answer and continues one"):
        build_grammar(labels, "list", encode, ",")


@pytest.mark.parametrize("style", ["list", "count", "json", "yes_no"])
def test_jumps_follow_the_grammar(encoder_for, style):
    grammar = encoder_for(style).grammar
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
        assert reached == jumps.decisions[node, 0]
        assert (grammar.next_node[reached] >= 0).sum() > 1
        path = [int(token) for token in jumps.tokens[node] if token >= 0]
        assert path[: jumps.lengths[node, 0]] == jumps.forced[node]
        if jumps.decisions[node, 1] >= 0:  # all other tokens at the first decision end the answer
            assert walk(node, path) == jumps.decisions[node, 1]
            others = set(np.flatnonzero(grammar.next_node[reached] >= 0)) - {jumps.continuation[reached]}
            assert all(jumps.ends[grammar.next_node[reached, c]] for c in others)


def test_a_jump_after_a_label_includes_the_comma(encoder_for):
    encoder = encoder_for("list")
    grammar, jumps = encoder.grammar, find_jumps(encoder.grammar)
    ids, _ = encode_answer(grammar, [4])  # "joy", which a comma or the end may follow
    node = 0
    for token in ids[: -len(encoder.end_ids)]:
        node = int(grammar.next_node[node, list(grammar.token_ids).index(token)])
    assert jumps.forced[node] == []
    assert int(jumps.tokens[node][0]) == encoder.plain.encode(",")[0]


def test_yes_and_no_leave_no_decision(encoder_for):
    assert find_jumps(encoder_for("yes_no").grammar).ends[1:].all()


def test_answers_are_spelt_from_their_decisions(encoder_for):
    grammar = encoder_for("list").grammar
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
