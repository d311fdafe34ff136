"""Generation: greedy answers from a model, under the grammar or freely; and a probability for each label.

The instruction is computed once. Texts go in batches of like length, without padding. Under the grammar, only the rows
of the output projection that it can reach are computed, tokens without an alternative are never waited for (`Jumps`),
and rows that are done leave their batch. The answers are those of a plain masked greedy search.
"""

from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from emogen import attention
from emogen.encode import Encoder, Row
from emogen.errors import ModelError
from emogen.grammar import find_jumps, spell

FREE_TOKENS = 48  # room for chatter before a free answer is cut off, beyond the longest valid answer
Progress = Callable[[int], Any]  # is told how many more rows are done


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    encoder: Encoder,
    suffixes: Sequence[list[int]],
    *,
    decode: str = "constrained",
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Greedy answers for rows that share the encoder's prefix.

    Args:
        model: a causal language model, with or without adapter; its training mode is restored.
        suffixes: n lists of token ids: each row's text and question, without an answer.
        decode: `constrained` (valid answers only) or `free`.

    Returns:
        n lists of token ids: the answers, without what ends them, in the order of `suffixes`.
    """
    with evaluating(model):
        if _shares(model):
            engine = _Engine(model, encoder)
            step = engine.constrained if decode == "constrained" else engine.free
        else:
            step = _Plain(model, encoder, decode == "constrained").answers
        return in_batches(step, suffixes, batch_size, progress)


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
        make = _Branches if _shares(model) else _PlainBranches
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
        if _shares(model):
            prefix = _prefix(_base(model).get_decoder(), encoder)
            step = lambda batch: _packed_log_likelihood(model, prefix, batch)  # noqa: E731
        else:
            step = lambda batch: _plain_log_likelihood(model, encoder, batch)  # noqa: E731
        return np.array(in_batches(step, rows, batch_size, progress), dtype=np.float32)


def _packed_log_likelihood(model: PreTrainedModel, prefix: attention.Prefix, rows: list[Row]) -> list[float]:
    ids = torch.tensor([i for row in rows for i in row.suffix_ids], device=model.device)
    ends = torch.tensor([len(row) for row in rows]).cumsum(0).tolist()
    answers = torch.cat([torch.arange(end - row.n_answer, end) for row, end in zip(rows, ends, strict=True)])
    layout = attention.Rows(prefix, [len(row) for row in rows])
    logits = attention.forward(model, layout, ids, logits_to_keep=answers.to(model.device) - 1).logits[0]
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
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """A model in evaluation mode; then in the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _reachable_rows(model: PreTrainedModel, encoder: Encoder) -> Iterator[None]:
    """A model that computes the logits [..., R] of the tokens that the grammar can reach, alone. What else it does to
    logits (scales or caps them) it goes on doing."""
    base = _base(model)
    head = base.get_output_embeddings()
    base.set_output_embeddings(_Reachable(head, torch.from_numpy(encoder.grammar.token_ids)))
    try:
        yield
    finally:
        base.set_output_embeddings(head)


class _Reachable(torch.nn.Module):
    """The rows of an output projection that belong to R tokens."""

    def __init__(self, head: torch.nn.Module, token_ids: torch.Tensor):
        super().__init__()
        self.head, self.rows = head, token_ids.to(head.weight.device)
        # A projection with an adapter on it, say, or in four bits, is computed whole.
        plain = isinstance(head, torch.nn.Linear) and head.weight.shape == (head.out_features, head.in_features)
        self.weight = head.weight[self.rows] if plain else None
        self.bias = head.bias[self.rows] if plain and head.bias is not None else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., hidden] -> logits [..., R]."""
        if self.weight is None:
            return self.head(hidden)[..., self.rows]
        return functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)


def _base(model: PreTrainedModel) -> PreTrainedModel:
    """A model without what peft put around it; its layers keep their adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _shares(model: PreTrainedModel) -> bool:
    return bool(model.config.get_text_config()._attn_implementation == attention.NAME)


