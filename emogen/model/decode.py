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

from emogen.model import shared_prefix
from emogen.model.encode import Encoder
from emogen.model.grammar import find_jumps, spell

FREE_TOKENS = 48  # tokens that a free answer may be longer than the longest valid one
Progress = Callable[[int], Any]  # called with the number of rows done since the last call


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
    """Generate a greedy answer for each row.

    Args:
        model: a causal language model, with or without an adapter.
        suffixes: n lists of token ids: what each row has after the prefix, without an answer.
        decode: `constrained` (valid answers only) or `free`.

    Returns:
        n lists of token ids: the answers without end tokens, in the order of `suffixes`.
    """
    with evaluating(model):
        generator = (_SharedPrefixGenerator if shares_prefix(model) else _PlainGenerator)(model, encoder)
        answers = generator.constrained if decode == "constrained" else generator.free
        return in_batches(answers, suffixes, batch_size, progress)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into evaluation mode, and restore its mode at the end."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


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


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """A model without peft's wrapper. Its layers keep their adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def shares_prefix(model: PreTrainedModel) -> bool:
    """Whether `shared_prefix.share_prefix` has been applied to a model."""
    return bool(model.config.get_text_config()._attn_implementation == shared_prefix.NAME)


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


def compute_prefix(decoder: Any, encoder: Encoder) -> shared_prefix.PrefixLayout:
    """Run a decoder on the prefix of an encoder and keep its keys and values."""
    layout = shared_prefix.PrefixLayout(len(encoder.prefix_ids))
    shared_prefix.forward(decoder, layout, torch.tensor(encoder.prefix_ids, device=decoder.device))
    return layout


class _SharedPrefixGenerator:
    """Generates answers after a prefix that is computed once.

    Shapes: B rows in a batch, A rows of them unfinished, T tokens in a pass; R and M as in `grammar`.
    """

    def __init__(self, model: PreTrainedModel, encoder: Encoder):
        self.model, self.encoder, self.device = model, encoder, model.device
        base = base_model(model)
        self.decoder, self.head = base.get_decoder(), base.get_output_embeddings()
        self.reachable = ReachableHead(self.head, torch.from_numpy(encoder.grammar.token_ids))
        self.jumps = find_jumps(encoder.grammar)
        self.token_ids, self.next_node = self._on_device(encoder.grammar.token_ids, encoder.grammar.next_node)
        self.ends, self.jump_tokens, self.decisions, self.lengths, self.continuation = self._on_device(
            self.jumps.ends, self.jumps.tokens, self.jumps.decisions, self.jumps.lengths, self.jumps.continuation
        )
        self.prefix = compute_prefix(self.decoder, encoder)

    def _on_device(self, *tables: Any) -> list[torch.Tensor]:
        return [torch.from_numpy(table).to(self.device) for table in tables]

    def _run(self, layout: shared_prefix.Layout, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [T] -> hidden states [T, hidden]."""
        return shared_prefix.forward(self.decoder, layout, ids).last_hidden_state[0]

    def _begin(self, suffixes: list[list[int]]) -> tuple[shared_prefix.DecodingLayout, torch.Tensor]:
        """Run rows without their answers: their layout, and the hidden states [T, hidden]."""
        layout = shared_prefix.DecodingLayout(self.prefix, [len(ids) for ids in suffixes])
        return layout, self._run(layout, torch.tensor([i for ids in suffixes for i in ids], device=self.device))

    def constrained(self, suffixes: list[list[int]]) -> list[list[int]]:
        """Greedy answers of one batch under the grammar. Each step takes one or two decisions of every row."""
        first = self.jump_tokens[0][self.jump_tokens[0] >= 0].tolist()  # the jump from the start, the same for all rows
        layout, hidden = self._begin([ids + first for ids in suffixes])
        rows = torch.arange(len(suffixes), device=self.device)  # [A], the unfinished rows
        node = torch.zeros_like(rows)  # [A], the node that each row has jumped from
        start = layout.lengths.cumsum(0) - len(first) - 1  # [A], the index in `hidden` of the token before the jump
        chosen = []  # for each step the columns taken, int64 [B, 2]
        while True:
            columns, node = self._decide(hidden, node, start)
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
            hidden, start = self._run(layout, ids), count.cumsum(0) - count
        columns_of_rows = torch.stack(chosen, 1).flatten(1).tolist()
        n_end = len(self.encoder.end_ids)
        return [
            spell(self.encoder.grammar, self.jumps, [c for c in columns if c >= 0])[:-n_end]
            for columns in columns_of_rows
        ]

    def _decide(
        self, hidden: torch.Tensor, node: torch.Tensor, start: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the decisions of a jump.

        Args:
            hidden: [T, hidden], of the last pass.
            node: int64 [A], the node that each row has jumped from.
            start: int64 [A], the index in `hidden` of the token before the jump.

        Returns:
            int64 [A, 2], the column taken at each decision, -1 if there was no second one; and int64 [A], the node
            reached.
        """
        decisions = self.decisions[node]  # [A, 2]
        # Some models scale or cap these logits. That keeps their order, so it is left out.
        logits = self.reachable(hidden[start[:, None] + self.lengths[node]])  # [A, 2, R]
        targets = self.next_node[decisions]  # [A, 2, R]
        best = logits.float().masked_fill(targets < 0, -torch.inf).argmax(2)
        reached = targets.gather(2, best[..., None])[..., 0]
        continues = (decisions[:, 1] >= 0) & (best[:, 0] == self.continuation[decisions[:, 0]])
        columns = torch.stack([best[:, 0], torch.where(continues, best[:, 1], -1)], 1)
        return columns, torch.where(continues, reached[:, 1], reached[:, 0])

    def free(self, suffixes: list[list[int]]) -> list[list[int]]:
        """Greedy answers of one batch over the whole vocabulary, up to an end token or the limit."""
        stop = torch.tensor(sorted(_stop_ids(self.model, self.encoder)), device=self.device)
        layout, hidden = self._begin(suffixes)
        hidden = hidden[layout.lengths.cumsum(0) - 1]
        rows = torch.arange(len(suffixes), device=self.device)
        answers: list[list[int]] = [[] for _ in suffixes]
        for _ in range(self.encoder.grammar.max_length + FREE_TOKENS):
            ids = self.head(hidden).argmax(1)
            unfinished = ~torch.isin(ids, stop)
            rows, ids = rows[unfinished], ids[unfinished]
            for i, token in zip(rows.tolist(), ids.tolist(), strict=True):
                answers[i].append(token)
            if not len(rows):
                break
            layout.append(rows, torch.zeros_like(rows))
            hidden = self._run(layout, ids)
        return answers


class _PlainGenerator:
    """Generates answers with transformers, each row in full, for models that cannot share a prefix."""

    def __init__(self, model: PreTrainedModel, encoder: Encoder):
        self.model, self.encoder = model, encoder

    def constrained(self, suffixes: list[list[int]]) -> list[list[int]]:
        """Greedy answers of one batch under the grammar."""
        n_prompt = len(self.encoder.prefix_ids) + max(map(len, suffixes))
        stop = {self.encoder.end_ids[0]}
        return self._generate(
            suffixes, stop, self.encoder.grammar.max_length, prefix_allowed_tokens_fn=self._allowed_tokens(n_prompt)
        )

    def free(self, suffixes: list[list[int]]) -> list[list[int]]:
        """Greedy answers of one batch over the whole vocabulary, up to an end token or the limit."""
        stop = _stop_ids(self.model, self.encoder)
        return self._generate(suffixes, stop, self.encoder.grammar.max_length + FREE_TOKENS)

    def _generate(
        self, suffixes: list[list[int]], stop: set[int], max_new_tokens: int, **settings: Any
    ) -> list[list[int]]:
        prompts = [[*self.encoder.prefix_ids, *ids] for ids in suffixes]
        n_prompt = max(map(len, prompts))
        pad, device = self.encoder.tokenizer.pad_token_id, self.model.device
        output = self.model.generate(
            torch.tensor([[pad] * (n_prompt - len(ids)) + ids for ids in prompts], device=device),
            attention_mask=torch.tensor(
                [[0] * (n_prompt - len(ids)) + [1] * len(ids) for ids in prompts], device=device
            ),
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(stop),
            pad_token_id=pad,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # the default of some models is another one
            use_cache=True,
            **settings,
        )
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
    declared = model.generation_config.eos_token_id
    several = declared if isinstance(declared, list) else [declared]
    return {encoder.end_ids[-1], *(i for i in several if i is not None)}
