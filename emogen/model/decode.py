"""Generation: greedy answers, under the grammar or free.

The prefix is computed once, and rows of similar length share a batch. Three things make generation under the grammar
faster: the output projection is computed only for the tokens that the grammar can reach; forced tokens cost no step of
their own (`grammar.Jumps`); and finished rows leave their batch. None of them changes an answer: the answers are those
of a greedy search in which forbidden tokens are masked.
"""

from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from emogen.model import plain_rows, shared_prefix
from emogen.model.encode import Encoder
from emogen.model.grammar import find_jumps, spell
from emogen.model.plain_rows import base_model, evaluating
from emogen.model.shared_prefix import shares_prefix

FREE_TOKENS = 48  # tokens that a free answer may be longer than the longest valid one
Progress = Callable[[int], Any]  # called with the number of rows done since the last call
KeptPrefix = list[tuple[list[int], shared_prefix.PrefixLayout]]  # empty, or the last prefix with its token ids
Reachable = Callable[[torch.Tensor], torch.Tensor]  # the logits of a model -> those of the tokens of the grammar


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    encoder: Encoder,
    suffixes: Sequence[list[int]],
    *,
    decode: str = "constrained",
    batch_size: int = 32,
    progress: Progress | None = None,
    kept: KeptPrefix | None = None,
) -> list[list[int]]:
    """Generate a greedy answer for each row.

    Args:
        model: a causal language model, with or without an adapter.
        suffixes: n lists of token ids: what each row has after the prefix, without an answer.
        decode: `constrained` (valid answers only) or `free`.
        kept: see `compute_prefix`.

    Returns:
        n lists of token ids: the answers without end tokens, in the order of `suffixes`.

    Raises:
        ModelError: the model cannot compute such rows.
    """
    if not suffixes:
        return []
    longest = longest_row(encoder, suffixes, decode)
    plain_rows.require_length(model, longest)
    with evaluating(model):
        if shares_prefix(model, encoder.prefix_ids, longest):
            return _generate_shared(model, encoder, suffixes, decode, batch_size, progress, kept)
        generator = _PlainGenerator(model, encoder, longest)
        answers = generator.constrained if decode == "constrained" else generator.free
        return in_batches(answers, suffixes, batch_size, progress)


def longest_row(encoder: Encoder, suffixes: Sequence[list[int]], decode: str = "constrained") -> int:
    """The number of tokens of the longest row that a generation can reach, with its prefix and its answer.

    Args:
        suffixes, decode: see `generate`.
    """
    n_answer = encoder.grammar.max_length + (FREE_TOKENS if decode == "free" else 0)
    return len(encoder.prefix_ids) + max(map(len, suffixes)) + n_answer


def _generate_shared(
    model: PreTrainedModel,
    encoder: Encoder,
    suffixes: Sequence[list[int]],
    decode: str,
    batch_size: int,
    progress: Progress | None,
    kept: KeptPrefix | None,
) -> list[list[int]]:
    prefix = compute_prefix(model, encoder, kept)
    if decode == "free":
        return in_batches(_SharedPrefixGenerator(model, encoder, prefix).free, suffixes, batch_size, progress)
    with reachable_logits(model, encoder) as reachable:
        generator = _SharedPrefixGenerator(model, encoder, prefix, reachable)
        return in_batches(generator.constrained, suffixes, batch_size, progress)