def in_batches(
    step: Callable[[list[Any]], Sequence[Any]], rows: Sequence[Sized], batch_size: int, progress: Progress | None
) -> list[Any]:
    """What `step` gives for each row. Longest first: a batch that does not fit into memory fails at once, and rows of
    like length go together."""
    results: list[Any] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for i, result in zip(batch, step([rows[i] for i in batch]), strict=True):
            results[i] = result
        if progress:
            progress(len(batch))
    return results


def _prefix(decoder: Any, encoder: Encoder) -> attention.Prefix:
    """The encoder's prefix, computed."""
    layout = attention.Prefix(len(encoder.prefix_ids))
    attention.forward(decoder, layout, torch.tensor(encoder.prefix_ids, device=decoder.device))
    return layout


class _Engine:
    """A model with the prefix computed, and the tables of the grammar on its device."""

    def __init__(self, model: PreTrainedModel, encoder: Encoder):
        self.model, self.encoder, self.device = model, encoder, model.device
        base = _base(model)
        self.decoder, self.head = base.get_decoder(), base.get_output_embeddings()
        self.reachable = _Reachable(self.head, torch.from_numpy(encoder.grammar.token_ids))
        self.jumps = find_jumps(encoder.grammar)
        grammar, jumps = encoder.grammar, self.jumps
        self.token_ids, self.next_node, self.ends, self.tokens, self.choice, self.length, self.on = (
            torch.from_numpy(table).to(self.device)
            for table in [
                *(grammar.token_ids, grammar.next_node),
                *(jumps.ends, jumps.tokens, jumps.choice, jumps.length, jumps.on),
            ]
        )
        self.prefix = _prefix(self.decoder, encoder)

    def _run(self, layout: attention.Layout, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, hidden] of tokens that lie so."""
        return attention.forward(self.decoder, layout, ids).last_hidden_state[0]

    def _begin(self, suffixes: list[list[int]]) -> tuple[attention.Rows, torch.Tensor]:
        """Rows with all but their answers computed, and the hidden states of that."""
        layout = attention.Rows(self.prefix, [len(ids) for ids in suffixes])
        return layout, self._run(layout, torch.tensor([i for ids in suffixes for i in ids], device=self.device))

    def constrained(self, suffixes: list[list[int]]) -> list[list[int]]:
        """Greedy choices, wherever the grammar leaves one, of all rows at once."""
        grammar, n_rows = self.encoder.grammar, len(suffixes)
        first = self.tokens[0][self.tokens[0] >= 0].tolist()  # what goes along with the rows at once
        layout, hidden = self._begin([ids + first for ids in suffixes])
        rows = torch.arange(n_rows, device=self.device)  # [A], those under way
        node = torch.zeros_like(rows)  # [A], where they were before the tokens of their last jump
        start = layout.lengths.cumsum(0) - len(first) - 1  # [A], where the token before those is, among the ones run
        chosen = []  # of each step int64 [n_rows, 2]
        while True:
            columns, node = self._choose(hidden, node, start)
            step = torch.full((n_rows, 2), -1, device=self.device)
            step[rows] = columns
            chosen.append(step)
            going = ~self.ends[node]
            if not going.any():
                break
            rows, node, columns = rows[going], node[going], columns[going]
            last = torch.where(columns[:, 1] >= 0, columns[:, 1], columns[:, 0])
            ids = torch.cat([self.token_ids[last][:, None], self.tokens[node]], 1)  # [A, 1 + M], filled up with -1
            real = ids >= 0
            count = real.sum(1)
            start = count.cumsum(0) - count
            slots = torch.arange(ids.shape[1], device=self.device).expand_as(ids)[real]
            layout.append(rows.repeat_interleave(count), slots)
            hidden = self._run(layout, ids[real])
        taken = torch.stack(chosen, 1).flatten(1).tolist()
        n_end = len(self.encoder.end_ids)
        return [spell(grammar, self.jumps, [c for c in row if c >= 0])[:-n_end] for row in taken]

    def _choose(
        self, hidden: torch.Tensor, node: torch.Tensor, start: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Best columns [A, 2] at the choices ahead of each node (-1 where there is no second), and where they lead."""
        choice = self.choice[node]  # [A, 2]
        # Not all that a model does to logits is done here; what it does keeps their order.
        logits = self.reachable(hidden[start[:, None] + self.length[node]])  # [A, 2, R]
        ways = self.next_node[choice]  # [A, 2, R]
        best = logits.float().masked_fill(ways < 0, -torch.inf).argmax(2)
        reached = ways.gather(2, best[..., None])[..., 0]
        goes_on = (choice[:, 1] >= 0) & (best[:, 0] == self.on[choice[:, 0]])
        columns = torch.stack([best[:, 0], torch.where(goes_on, best[:, 1], -1)], 1)
        return columns, torch.where(goes_on, reached[:, 1], reached[:, 0])

    def free(self, suffixes: list[list[int]]) -> list[list[int]]:
        """Greedy steps over the whole vocabulary until the end-of-turn token, or until the room is used up."""
        stop = torch.tensor(sorted(_stop_ids(self.model, self.encoder)), device=self.device)
        room = self.encoder.grammar.max_length + FREE_TOKENS
        layout, hidden = self._begin(suffixes)
        hidden = hidden[layout.lengths.cumsum(0) - 1]
        rows = torch.arange(len(suffixes), device=self.device)
        answers: list[list[int]] = [[] for _ in suffixes]
        for _ in range(room):
            ids = self.head(hidden).argmax(1)
            going = ~torch.isin(ids, stop)
            rows, ids = rows[going], ids[going]
            for i, token in zip(rows.tolist(), ids.tolist(), strict=True):
                answers[i].append(token)
            if not len(rows):
                break
            layout.append(rows, torch.zeros_like(rows))
            hidden = self._run(layout, ids)
        return answers


