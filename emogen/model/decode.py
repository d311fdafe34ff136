"""Generation: greedy answers from a model, under the grammar or freely; and a probability for each label.

The instruction is computed once. Texts go in batches of like length, without padding. Under the grammar, only the rows
of the output projection that it can reach are computed, tokens without an alternative are never waited for (`Jumps`),
and rows that are done leave their batch. The answers are those of a plain masked greedy search.
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
        if shares_prefix(model):
            engine = _Engine(model, encoder)
            step = engine.constrained if decode == "constrained" else engine.free
        else:
            step = _Plain(model, encoder, decode == "constrained").answers
        return in_batches(step, suffixes, batch_size, progress)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """A model in evaluation mode; then in the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class ReachableHead(torch.nn.Module):
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


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """A model without what peft put around it; its layers keep their adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def shares_prefix(model: PreTrainedModel) -> bool:
    return bool(model.config.get_text_config()._attn_implementation == shared_prefix.NAME)


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


def compute_prefix(decoder: Any, encoder: Encoder) -> shared_prefix.Prefix:
    """The encoder's prefix, computed."""
    layout = shared_prefix.Prefix(len(encoder.prefix_ids))
    shared_prefix.forward(decoder, layout, torch.tensor(encoder.prefix_ids, device=decoder.device))
    return layout


class _Engine:
    """A model with the prefix computed, and the tables of the grammar on its device."""

    def __init__(self, model: PreTrainedModel, encoder: Encoder):
        self.model, self.encoder, self.device = model, encoder, model.device
        base = base_model(model)
        self.decoder, self.head = base.get_decoder(), base.get_output_embeddings()
        self.reachable = ReachableHead(self.head, torch.from_numpy(encoder.grammar.token_ids))
        self.jumps = find_jumps(encoder.grammar)
        grammar, jumps = encoder.grammar, self.jumps
        self.token_ids, self.next_node, self.ends, self.tokens, self.choice, self.length, self.on = (
            torch.from_numpy(table).to(self.device)
            for table in [
                *(grammar.token_ids, grammar.next_node),
                *(jumps.ends, jumps.tokens, jumps.choice, jumps.length, jumps.on),
            ]
        )
        self.prefix = compute_prefix(self.decoder, encoder)

    def _run(self, layout: shared_prefix.Layout, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, hidden] of tokens that lie so."""
        return shared_prefix.forward(self.decoder, layout, ids).last_hidden_state[0]

    def _begin(self, suffixes: list[list[int]]) -> tuple[shared_prefix.Rows, torch.Tensor]:
        """Rows with all but their answers computed, and the hidden states of that."""
        layout = shared_prefix.Rows(self.prefix, [len(ids) for ids in suffixes])
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
