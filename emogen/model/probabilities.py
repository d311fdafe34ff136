"""Label probabilities: the marginal over all answers of the grammar; and the log-likelihood of given answers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from emogen.errors import ModelError
from emogen.model import shared_prefix
from emogen.model.decode import (
    Progress,
    ReachableHead,
    base_model,
    compute_prefix,
    evaluating,
    in_batches,
    shares_prefix,
)
from emogen.model.encode import Encoder, Row
from emogen.model.grammar import find_jumps


@torch.inference_mode()
def probabilities(
    model: PreTrainedModel,
    encoder: Encoder,
    suffixes: Sequence[list[int]],
    questions: Sequence[list[int]] = ([],),
    *,
    how: str = "marginal",
    floor: float = 0.002,
    width: int | None = 16,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> np.ndarray:
    """How probable it is that an answer contains each label.

    `marginal`: over all answers of the grammar. P(label) is the sum, over all beginnings of an answer, of their
    probability times that of the label coming next. Beginnings are followed breadth first, and only the probable ones:
    what comes after the others is left out, so the figure is a lower bound, and exact where `floor` is 0 and `width`
    None.

    `maximum`: cheaper, and no probability of anything: the most that a label had as the next one, at any step of the
    greedy answer and at its end (arXiv 2505.17510).

    Args:
        suffixes: n lists of token ids: what each row has after the prefix, without an answer.
        questions: K lists of token ids, each of which follows each row in turn; by default nothing does. What precedes
            them is computed once.
        how: `marginal` or `maximum`.
        floor: beginnings that are less probable are not followed.
        width: of those of one row that are equally many choices long, only so many are followed; None for all.

    Returns:
        float32 [n, K, C], C the choices of the grammar: L labels, or yes and no (`yes_no`, exact).

    Raises:
        ModelError: the model computes NaN.
    """
    with evaluating(model), _reachable_rows(model, encoder):
        make = _Branches if shares_prefix(model) else _PlainBranches
        branches = make(model, encoder)
        step = lambda rows: _search(branches, rows, questions, how == "maximum", floor, width)  # noqa: E731
        found = in_batches(step, suffixes, batch_size, progress)
    if np.isnan(found).any():
        raise ModelError("the model computes NaN: its training has diverged (a lower learning_rate may help)")
    n_choices = encoder.grammar.settles.shape[2]
    return np.array(found, dtype=np.float32).reshape(-1, len(questions), n_choices)


@torch.inference_mode()
def log_likelihood(
    model: PreTrainedModel,
    encoder: Encoder,
    rows: Sequence[Row],
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> np.ndarray:
    """How probable the model finds the true answers, among all that it could say: ln P(answer and its end | prompt).

    Args:
        rows: n rows with their answers.

    Returns:
        float32 [n], in nats; 0 would be certainty.
    """
    with evaluating(model):
        if shares_prefix(model):
            prefix = compute_prefix(base_model(model).get_decoder(), encoder)
            step = lambda batch: _packed_log_likelihood(model, prefix, batch)  # noqa: E731
        else:
            step = lambda batch: _plain_log_likelihood(model, encoder, batch)  # noqa: E731
        return np.array(in_batches(step, rows, batch_size, progress), dtype=np.float32)


def _packed_log_likelihood(model: PreTrainedModel, prefix: shared_prefix.Prefix, rows: list[Row]) -> list[float]:
    ids = torch.tensor([i for row in rows for i in row.suffix_ids], device=model.device)
    ends = torch.tensor([len(row) for row in rows]).cumsum(0).tolist()
    answers = torch.cat([torch.arange(end - row.n_answer, end) for row, end in zip(rows, ends, strict=True)])
    layout = shared_prefix.Rows(prefix, [len(row) for row in rows])
    logits = shared_prefix.forward(model, layout, ids, logits_to_keep=answers.to(model.device) - 1).logits[0]
    found = logits.float().log_softmax(1).gather(1, ids[answers][:, None])[:, 0]
    return [float(of_row.sum()) for of_row in found.split([row.n_answer for row in rows])]


def _plain_log_likelihood(model: PreTrainedModel, encoder: Encoder, rows: list[Row]) -> list[float]:
    found = []
    for row in rows:  # one at a time: each has its answer in another place
        ids = torch.tensor([*encoder.prefix_ids, *row.suffix_ids], device=model.device)
        logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=row.n_answer + 1).logits[0, :-1]
        answer = ids[-row.n_answer :, None]
        found.append(float(logits.float().log_softmax(1).gather(1, answer).sum()))
    return found


@contextmanager
def _reachable_rows(model: PreTrainedModel, encoder: Encoder) -> Iterator[None]:
    """A model that computes the logits [..., R] of the tokens that the grammar can reach, alone. What else it does to
    logits (scales or caps them) it goes on doing."""
    base = base_model(model)
    head = base.get_output_embeddings()
    base.set_output_embeddings(ReachableHead(head, torch.from_numpy(encoder.grammar.token_ids)))
    try:
        yield
    finally:
        base.set_output_embeddings(head)


def _search(
    branches: "_Branches | _PlainBranches",
    suffixes: list[list[int]],
    questions: Sequence[list[int]],
    maximum: bool,
    floor: float,
    width: int | None,
) -> list[list[list[float]]]:
    """[B][K][C]: see `probabilities`."""
    device, grammar, jumps = branches.device, branches.grammar, branches.jumps
    next_node, choice, ends, settles, token_ids = (
        torch.from_numpy(table).to(device)
        for table in (grammar.next_node, jumps.choice[:, 0], jumps.ends, jumps.settles, grammar.token_ids)
    )
    forced = _padded(jumps.forced, device)
    # A beginnings of answers: the row that each belongs to, the choice that it stands at, and how probable it is - for
    # the maximum, counted from the last label on, and with a mark on the greedy one.
    row = torch.arange(len(suffixes) * len(questions), device=device)
    node = choice[torch.zeros_like(row)]
    log_prob = torch.zeros(len(row), device=device)
    greedy = torch.ones_like(row, dtype=torch.bool)
    prob = torch.zeros(len(row), settles.shape[2], device=device)
    if len(questions) == 1:
        logits = branches.begin([[*ids, *questions[0], *jumps.forced[0]] for ids in suffixes])
    else:
        branches.begin(suffixes)
        asked = _padded([[*ids, *jumps.forced[0]] for ids in questions], device)
        logits = branches.go_on(row // len(questions), asked.repeat(len(suffixes), 1))
    while True:
        allowed = next_node[node] >= 0  # [A, R]
        step = logits.float().masked_fill(~allowed, -torch.inf).log_softmax(1)
        ahead = log_prob[:, None] + step  # [A, R]
        settled = settles[node]  # [A, R, C]
        reached = next_node[node].clamp(min=0)
        going = allowed & ~ends[reached] & (ahead.exp() > floor)
        if maximum:
            coming = (ahead.exp()[:, :, None] * settled).amax(1)  # [A, C]
            prob.scatter_reduce_(0, row[:, None].expand_as(coming), coming, "amax")
            best = functional.one_hot(step.argmax(1), step.shape[1]).bool() & greedy[:, None]
            going = (going & ~settled.any(2)) | (best & allowed & ~ends[reached])
            ahead = ahead.masked_fill(settled.any(2), 0.0)
        else:
            best = torch.zeros_like(allowed)
            prob.index_add_(0, row, torch.einsum("ar,arc->ac", ahead.exp(), settled.float()))
        parent, column = going.nonzero(as_tuple=True)
        kept = _most_probable(row[parent], ahead[parent, column], width)
        parent, column = parent[kept], column[kept]
        if not len(parent):
            return prob.clamp(max=1).unflatten(0, (len(suffixes), len(questions))).tolist()
        row, log_prob, greedy = row[parent], ahead[parent, column], best[parent, column]
        reached = reached[parent, column]
        node = choice[reached]
        logits = branches.go_on(parent, torch.cat([token_ids[column][:, None], forced[reached]], 1))


def _padded(rows: Sequence[list[int]], device: torch.device) -> torch.Tensor:
    """Lists of token ids -> int64 [n, longest], filled up with -1."""
    longest = max(map(len, rows))
    return torch.tensor([[*ids, *[-1] * (longest - len(ids))] for ids in rows], device=device)


def _most_probable(row: torch.Tensor, log_prob: torch.Tensor, width: int | None) -> torch.Tensor:
    """Positions of the `width` most probable of each row, row by row."""
    order = log_prob.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    if width is None:
        return order
    rank = torch.arange(len(row), device=row.device) - torch.searchsorted(row[order], row[order])
    return order[rank < width]


class _Branches:
    """Rows that branch, over a shared prefix. `begin` and `go_on` give the logits [A, R] of what comes next."""

    def __init__(self, model: PreTrainedModel, encoder: Encoder):
        self.model, self.device, self.grammar = model, model.device, encoder.grammar
        self.jumps = find_jumps(encoder.grammar)
        self.prefix = compute_prefix(base_model(model).get_decoder(), encoder)

    def begin(self, suffixes: list[list[int]]) -> torch.Tensor:
        """Start with these rows."""
        self.layout = shared_prefix.Rows(self.prefix, [len(ids) for ids in suffixes])
        ids = torch.tensor([i for ids in suffixes for i in ids], device=self.device)
        return self._logits(ids, self.layout.lengths.cumsum(0) - 1)

    def go_on(self, parent: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Go on with the rows `parent` [A] alone, each by `ids` [A, M], filled up with -1."""
        self.layout.branch(parent)
        real = ids >= 0
        count = real.sum(1)
        rows = torch.arange(len(parent), device=self.device).repeat_interleave(count)
        self.layout.append(rows, torch.arange(ids.shape[1], device=self.device).expand_as(ids)[real])
        return self._logits(ids[real], count.cumsum(0) - 1)

    def _logits(self, ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return shared_prefix.forward(self.model, self.layout, ids, logits_to_keep=last).logits[0]


class _PlainBranches:
    """The same, each branch computed in full, for models whose rows cannot share their prefix."""

    def __init__(self, model: PreTrainedModel, encoder: Encoder):
        self.model, self.device, self.grammar = model, model.device, encoder.grammar
        self.jumps = find_jumps(encoder.grammar)
        self.prefix_ids = encoder.prefix_ids

    def begin(self, suffixes: list[list[int]]) -> torch.Tensor:
        """Start with these rows."""
        self.rows = [[*self.prefix_ids, *ids] for ids in suffixes]
        return self._logits()

    def go_on(self, parent: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Go on with the rows `parent` [A] alone, each by `ids` [A, M], filled up with -1."""
        more = [[i for i in new if i >= 0] for new in ids.tolist()]
        self.rows = [self.rows[p] + new for p, new in zip(parent.tolist(), more, strict=True)]
        return self._logits()

    def _logits(self) -> torch.Tensor:
        # Padded on the right, where causal attention does not look; in groups, for the memory.
        found = []
        for start in range(0, len(self.rows), 16):
            rows = self.rows[start : start + 16]
            longest = max(map(len, rows))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.device)
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.device)
            ends, which = torch.tensor([len(row) - 1 for row in rows], device=self.device).unique(return_inverse=True)
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=ends).logits
            found.append(logits[torch.arange(len(rows)), which])
        return torch.cat(found)