# ---------------------------------------------------------------------------------------------- probabilities


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
        self.prefix = _prefix(_base(model).get_decoder(), encoder)

    def begin(self, suffixes: list[list[int]]) -> torch.Tensor:
        """Start with these rows."""
        self.layout = attention.Rows(self.prefix, [len(ids) for ids in suffixes])
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
        return attention.forward(self.model, self.layout, ids, logits_to_keep=last).logits[0]


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


# ---------------------------------------------------------------------------------------------- without sharing


class _Plain:
    """Generation by transformers, each row in full, for models whose rows cannot share their prefix."""

    def __init__(self, model: PreTrainedModel, encoder: Encoder, constrained: bool):
        self.model, self.encoder, self.constrained = model, encoder, constrained

    def answers(self, suffixes: list[list[int]]) -> list[list[int]]:
        """Greedy answers for one batch."""
        encoder = self.encoder
        stop = {encoder.end_ids[0]} if self.constrained else _stop_ids(self.model, encoder)
        n_prompt = len(encoder.prefix_ids) + max(map(len, suffixes))
        prompts = [[*encoder.prefix_ids, *ids] for ids in suffixes]
        pad = encoder.tokenizer.pad_token_id
        output = self.model.generate(
            torch.tensor([[pad] * (n_prompt - len(ids)) + ids for ids in prompts], device=self.model.device),
            attention_mask=torch.tensor(
                [[0] * (n_prompt - len(ids)) + [1] * len(ids) for ids in prompts], device=self.model.device
            ),
            max_new_tokens=encoder.grammar.max_length + (0 if self.constrained else FREE_TOKENS),
            eos_token_id=sorted(stop),
            pad_token_id=pad,
            prefix_allowed_tokens_fn=self._allowed(n_prompt) if self.constrained else None,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # some models come with one
            use_cache=True,
        )
        return [list(takewhile(lambda token: token not in stop, row)) for row in output[:, n_prompt:].tolist()]

    def _allowed(self, n_prompt: int) -> Callable[[int, torch.Tensor], list[int]]:
        grammar = self.encoder.grammar
        column = {int(token): c for c, token in enumerate(grammar.token_ids)}

        def allowed(_: int, ids: torch.Tensor) -> list[int]:
            node = 0
            for token in ids[n_prompt:].tolist():
                if token == self.encoder.end_ids[0]:
                    return [token]
                node = int(grammar.next_node[node, column[token]])
            return [int(token) for token in grammar.token_ids[grammar.next_node[node] >= 0]]

        return allowed


def _stop_ids(model: PreTrainedModel, encoder: Encoder) -> set[int]:
    declared = model.generation_config.eos_token_id
    several = declared if isinstance(declared, list) else [declared]
    return {encoder.end_ids[-1], *(i for i in several if i is not None)}
