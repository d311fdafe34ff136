"""The probability of each label over all answers of the grammar; and the log-likelihood of given answers.

The search over the answers passes through the greedy one, so answers and probabilities come from one pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from emogen.errors import ModelError
from emogen.model import shared_prefix
from emogen.model.decode import KeptPrefix, Progress, Reachable, compute_prefix, in_batches, reachable_logits
from emogen.model.encode import Encoder, Row
from emogen.model.grammar import Grammar, find_jumps, spell
from emogen.model.plain_rows import evaluating, last_logits, logits_at, pads, require_length
from emogen.model.shared_prefix import shares_prefix


@torch.inference_mode()
def probabilities(
    model: PreTrainedModel,
    encoder: Encoder,
    suffixes: Sequence[list[int]],
    questions: Sequence[Sequence[list[int]]] | None = None,
    *,
    how: str = "marginal",
    floor: float = 0.002,
    width: int | None = 16,
    batch_size: int = 32,
    progress: Progress | None = None,
    kept: KeptPrefix | None = None,
) -> np.ndarray:
    """The probability that an answer contains each label.

    `marginal`: over all answers of the grammar. P(label) is the sum over all beginnings of an answer: the probability
    of the beginning times the probability that the label comes next. Beginnings are followed breadth first. Improbable
    ones are not followed, so the result is a lower bound. It is exact with `floor` 0 and `width` None.

    `maximum`: cheaper, but not a probability of anything. It is the highest probability that the label had of coming
    next, at any step of the greedy answer and at its end (arXiv 2505.17510).

    Args:
        suffixes: n lists of token ids: what each row has after the prefix, without an answer.
        questions: for each row K lists of token ids, each of which follows the row separately; the row itself is
            computed once. By default, nothing follows.
        how: `marginal` or `maximum`.
        floor: beginnings of this probability or less are not followed.
        width: the number of beginnings of a row that are followed at each depth, the most probable ones; None for all.
        kept: see `compute_prefix`.

    Returns:
        float32 [n, K, C], C the choices of the grammar: L labels, or yes and no (`yes_no`, always exact).

    Raises:
        ModelError: the model computes NaN, or cannot compute such rows.
    """
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "kept": kept}
    return _search(model, encoder, suffixes, questions, how=how, floor=floor, width=width, **options)[0]


@torch.inference_mode()
def generate_with_probabilities(
    model: PreTrainedModel,
    encoder: Encoder,
    suffixes: Sequence[list[int]],
    *,
    how: str = "marginal",
    floor: float = 0.002,
    width: int | None = 16,
    batch_size: int = 32,
    progress: Progress | None = None,
    kept: KeptPrefix | None = None,
) -> tuple[list[list[int]], np.ndarray]:
    """The answers of `decode.generate` and the probabilities of `probabilities`, in one pass.

    Arguments and errors are those of `probabilities`.

    Returns:
        n lists of token ids: the greedy answers under the grammar, without end tokens; and float32 [n, C].
    """
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "kept": kept}
    prob, answers = _search(model, encoder, suffixes, None, how=how, floor=floor, width=width, **options)
    return answers, prob[:, 0]


def _search(
    model: PreTrainedModel,
    encoder: Encoder,
    suffixes: Sequence[list[int]],
    questions: Sequence[Sequence[list[int]]] | None,
    *,
    how: str,
    floor: float,
    width: int | None,
    batch_size: int,
    progress: Progress | None,
    kept: KeptPrefix | None,
) -> tuple[np.ndarray, list[list[int]]]:
    """The probabilities [n, K, C] of `probabilities`, and the n K greedy answers without end tokens."""
    n_questions = len(questions[0]) if questions else 1
    n_choices = encoder.grammar.settles.shape[2]
    if not suffixes:
        return np.zeros((0, n_questions, n_choices), dtype=np.float32), []
    rows = [_Text(ids, questions[i] if questions else [[]]) for i, ids in enumerate(suffixes)]
    n_rest = max(len(row) + max(map(len, row.questions)) for row in rows) + encoder.grammar.max_length
    longest = len(encoder.prefix_ids) + n_rest
    require_length(model, longest)
    with evaluating(model):
        shared = shares_prefix(model, encoder.prefix_ids, longest)
        padded = shared or pads(model, encoder.prefix_ids, longest)
        with reachable_logits(model, encoder) as reachable:
            branches = (
                _SharedPrefixBranches(model, encoder, reachable, compute_prefix(model, encoder, kept))
                if shared
                else _PlainBranches(model, encoder, reachable, padded)
            )
            search = _Search(branches, how == "maximum", floor, width)
            found = in_batches(search.run, rows, batch_size, progress)
    prob = np.array([row_prob for row_prob, _ in found], dtype=np.float32).reshape(-1, n_questions, n_choices)
    if np.isnan(prob).any():
        raise ModelError("the model computes NaN: its training has diverged (a lower learning_rate may help)")
    columns = [taken for _, of_questions in found for taken in of_questions]
    n_end = len(encoder.end_ids)
    return prob, [spell(encoder.grammar, branches.jumps, taken)[:-n_end] for taken in columns]


@torch.inference_mode()
def log_likelihood(
    model: PreTrainedModel,
    encoder: Encoder,
    rows: Sequence[Row],
    *,
    among_valid: bool = False,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> np.ndarray:
    """The log-likelihood of given answers: ln P(answer and its end | prompt).

    Args:
        rows: n rows with their answers.
        among_valid: among the answers of the grammar alone, whose probabilities sum to 1, instead of over the whole
            vocabulary. What a prompt tells the model of the form of an answer then makes no difference.

    Returns:
        float32 [n], in nats; 0 is certainty.
    """
    longest = len(encoder.prefix_ids) + max(map(len, rows), default=0)
    require_length(model, longest)
    grammar = encoder.grammar if among_valid else None
    with evaluating(model):
        if rows and shares_prefix(model, encoder.prefix_ids, longest):
            prefix = compute_prefix(model, encoder)
            step = partial(_packed_log_likelihood, model, prefix, grammar)
        else:
            step = partial(_plain_log_likelihood, model, encoder, grammar)
        return np.array(in_batches(step, rows, batch_size, progress), dtype=np.float32)


def _packed_log_likelihood(
    model: PreTrainedModel, prefix: shared_prefix.PrefixLayout, grammar: Grammar | None, rows: list[Row]
) -> list[float]:
    ids = torch.tensor([i for row in rows for i in row.suffix_ids], device=model.device)
    ends = torch.tensor([len(row) for row in rows]).cumsum(0).tolist()
    answers = torch.cat([torch.arange(end - row.n_answer, end) for row, end in zip(rows, ends, strict=True)])
    layout = shared_prefix.DecodingLayout(prefix, [len(row) for row in rows])
    logits = shared_prefix.forward(model, layout, ids, logits_to_keep=answers.to(model.device) - 1).logits[0]
    log_prob = _log_prob(logits, rows, grammar)
    return [float(part.sum()) for part in log_prob.split([row.n_answer for row in rows])]


def _plain_log_likelihood(
    model: PreTrainedModel, encoder: Encoder, grammar: Grammar | None, rows: list[Row]
) -> list[float]:
    found = []
    for row in rows:  # one at a time, because the answers are at different positions
        ids = torch.tensor([*encoder.prefix_ids, *row.suffix_ids], device=model.device)
        positions = torch.arange(len(ids) - row.n_answer - 1, len(ids) - 1, device=model.device)
        logits = logits_at(model, positions, input_ids=ids[None])[0]
        found.append(float(_log_prob(logits, [row], grammar).sum()))
    return found


def _log_prob(logits: torch.Tensor, rows: Sequence[Row], grammar: Grammar | None) -> torch.Tensor:
    """The log-probabilities [T] of the T tokens of some answers, which `logits` [T, V] predict.

    Args:
        grammar: only tokens that it allows there are possible; None for all.
    """
    answers = [row.suffix_ids[len(row) - row.n_answer :] for row in rows]
    if grammar is None:
        ids = torch.tensor([i for answer in answers for i in answer], device=logits.device)
        return logits.float().log_softmax(1).gather(1, ids[:, None])[:, 0]
    nodes, columns = [], []
    for answer in answers:
        node = 0
        for column in np.searchsorted(grammar.token_ids, answer).tolist():
            nodes.append(node)
            columns.append(column)
            node = int(grammar.next_node[node, column])
    allowed = torch.from_numpy(grammar.next_node[nodes] >= 0).to(logits.device)  # [T, R]
    reachable = logits[:, torch.from_numpy(grammar.token_ids).to(logits.device)].float()
    log_prob = reachable.masked_fill(~allowed, -torch.inf).log_softmax(1)
    return log_prob.gather(1, torch.tensor(columns, device=logits.device)[:, None])[:, 0]


@dataclass(frozen=True)
class _Text:
    """A row without its answer, and the K lists of token ids that follow it."""

    ids: list[int]
    questions: Sequence[list[int]]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class _Beam:
    """A beginnings of answers, each of which stands at a decision.

    Attributes:
        row: int64 [A], the row that each belongs to, ascending; row b K + k is question k on text b.
        node: int64 [A], the node of the decision.
        log_prob: float32 [A], of the beginning; for `maximum`, of the tokens since the last label. It is -inf for a
            beginning that is followed for the greedy answer alone, so that it adds nothing to a probability.
        is_greedy: bool [A], whether it is the beginning of the greedy answer.
    """

    row: torch.Tensor
    node: torch.Tensor
    log_prob: torch.Tensor
    is_greedy: torch.Tensor


class _Search:
    """The search over the beginnings of answers; see `probabilities`.

    Shapes: A beginnings of answers, R tokens that can occur, C choices.
    """

    def __init__(
        self, branches: "_SharedPrefixBranches | _PlainBranches", maximum: bool, floor: float, width: int | None
    ):
        self.branches, self.floor, self.width = branches, floor, width
        self.step = self._maximum_step if maximum else self._marginal_step
        grammar, jumps = branches.grammar, branches.jumps
        self.next_node, self.decision, self.ends, self.settles, self.token_ids = (
            torch.from_numpy(table).to(branches.device)
            for table in (grammar.next_node, jumps.decisions[:, 0], jumps.ends, jumps.settles, grammar.token_ids)
        )
        self.forced = _padded(jumps.forced, branches.device)

    def run(self, texts: list[_Text]) -> list[tuple[list[list[float]], list[list[int]]]]:
        """B texts with K questions each -> for each text: probabilities [K][C], and the columns of K greedy answers."""
        logits = self._begin(texts)  # [A, R]
        n_questions = len(texts[0].questions)
        first = torch.arange(len(texts) * n_questions, device=self.branches.device)
        beam = _Beam(
            row=first,
            node=self.decision[torch.zeros_like(first)],
            log_prob=torch.zeros(len(first), device=first.device),
            is_greedy=torch.ones_like(first, dtype=torch.bool),
        )
        prob = torch.zeros(len(first), self.settles.shape[2], device=first.device)  # [B K, C]
        taken = []  # for each step the columns of the greedy answers, int64 [B K], -1 for those that have ended
        while True:
            targets = self.next_node[beam.node]  # [A, R]
            allowed = logits.float().masked_fill(targets < 0, -torch.inf)
            best = allowed.argmax(1)
            taken.append(torch.full_like(first, -1).index_copy(0, beam.row[beam.is_greedy], best[beam.is_greedy]))
            is_greedy = functional.one_hot(best, targets.shape[1]).bool() & beam.is_greedy[:, None]
            log_prob, is_probable = self.step(beam, allowed.log_softmax(1), prob)  # each [A, R]
            goes_on = (targets >= 0) & ~self.ends[targets.clamp(min=0)]
            parent, column = (goes_on & (is_probable | is_greedy)).nonzero(as_tuple=True)
            reached = targets[parent, column]
            longer = _Beam(
                beam.row[parent], self.decision[reached], log_prob[parent, column], is_greedy[parent, column]
            )
            beam, kept = _most_probable(longer, self.width)
            if not len(kept):
                break
            ids = torch.cat([self.token_ids[column][:, None], self.forced[reached]], 1)
            logits = self.branches.extend(parent[kept], ids[kept])
        columns = [[c for c in of_row if c >= 0] for of_row in torch.stack(taken, 1).tolist()]
        return [
            (of_text, columns[k * n_questions : (k + 1) * n_questions])
            for k, of_text in enumerate(prob.clamp(max=1).unflatten(0, (len(texts), n_questions)).tolist())
        ]

    def _begin(self, texts: list[_Text]) -> torch.Tensor:
        """The logits [B K, R] of the first decision."""
        forced = self.branches.jumps.forced[0]
        n_questions = len(texts[0].questions)
        if n_questions == 1:
            return self.branches.begin([[*text.ids, *text.questions[0], *forced] for text in texts])
        self.branches.begin([text.ids for text in texts])
        ids = _padded([[*question, *forced] for text in texts for question in text.questions], self.branches.device)
        parents = torch.arange(len(texts), device=self.branches.device).repeat_interleave(n_questions)
        return self.branches.extend(parents, ids)

    def _marginal_step(
        self, beam: _Beam, next_log_prob: torch.Tensor, prob: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add to `prob` [B K, C] what the next tokens settle.

        Args:
            next_log_prob: [A, R], of the next token among the allowed ones.

        Returns:
            [A, R] each: the log-probability of each longer beginning, -inf if it is not followed for its probability;
            and whether it is.
        """
        log_prob = beam.log_prob[:, None] + next_log_prob
        settled = self.settles[beam.node]  # [A, R, C]
        prob.index_add_(0, beam.row, torch.einsum("ar,arc->ac", log_prob.exp(), settled.float()))
        is_probable = log_prob.exp() > self.floor
        return log_prob.masked_fill(~is_probable, -torch.inf), is_probable

    def _maximum_step(
        self, beam: _Beam, next_log_prob: torch.Tensor, prob: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Raise `prob` [B K, C] to what the next tokens settle, if that is more.

        All beginnings of the next label are followed, but after a label only the greedy answer is.

        Args:
            next_log_prob: [A, R], of the next token among the allowed ones.

        Returns:
            [A, R] each: the log-probability of each longer beginning since the last label; and whether it is followed
            for its probability.
        """
        log_prob = beam.log_prob[:, None] + next_log_prob
        settled = self.settles[beam.node]  # [A, R, C]
        highest = (log_prob.exp()[:, :, None] * settled).amax(1)  # [A, C]
        prob.scatter_reduce_(0, beam.row[:, None].expand_as(highest), highest, "amax")
        names_label = settled.any(2)
        return log_prob.masked_fill(names_label, 0.0), ~names_label & (log_prob.exp() > self.floor)


def _padded(rows: Sequence[list[int]], device: torch.device) -> torch.Tensor:
    """Lists of token ids -> int64 [n, longest], padded with -1."""
    longest = max(map(len, rows))
    return torch.tensor([[*ids, *[-1] * (longest - len(ids))] for ids in rows], device=device)


def _most_probable(beam: _Beam, width: int | None) -> tuple[_Beam, torch.Tensor]:
    """The `width` most probable beginnings of each row, and the greedy one; and their positions, row by row."""
    order = beam.log_prob.argsort(descending=True, stable=True)
    order = order[beam.row[order].argsort(stable=True)]
    row = beam.row[order]
    rank = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    is_wide = rank >= (len(row) if width is None else width)
    log_prob = beam.log_prob[order].masked_fill(is_wide, -torch.inf)
    kept = ~is_wide | beam.is_greedy[order]
    order = order[kept]
    return _Beam(row[kept], beam.node[order], log_prob[kept], beam.is_greedy[order]), order


class _SharedPrefixBranches:
    """Rows that branch, after a prefix that is computed once."""

    def __init__(
        self, model: PreTrainedModel, encoder: Encoder, reachable: Reachable, prefix: shared_prefix.PrefixLayout
    ):
        self.model, self.device, self.grammar, self.reachable = model, model.device, encoder.grammar, reachable
        self.jumps = find_jumps(encoder.grammar)
        self.prefix = prefix

    def begin(self, suffixes: list[list[int]]) -> torch.Tensor | None:
        """Run B rows, each of which is one branch at first.

        Returns:
            The logits [B, R] of the next token; None if no row has a token after the prefix.
        """
        self.layout = shared_prefix.DecodingLayout(self.prefix, [len(ids) for ids in suffixes])
        ids = torch.tensor([i for ids in suffixes for i in ids], device=self.device)
        return self._logits(ids, self.layout.lengths.cumsum(0) - 1) if len(ids) else None

    def extend(self, parents: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Keep some branches, splitting those that are named several times, and run further tokens on each.

        Args:
            parents: int64 [A], the branch that each new one continues.
            ids: int64 [A, M], the tokens of each, padded with -1.

        Returns:
            The logits [A, R] of the next token.
        """
        self.layout.branch(parents)
        ids, count = self.layout.append_padded(torch.arange(len(parents), device=self.device), ids)
        return self._logits(ids, count.cumsum(0) - 1)

    def _logits(self, ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return self.reachable(shared_prefix.forward(self.model, self.layout, ids, logits_to_keep=last).logits[0])


class _PlainBranches:
    """The same for models that cannot share a prefix: each branch is computed in full at each step."""

    def __init__(self, model: PreTrainedModel, encoder: Encoder, reachable: Reachable, padded: bool):
        self.model, self.device, self.grammar = model, model.device, encoder.grammar
        self.reachable, self.padded = reachable, padded
        self.jumps = find_jumps(encoder.grammar)
        self.prefix_ids = encoder.prefix_ids

    def begin(self, suffixes: list[list[int]]) -> torch.Tensor | None:
        """See `_SharedPrefixBranches.begin`."""
        self.rows = [[*self.prefix_ids, *ids] for ids in suffixes]
        return self._logits()

    def extend(self, parents: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """See `_SharedPrefixBranches.extend`."""
        added = [[i for i in row if i >= 0] for row in ids.tolist()]
        self.rows = [self.rows[p] + row for p, row in zip(parents.tolist(), added, strict=True)]
        return self._logits()

    def _logits(self) -> torch.Tensor:
        return self.reachable(last_logits(self.model, self.rows, padded=self.padded))
