"""Generation: greedy answers from a model, under the grammar or freely.

The instruction's keys and values are computed once; texts go in batches of like length, padded on the left; and every
step chooses among the tokens that the grammar allows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from emogen.encode import Encoder
from emogen.modeling import attention_mask

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
    step = _constrained if decode == "constrained" else _free
    training = model.training
    model.eval()
    try:
        prefix = _prefix_cache(model, encoder.prefix_ids) if suffixes else None
        answers: list[list[int]] = [[] for _ in suffixes]
        # Longest first: a batch that does not fit into memory fails at once, and like lengths need little padding.
        order = sorted(range(len(suffixes)), key=lambda i: -len(suffixes[i]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            for i, ids in zip(rows, step(model, encoder, prefix, [suffixes[i] for i in rows]), strict=True):
                answers[i] = ids
            if progress:
                progress(len(rows))
    finally:
        model.train(training)
    return answers


def _prefix_cache(model: PreTrainedModel, prefix_ids: list[int]) -> DynamicCache:
    # Without a config every layer keeps all keys; sliding windows are cut by the mask, by position.
    cache = DynamicCache()
    ids = torch.tensor([prefix_ids], device=model.device)
    positions = torch.arange(len(prefix_ids), device=model.device)[None]
    causal = positions[:, :, None] >= positions[:, None, :]
    model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=attention_mask(model, positions, positions, causal),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return cache


def _expand(prefix: DynamicCache, batch: int) -> DynamicCache:
    """A cache for `batch` rows that all begin with the prefix. Its keys and values are views; appending copies them."""
    cache = DynamicCache()
    for k, layer in enumerate(prefix.layers):
        cache.update(layer.keys.expand(batch, -1, -1, -1), layer.values.expand(batch, -1, -1, -1), k)
    return cache


class _Batch:
    """B rows under way: their cache, and what each may look at.

    Keys stand in the order prefix (P) | padding | text | answer, so K = P + S + steps.
    """

    def __init__(self, model: PreTrainedModel, encoder: Encoder, prefix: DynamicCache, suffixes: list[list[int]]):
        self.model = model
        self.cache = _expand(prefix, len(suffixes))
        n_prefix, length = len(encoder.prefix_ids), max(map(len, suffixes))
        pad = encoder.tokenizer.pad_token_id or 0
        device = model.device
        self.ids = torch.tensor([[pad] * (length - len(ids)) + ids for ids in suffixes], device=device)  # [B, S]
        n_pad = torch.tensor([length - len(ids) for ids in suffixes], device=device)[:, None]
        index = torch.arange(length, device=device)[None]
        suffix_positions = (index - n_pad).clamp(min=0) + n_prefix  # [B, S]
        prefix_positions = torch.arange(n_prefix, device=device)[None].expand(len(suffixes), -1)
        self.positions = torch.cat([prefix_positions, suffix_positions], 1)  # [B, K]
        self.real = torch.cat([torch.ones_like(prefix_positions, dtype=torch.bool), index >= n_pad], 1)  # [B, K]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Append ids [B, Q], whose positions and `real` are the last Q columns; logits [B, V] after the last one."""
        n_query = ids.shape[1]
        queries = self.positions[:, -n_query:]
        index = torch.arange(self.positions.shape[1], device=ids.device)
        causal = index[None, -n_query:, None] >= index[None, None, :]  # [1, Q, K]
        # A padding query sees itself: a row of the mask with nothing visible would give NaN.
        visible = causal & (self.real[:, None, :] | (index[None, -n_query:, None] == index[None, None, :]))
        output = self.model(
            input_ids=ids,
            position_ids=queries,
            attention_mask=attention_mask(self.model, queries, self.positions, visible),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def append(self, ids: torch.Tensor) -> torch.Tensor:
        """One more token for each row: ids [B] -> logits [B, V]."""
        self.positions = torch.cat([self.positions, self.positions[:, -1:] + 1], 1)
        self.real = torch.cat([self.real, torch.ones_like(self.real[:, :1])], 1)
        return self.forward(ids[:, None])


def _constrained(
    model: PreTrainedModel, encoder: Encoder, prefix: DynamicCache, suffixes: list[list[int]]
) -> list[list[int]]:
    """Greedy steps through the grammar's automaton, all rows at once."""
    tokens = torch.from_numpy(encoder.grammar.token_ids).to(model.device)  # [R]
    next_node = torch.from_numpy(encoder.grammar.next_node).to(model.device)  # [N, R]
    end = len(next_node) - 1
    batch = _Batch(model, encoder, prefix, suffixes)
    node = torch.zeros(len(suffixes), dtype=torch.long, device=model.device)  # [B]
    logits = batch.forward(batch.ids)
    chosen = []
    while True:
        done = node == end
        scores = logits[:, tokens].float().masked_fill(next_node[node] < 0, -torch.inf)  # [B, R]
        best = scores.argmax(1)
        node = torch.where(done, end, next_node[node, best])
        ids = torch.where(done, -1, tokens[best])
        chosen.append(ids)
        if (node == end).all():
            break
        logits = batch.append(ids.clamp(min=0))
    answers = torch.stack(chosen, 1).tolist()  # [B, steps], -1 after the end
    n_end = len(encoder.end_ids)
    return [[token for token in row if token >= 0][:-n_end] for row in answers]


def _free(model: PreTrainedModel, encoder: Encoder, prefix: DynamicCache, suffixes: list[list[int]]) -> list[list[int]]:
    """Greedy steps over the whole vocabulary until the end-of-turn token, or until the room is used up."""
    stop = torch.tensor(sorted(_stop_ids(model, encoder)), device=model.device)
    batch = _Batch(model, encoder, prefix, suffixes)
    done = torch.zeros(len(suffixes), dtype=torch.bool, device=model.device)
    logits = batch.forward(batch.ids)
    chosen = []
    for _ in range(encoder.grammar.max_length + FREE_TOKENS):
        ids = logits.argmax(1)
        done |= torch.isin(ids, stop)
        chosen.append(torch.where(done, -1, ids))
        if done.all():
            break
        logits = batch.append(ids)
    return [[token for token in row if token >= 0] for row in torch.stack(chosen, 1).tolist()]


def _stop_ids(model: PreTrainedModel, encoder: Encoder) -> set[int]:
    declared = model.generation_config.eos_token_id
    several = declared if isinstance(declared, list) else [declared]
    return {encoder.end_ids[-1], *(i for i in several if i is not None)}