class ReachableHead(torch.nn.Module):
    """An output projection, reduced to R tokens.

    Args:
        head: the output projection of a model.
        token_ids: int64 [R].
    """

    def __init__(self, head: torch.nn.Module, token_ids: torch.Tensor):
        super().__init__()
        self.head, self.rows = head, token_ids.to(head.weight.device)
        # Other projections, such as one with an adapter or in four bits, are computed in full and then reduced.
        is_plain = isinstance(head, torch.nn.Linear) and head.weight.shape == (head.out_features, head.in_features)
        self.weight = head.weight[self.rows] if is_plain else None
        self.bias = head.bias[self.rows] if is_plain and head.bias is not None else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., hidden] -> logits [..., R]."""
        if self.weight is None:
            return self.head(hidden)[..., self.rows]
        return functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)


@contextmanager
def reachable_logits(model: PreTrainedModel, encoder: Encoder) -> Iterator[Reachable]:
    """Let a model compute logits [..., R], only of the tokens that the grammar can reach, if its head can be reduced.

    Whatever else the model does to its logits, such as scaling or capping them, it still does.

    Yields:
        A function that takes the logits of the model to those of the R tokens.
    """
    token_ids = torch.from_numpy(encoder.grammar.token_ids).to(model.device)
    if not _head_is_reducible(model):
        yield lambda logits: logits[..., token_ids]
        return
    with _reduced_head(model, token_ids):
        yield lambda logits: logits


@contextmanager
def _reduced_head(model: PreTrainedModel, token_ids: torch.Tensor) -> Iterator[None]:
    base = base_model(model)
    head = base.get_output_embeddings()
    try:
        base.set_output_embeddings(ReachableHead(head, token_ids))
        yield
    finally:
        base.set_output_embeddings(head)


def _head_is_reducible(model: PreTrainedModel) -> bool:
    """Whether a model computes the logits of some tokens only, if its output projection is reduced to these."""

    def trial() -> str | None:
        ids, tokens = (torch.tensor(some, device=model.device) for some in ([[3, 4, 5, 6, 7, 8]], [3, 8, 5]))
        everything = model(input_ids=ids, use_cache=False).logits[0]
        with _reduced_head(model, tokens):
            some = model(input_ids=ids, use_cache=False).logits[0]
        return None if plain_rows.agree(model, some, everything[:, tokens]) else "its logits are not those of its head"

    return plain_rows.tried(model, "head", 6, 6, trial)[0] is None


def in_batches(
    step: Callable[[list[Any]], Sequence[Any]], rows: Sequence[Sized], batch_size: int, progress: Progress | None
) -> list[Any]:
    """Apply a function to batches of rows of similar length.

    The longest rows go first, so a batch that does not fit into memory fails at once.

    Args:
        step: a batch of rows -> one result for each.

    Returns:
        The results in the order of `rows`.
    """
    results: list[Any] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for i, result in zip(batch, step([rows[i] for i in batch]), strict=True):
            results[i] = result
        if progress:
            progress(len(batch))
    return results


def compute_prefix(
    model: PreTrainedModel, encoder: Encoder, kept: KeptPrefix | None = None
) -> shared_prefix.PrefixLayout:
    """Run a model on the prefix of an encoder and keep its keys and values.

    Args:
        kept: where the result is kept between calls, for a model that does not change.
    """
    if kept and kept[0][0] == encoder.prefix_ids:
        return kept[0][1]
    layout = shared_prefix.PrefixLayout(len(encoder.prefix_ids))
    shared_prefix.forward(model, layout, torch.tensor(encoder.prefix_ids, device=model.device), logits_to_keep=1)
    if kept is not None:
        kept[:] = [(encoder.prefix_ids, layout)]
    return layout


class _SharedPrefixGenerator:
    """Generates answers after a prefix that is computed once.

    Args:
        prefix: computed by `compute_prefix`.
        reachable: see `reachable_logits`; not used for free answers.

    Shapes: B rows in a batch, A rows of them unfinished, T tokens in a pass; R and M as in `grammar`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        prefix: shared_prefix.PrefixLayout,
        reachable: Reachable = lambda logits: logits,
    ):
        self.model, self.encoder, self.device, self.reachable = model, encoder, model.device, reachable
        self.jumps = find_jumps(encoder.grammar)
        self.token_ids, self.next_node = self._on_device(encoder.grammar.token_ids, encoder.grammar.next_node)
        self.ends, self.jump_tokens, self.decisions, self.lengths, self.continuation = self._on_device(
            self.jumps.ends, self.jumps.tokens, self.jumps.decisions, self.jumps.lengths, self.jumps.continuation
        )
        self.prefix = prefix

    def _on_device(self, *tables: Any) -> list[torch.Tensor]:
        return [torch.from_numpy(table).to(self.device) for table in tables]

    def _run(self, layout: shared_prefix.Layout, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Token ids [T] -> the logits [N, V or R] at N of their positions."""
        return shared_prefix.forward(self.model, layout, ids, logits_to_keep=positions).logits[0]

    def _begin(self, suffixes: list[list[int]]) -> tuple[shared_prefix.DecodingLayout, torch.Tensor]:
        """The layout of rows without their answers, and their token ids [T]."""
        layout = shared_prefix.DecodingLayout(self.prefix, [len(ids) for ids in suffixes])
        return layout, torch.tensor([i for ids in suffixes for i in ids], device=self.device)

    def constrained(self, suffixes: list[list[int]]) -> list[list[int]]:
        """Greedy answers of one batch under the grammar. Each step takes one or two decisions of every row."""
        first = self.jump_tokens[0][self.jump_tokens[0] >= 0].tolist()  # the jump from the start, the same for all rows
        layout, ids = self._begin([ids + first for ids in suffixes])
        rows = torch.arange(len(suffixes), device=self.device)  # [A], the unfinished rows
        node = torch.zeros_like(rows)  # [A], the node that each row has jumped from
        start = layout.lengths.cumsum(0) - len(first) - 1  # [A], the index in `ids` of the token before the jump
        chosen = []  # for each step the columns taken, int64 [B, 2]
        while True:
            positions = start[:, None] + self.lengths[node]  # [A, 2], of the tokens before its decisions
            logits = self.reachable(self._run(layout, ids, positions.flatten())).unflatten(0, (-1, 2))
            columns, node = self._decide(logits, node)
            step = torch.full((len(suffixes), 2), -1, device=self.device)
            step[rows] = columns
            chosen.append(step)
            unfinished = ~self.ends[node]
            if not unfinished.any():
                break
            rows, node, columns = rows[unfinished], node[unfinished], columns[unfinished]
            last = torch.where(columns[:, 1] >= 0, columns[:, 1], columns[:, 0])
            ids = torch.cat([self.token_ids[last][:, None], self.jump_tokens[node]], 1)  # [A, 1 + M], padded with -1
            ids, count = layout.append_padded(rows, ids)
            start = count.cumsum(0) - count
        columns_of_rows = torch.stack(chosen, 1).flatten(1).tolist()
        n_end = len(self.encoder.end_ids)
        return [
            spell(self.encoder.grammar, self.jumps, [c for c in columns if c >= 0])[:-n_end]
            for columns in columns_of_rows
        ]

    def _decide(self, logits: torch.Tensor, node: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the decisions of a jump.

        Args:
            logits: [A, 2, R], of the tokens at its decisions.
            node: int64 [A], the node that each row has jumped from.

        Returns:
            int64 [A, 2], the column taken at each decision, -1 if there was no second one; and int64 [A], the node
            reached.
        """
        decisions = self.decisions[node]  # [A, 2]
        targets = self.next_node[decisions]  # [A, 2, R]
        best = logits.float().masked_fill(targets < 0, -torch.inf).argmax(2)
        reached = targets.gather(2, best[..., None])[..., 0]
        continues = (decisions[:, 1] >= 0) & (best[:, 0] == self.continuation[decisions[:, 0]])
        columns = torch.stack([best[:, 0], torch.where(continues, best[:, 1], -1)], 1)
        return columns, torch.where(continues, reached[:, 1], reached[:, 0])

    def free(self, suffixes: list[list[int]]) -> list[list[int]]:
        """Greedy answers of one batch over the whole vocabulary, up to an end token or the limit."""
        stop = torch.tensor(sorted(_stop_ids(self.model, self.encoder)), device=self.device)
        layout, tokens = self._begin(suffixes)
        logits = self._run(layout, tokens, layout.lengths.cumsum(0) - 1)
        rows = torch.arange(len(suffixes), device=self.device)
        answers: list[list[int]] = [[] for _ in suffixes]
        for _ in range(self.encoder.grammar.max_length + FREE_TOKENS):
            ids = logits.argmax(1)
            unfinished = ~torch.isin(ids, stop)
            rows, ids = rows[unfinished], ids[unfinished]
            for i, token in zip(rows.tolist(), ids.tolist(), strict=True):
                answers[i].append(token)
            if not len(rows):
                break
            layout.append(rows, torch.zeros_like(rows))
            logits = self._run(layout, ids, torch.arange(len(ids), device=self.device))
        return answers


class _PlainGenerator:
    """Generates answers for models that cannot share a prefix: with transformers, or each step of each row in full.

    Args:
        longest: the number of tokens of the longest row with its answer.
    """

    def __init__(self, model: PreTrainedModel, encoder: Encoder, longest: int):
        self.model, self.encoder, self.pad = model, encoder, encoder.tokenizer.pad_token_id
        self.has_cache = plain_rows.generates(model, encoder.prefix_ids, longest, self.pad)
        self.padded = self.has_cache or plain_rows.pads(model, encoder.prefix_ids, longest)

    def constrained(self, suffixes: list[list[int]]) -> list[list[int]]:
        """Greedy answers of one batch under the grammar."""
        if not self.has_cache:
            return self._constrained_in_full(suffixes)
        n_prompt = len(self.encoder.prefix_ids) + max(map(len, suffixes))
        stop = {self.encoder.end_ids[0]}
        return self._generate(
            suffixes, stop, self.encoder.grammar.max_length, prefix_allowed_tokens_fn=self._allowed_tokens(n_prompt)
        )

    def free(self, suffixes: list[list[int]]) -> list[list[int]]:
        """Greedy answers of one batch over the whole vocabulary, up to an end token or the limit."""
        stop = _stop_ids(self.model, self.encoder)
        max_new_tokens = self.encoder.grammar.max_length + FREE_TOKENS
        if self.has_cache:
            return self._generate(suffixes, stop, max_new_tokens)
        answers: list[list[int]] = [[] for _ in suffixes]
        unfinished = list(range(len(suffixes)))
        for _ in range(max_new_tokens):
            best = self._next_logits(suffixes, answers, unfinished).argmax(1).tolist()
            chosen = [(i, token) for i, token in zip(unfinished, best, strict=True) if token not in stop]
            unfinished = [i for i, _ in chosen]
            for i, token in chosen:
                answers[i].append(token)
            if not unfinished:
                break
        return answers

    def _constrained_in_full(self, suffixes: list[list[int]]) -> list[list[int]]:
        """Without a cache. Where only one token is allowed, the model is not asked."""
        grammar = self.encoder.grammar
        nodes, last = [0] * len(suffixes), len(grammar.next_node) - 1
        answers: list[list[int]] = [[] for _ in suffixes]
        reached = torch.from_numpy(grammar.token_ids).to(self.model.device)

        def take(i: int, column: int) -> None:
            answers[i].append(int(grammar.token_ids[column]))
            nodes[i] = int(grammar.next_node[nodes[i], column])

        while True:
            for i in range(len(suffixes)):
                while nodes[i] != last and len(ways := (grammar.next_node[nodes[i]] >= 0).nonzero()[0]) == 1:
                    take(i, int(ways[0]))
            unfinished = [i for i, node in enumerate(nodes) if node != last]
            if not unfinished:
                return [answer[: -len(self.encoder.end_ids)] for answer in answers]
            logits = self._next_logits(suffixes, answers, unfinished)[:, reached].float().cpu()
            allowed = torch.from_numpy(grammar.next_node[[nodes[i] for i in unfinished]] >= 0)
            for i, column in zip(unfinished, logits.masked_fill(~allowed, -torch.inf).argmax(1).tolist(), strict=True):
                take(i, column)

    def _next_logits(self, suffixes: list[list[int]], answers: list[list[int]], rows: list[int]) -> torch.Tensor:
        """The logits [n, V] of the next token of some rows."""
        whole = [[*self.encoder.prefix_ids, *suffixes[i], *answers[i]] for i in rows]
        return plain_rows.last_logits(self.model, whole, padded=self.padded)

    def _generate(
        self, suffixes: list[list[int]], stop: set[int], max_new_tokens: int, **settings: Any
    ) -> list[list[int]]:
        prompts = [[*self.encoder.prefix_ids, *ids] for ids in suffixes]
        output = plain_rows.generate(
            self.model, prompts, stop=stop, pad=self.pad, max_new_tokens=max_new_tokens, **settings
        )
        n_prompt = max(map(len, prompts))
        return [list(takewhile(lambda token: token not in stop, row)) for row in output[:, n_prompt:].tolist()]

    def _allowed_tokens(self, n_prompt: int) -> Callable[[int, torch.Tensor], list[int]]:
        """The function that tells transformers which tokens may come next, for prompts of one padded length."""
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
    """The tokens that end a free answer: that of the chat template, and those that the model declares."""
    declared = base_model(model).generation_config.eos_token_id
    several = declared if isinstance(declared, list) else [declared]
    return {encoder.end_ids[-1], *(i for i in several if i is not None)}
