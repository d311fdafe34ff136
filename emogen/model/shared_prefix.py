"""Attention among rows that share a prefix, for every transformers model whose attention function can be replaced.

All rows of a run begin with the same instruction, the prefix. A batch of B rows is computed as one packed sequence

    prefix | rest of row 1 | rest of row 2 | ... | rest of row B

in which each token keeps the position that it has in its own row. All layers but attention treat each token by itself,
so it is enough to restrict attention: a token sees the prefix and the earlier tokens of its own row, and nothing else.
The outputs equal those of B separate rows. The prefix is computed once, and nothing is padded.

A layout describes the tokens of one forward pass: their positions, and what each of them sees. It is passed to the
model as the keyword argument `layout`, and transformers hands it on to every attention layer. There are three layouts:

    TrainingLayout   the prefix and the rest of all rows, in one pass with gradients
    PrefixLayout     the prefix alone; its keys and values are kept
    DecodingLayout   rows after a computed prefix: the rest of each row first, then a few tokens at a time

Shapes: T tokens in the pass, P tokens in the prefix, B rows, S tokens in a row after the prefix; H heads of queries, KV
heads of keys and values, G = H / KV heads of queries for each head of keys, D values in a head.
"""

import logging
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from emogen.model.onednn import use_onednn

log = logging.getLogger(__name__)

NAME = "shared_prefix"  # the name of the attention implementation


class Layout(Protocol):
    """The tokens of a forward pass: where each stands, and what each sees.

    Attributes:
        positions: int64 [T], the position of each token in its own row.
    """

    positions: torch.Tensor

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
        settings: dict[str, Any],
    ) -> torch.Tensor:
        """The attention of one layer.

        Args:
            layer: index of the layer.
            query: [1, H, T, D].
            key, value: [1, KV, T, D].
            window: width of a sliding window in tokens; None for full attention.
            settings: the arguments `scale` and `dropout_p` of SDPA.

        Returns:
            [1, T, H, D].
        """
        ...


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls in each layer; without a layout, that of `sdpa`."""
    if layout is None:
        settings = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings, **kwargs)
    settings = {"scale": scaling, "dropout_p": dropout}
    return layout.attend(module.layer_idx, query, key, value, sliding_window, settings), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def forward(model: Any, layout: Layout, ids: torch.Tensor, **kwargs: Any) -> Any:
    """Run a model, or its decoder alone, on the tokens of a layout.

    Args:
        ids: int64 [T], the token ids.
        kwargs: further arguments of the model.
    """
    # transformers builds no mask if it is given one of four dimensions. The layout takes its place, so it is a dummy.
    dummy_mask = torch.empty(1, 1, 1, 1, device=ids.device)
    return model(
        input_ids=ids[None],
        position_ids=layout.positions.to(ids.device)[None],
        attention_mask=dummy_mask,
        layout=layout,
        use_cache=False,
        **kwargs,
    )


def share_prefix(model: PreTrainedModel) -> bool:
    """Switch a model to shared-prefix attention.

    Returns:
        Whether the model supports it. If it does not, it is left as it was and the reason is logged.
    """
    config = model.config.get_text_config()
    other_layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    reason = None
    if other_layers:
        reason = f"it has layers of {', '.join(sorted(other_layers))}"
    elif config._attn_implementation != "sdpa":
        reason = f"attn_implementation is {config._attn_implementation}, not sdpa"
    elif not model._can_set_attn_implementation() or getattr(config, "attn_logit_softcapping", None):
        reason = "its attention cannot be replaced"
    else:
        use_onednn(model)
        model.set_attn_implementation(NAME)
        if not _agrees(model):
            model.set_attn_implementation("sdpa")
            reason = "packed rows get other logits than plain rows"
    if reason:
        log.warning(f"shared_prefix: off for this {config.model_type} model: {reason}. Every row is computed in full.")
    return reason is None


@torch.no_grad()
def _agrees(model: PreTrainedModel) -> bool:
    """Whether packed rows get the logits of plain rows, tried on two short rows.

    The model itself is tried, because no list of supported architectures is complete. An unsupported one changes the
    logits by as much as they vary; rounding, even in bf16, changes them far less.
    """
    if model.device.type == "meta":
        return True
    rows = torch.arange(3, 15, device=model.device).view(2, 6) % model.config.get_text_config().vocab_size
    rows[1, :3] = rows[0, :3]
    plain = model(input_ids=rows, use_cache=False).logits.float()
    packed = torch.cat([rows[0], rows[1, 3:]])
    try:
        logits = forward(model, TrainingLayout(3, [(3,), (3,)]), packed).logits.float()
    except TypeError:  # the model's forward does not accept `layout`
        return False
    shared = torch.stack([logits[0, :6], torch.cat([logits[0, :3], logits[0, 6:]])])
    difference = (shared - plain).abs().mean(2).max()  # NaN if the weights are not loaded yet; that passes
    return not bool(difference > 0.1 * plain.std())


# The numbers of tokens of a row after the prefix: those of its trunk, then those of each branch that follows the trunk.
Shape = tuple[int, ...]


class TrainingLayout:
    """A prefix and the rest of B rows. Gradients flow from all rows into the prefix.

    A row may branch: several continuations follow its trunk (the questions of `yes_no` after a text). Each continuation
    sees the trunk and none of the others.

    Args:
        n_prefix: the number of tokens that the rows share.
        shapes: the shape of each row. Neighbours of equal shape are computed together, so rows should be sorted.
    """

    def __init__(self, n_prefix: int, shapes: Sequence[Shape]):
        self.n_prefix = n_prefix
        self.groups = _groups(shapes)
        self.causal_masks = _CausalMasks(n_prefix + max(shape[0] + max(shape[1:], default=0) for shape in shapes))
        self.row_masks: dict[tuple[int | None, Shape], torch.Tensor] = {}
        self.positions = torch.cat([torch.arange(n_prefix), *(n_prefix + _places(shape)[0] for shape in shapes)])

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
        settings: dict[str, Any],
    ) -> torch.Tensor:
        """See `Layout.attend`."""
        sizes = [self.n_prefix, query.shape[2] - self.n_prefix]
        (query, row_queries), (key, row_keys), (value, row_values) = (x.split(sizes, 2) for x in (query, key, value))
        mask = self.causal_masks.get(window, query.device)
        prefix_output = _attend_prefix(query, key, value, mask, window, settings)
        for _, shape in self.groups:
            if (window, shape) not in self.row_masks:
                self.row_masks[window, shape] = _row_mask(mask, self.n_prefix, shape)
        masks = [self.row_masks[window, shape] for _, shape in self.groups]
        row_output = _attend_rows(self.groups, masks, row_queries, row_keys, row_values, key, value, settings)
        return torch.cat([prefix_output, row_output], 1)


class PrefixLayout:
    """The prefix alone. Its keys and values are kept for `DecodingLayout`.

    Attributes:
        keys, values: [1, KV, P, D] by layer, once the prefix has been run.
    """

    def __init__(self, n_prefix: int):
        self.n_prefix = n_prefix
        self.positions = torch.arange(n_prefix)
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.causal_masks = _CausalMasks(n_prefix)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
        settings: dict[str, Any],
    ) -> torch.Tensor:
        """See `Layout.attend`."""
        self.keys[layer], self.values[layer] = key, value
        mask = self.causal_masks.get(window, query.device)
        return _attend_prefix(query, key, value, mask, window, settings)


class DecodingLayout:
    """B rows after a computed prefix: the rest of each row in the first pass, then a few tokens at a time.

    A row may branch (`branch`), as in a search over answers. The branches of a row share the tokens from before the
    split, which are stored once, and do not see each other's own tokens. At first each row has a single branch.

    The tokens of a row are stored in K columns in the order in which they are run, so tokens of different branches
    alternate. A token's place is its position after the prefix in its own branch.

    Args:
        prefix: the layout of the prefix, after its forward pass.
        lengths: the number of tokens in the rest of each row.

    Attributes:
        lengths: int64 [A], the number of tokens of each of A branches.
        branch_rows: int64 [A], the row of each branch, ascending.
    """

    def __init__(self, prefix: PrefixLayout, lengths: Sequence[int]):
        self.prefix = prefix
        self.groups = _groups([(length,) for length in lengths])
        device = prefix.keys[0].device
        self.keys: dict[int, torch.Tensor] = {}  # by layer: [B, KV, K, D]
        self.values: dict[int, torch.Tensor] = {}
        self.causal_masks = _CausalMasks(prefix.n_prefix + max(lengths))
        self.lengths = torch.tensor(lengths, device=device)
        self.branch_rows = torch.arange(len(lengths), device=device)
        self.n_stored = self.lengths  # [B], the number of columns in use
        self.places = torch.arange(max(lengths), device=device).repeat(len(lengths), 1)  # [B, K], of the stored tokens
        self.seen = self.places < self.lengths[:, None]  # [A, K], the columns that belong to each branch
        # The tokens of the next forward pass: at first all tokens of the rows, one row after another.
        self.rows = self.branch_rows.repeat_interleave(self.lengths)  # [T]
        self.columns = self.places[self.seen]  # [T]
        self.positions = prefix.n_prefix + self.columns
        self.slots: torch.Tensor | None = None  # None in the first pass

    def branch(self, parents: torch.Tensor) -> None:
        """Continue with the given branches only. A branch that is named several times is split.

        Args:
            parents: int64 [A'], positions of branches, so that their rows are in ascending order.
        """
        self.branch_rows, self.lengths, self.seen = self.branch_rows[parents], self.lengths[parents], self.seen[parents]

    def append(self, branches: torch.Tensor, slots: torch.Tensor) -> None:
        """Announce the T tokens of the next forward pass.

        Args:
            branches: int64 [T], the branch of each token, ascending.
            slots: int64 [T], 0 for the first new token of a branch, 1 for its second, and so on.
        """
        places = self.lengths[branches] + slots
        self.rows = self.branch_rows[branches]
        self.slots = torch.arange(len(slots), device=slots.device) - torch.searchsorted(self.rows, self.rows)
        self.columns = self.n_stored[self.rows] + self.slots
        self._make_room(int(self.columns.max()) + 1)
        self.places[self.rows, self.columns] = places
        self.seen[branches, self.columns] = True
        # A token sees its own branch, except for the new tokens that follow it.
        self.token_sees = self.seen[branches] & (self.places[self.rows] <= places[:, None])  # [T, K]
        self.visible: dict[int | None, torch.Tensor] = {}  # by window
        one = torch.ones_like(slots)
        self.lengths = self.lengths.index_add(0, branches, one)
        self.n_stored = self.n_stored.index_add(0, self.rows, one)
        self.positions = self.prefix.n_prefix + places
        # N rows have new tokens; `token_rows` [T] numbers the row of each token among these.
        self.active, self.token_rows = self.rows.unique(return_inverse=True)

    def append_padded(self, branches: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Announce the tokens of the next forward pass as one list for each branch.

        Args:
            branches: int64 [n], ascending.
            ids: int64 [n, M], the token ids of each branch, padded with -1.

        Returns:
            int64 [T], the ids to run; and int64 [n], the number of them in each branch.
        """
        is_token = ids >= 0
        count = is_token.sum(1)
        slots = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)[is_token]
        self.append(branches.repeat_interleave(count), slots)
        return ids[is_token], count

    def _make_room(self, n_columns: int) -> None:
        missing = n_columns - self.places.shape[1]
        if missing > 0:
            more = max(missing, 32)  # everything is copied, so this should be rare
            self.places, self.seen = functional.pad(self.places, (0, more)), functional.pad(self.seen, (0, more))
            for cache in (self.keys, self.values):
                for layer, tensor in cache.items():
                    cache[layer] = functional.pad(tensor, (0, 0, 0, more))

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
        settings: dict[str, Any],
    ) -> torch.Tensor:
        """See `Layout.attend`."""
        if layer not in self.keys:
            shape = (len(self.n_stored), key.shape[1], self.places.shape[1], key.shape[3])
            self.keys[layer], self.values[layer] = key.new_zeros(shape), value.new_zeros(shape)
        self.keys[layer][self.rows, :, self.columns] = key[0].transpose(0, 1)
        self.values[layer][self.rows, :, self.columns] = value[0].transpose(0, 1)
        prefix_key, prefix_value = self.prefix.keys[layer], self.prefix.values[layer]
        if self.slots is None:
            mask = self.causal_masks.get(window, query.device)
            masks = [_row_mask(mask, self.prefix.n_prefix, shape) for _, shape in self.groups]
            return _attend_rows(self.groups, masks, query, key, value, prefix_key, prefix_value, settings)
        if window not in self.visible:
            self.visible[window] = self._visible(window)
        scale = settings["scale"]
        return _attend_few(
            query * (query.shape[3] ** -0.5 if scale is None else scale),
            prefix_key[0],
            prefix_value[0],
            self._active_rows(self.keys[layer]),
            self._active_rows(self.values[layer]),
            self.token_rows,
            self.slots,
            self.visible[window],
        )

    def _active_rows(self, cache: torch.Tensor) -> torch.Tensor:
        """[B, ...] -> [N, ...], copied only if some rows have no new tokens."""
        return cache if len(self.active) == len(cache) else cache.index_select(0, self.active)

    def _visible(self, window: int | None) -> torch.Tensor:
        """What each token sees of the prefix and of its row, bool [T, P + K]."""
        visible = functional.pad(self.token_sees, (self.prefix.n_prefix, 0), value=True)
        if window is None:
            return visible
        own = self.prefix.n_prefix + self.places[self.rows]
        positions = torch.cat([self.prefix.positions.to(own.device).expand(len(own), -1), own], 1)
        return visible & (self.positions[:, None] - positions < window)


class _CausalMasks:
    """The causal masks of one row of n tokens, made once for each window: bool [n, n] (query, key)."""

    def __init__(self, n_tokens: int):
        self.n_tokens = n_tokens
        self._masks: dict[int | None, torch.Tensor] = {}

    def get(self, window: int | None, device: torch.device) -> torch.Tensor:
        if window not in self._masks:
            index = torch.arange(self.n_tokens, device=device)
            distance = index[:, None] - index[None, :]
            seen = distance >= 0
            self._masks[window] = seen if window is None else seen & (distance < window)
        return self._masks[window]


def _groups(shapes: Sequence[Shape]) -> list[tuple[int, Shape]]:
    """Runs of rows of equal shape, as (number of rows, shape)."""
    return [(len(list(run)), shape) for shape, run in groupby(shapes)]


def _places(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """The place of each token of a row (its position after the prefix), and its branch (0 for the trunk): int64 [S]."""
    parts = [torch.arange(shape[0]), *(torch.arange(shape[0], shape[0] + n) for n in shape[1:])]
    return torch.cat(parts), torch.arange(len(shape)).repeat_interleave(torch.tensor(shape))


def _row_mask(causal_mask: torch.Tensor, n_prefix: int, shape: Shape) -> torch.Tensor:
    """What the tokens of a row see of the prefix and of the row, bool [S, P + S].

    Args:
        causal_mask: bool [n, n], of a row without branches, from the first token of the prefix on.
    """
    if len(shape) == 1:
        return causal_mask[n_prefix : n_prefix + shape[0], : n_prefix + shape[0]]
    places, branch = (index.to(causal_mask.device) for index in _places(shape))
    own = n_prefix + places
    everything = torch.cat([torch.arange(n_prefix, device=causal_mask.device), own])
    key_branch = torch.cat([branch.new_zeros(n_prefix), branch])
    return causal_mask[own][:, everything] & ((key_branch == 0) | (key_branch == branch[:, None]))


def _attend_prefix(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal_mask: torch.Tensor,
    window: int | None,
    settings: dict[str, Any],
) -> torch.Tensor:
    """Attention within the prefix: [1, P, H, D]."""
    n = query.shape[2]
    is_causal = window is None or n <= window  # the window is not reached, so SDPA's own causal kernel will do
    output = scaled_dot_product_attention(
        query,
        *_match_heads(query, key, value),
        attn_mask=None if is_causal else causal_mask[:n, :n],
        is_causal=is_causal,
        enable_gqa=_uses_gqa(query),
        **settings,
    )
    return output.transpose(1, 2)


def _attend_rows(
    groups: list[tuple[int, Shape]],
    masks: list[torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    settings: dict[str, Any],
) -> torch.Tensor:
    """Attention of whole packed rows to the prefix and to themselves. Rows of one shape go together, without padding.

    Args:
        groups: runs of rows of equal shape.
        masks: bool [S, P + S], one for each group.
        query, key, value: [1, heads, T, D], of the rows.
        prefix_key, prefix_value: [1, KV, P, D].

    Returns:
        [1, T, H, D].
    """
    key, value = _match_heads(query, key, value)
    prefix_key, prefix_value = _match_heads(query, prefix_key, prefix_value)
    sizes = [n_rows * sum(shape) for n_rows, shape in groups]
    parts = [x.split(sizes, 2) for x in (query, key, value)]
    outputs = []
    for (n_rows, shape), mask, *group in zip(groups, masks, *parts, strict=True):
        q, k, v = (x[0].unflatten(1, (n_rows, sum(shape))).transpose(0, 1) for x in group)  # [rows, heads, S, D]
        output = scaled_dot_product_attention(
            q,
            torch.cat([prefix_key.expand(n_rows, -1, -1, -1), k], 2),
            torch.cat([prefix_value.expand(n_rows, -1, -1, -1), v], 2),
            attn_mask=mask,
            enable_gqa=_uses_gqa(query),
            **settings,
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1)[None])
    return torch.cat(outputs, 1)


def _attend_few(
    query: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    row: torch.Tensor,
    slots: torch.Tensor,
    visible: torch.Tensor,
) -> torch.Tensor:
    """Attention of a few new tokens of each row.

    It is written out instead of calling SDPA, so that the keys of the prefix are read once for all rows, and not copied
    for each row.

    Args:
        query: [1, H, T, D], scaled.
        prefix_key, prefix_value: [KV, P, D].
        key, value: [N, KV, K, D], of the rows themselves.
        row: int64 [T], the row of each token.
        slots: int64 [T], the number of each token among the new tokens of its row.
        visible: bool [T, P + K], what each token sees.

    Returns:
        [1, T, H, D].
    """
    n_rows, n_kv = key.shape[:2]
    n_prefix, n_groups = prefix_key.shape[1], query.shape[1] // n_kv
    n_slots = int(slots.max()) + 1

    def padded(by_token: torch.Tensor) -> torch.Tensor:  # [KV, G, T, X] -> [N, KV, G slots, X]
        full = by_token.new_zeros(n_rows, n_kv, n_groups, n_slots, by_token.shape[3])
        full[row, :, :, slots] = by_token.permute(2, 0, 1, 3)
        return full.flatten(2, 3)

    def unpadded(by_row: torch.Tensor) -> torch.Tensor:  # [N, KV, G slots, X] -> [KV, G, T, X]
        return by_row.unflatten(2, (n_groups, n_slots))[row, :, :, slots].permute(1, 2, 0, 3)

    query = query[0].unflatten(0, (n_kv, n_groups))  # [KV, G, T, D]
    prefix_scores = (query.flatten(1, 2) @ prefix_key.mT).unflatten(1, (n_groups, -1))  # [KV, G, T, P]
    row_scores = unpadded(padded(query) @ key.mT)  # [KV, G, T, K]
    scores = torch.cat([prefix_scores, row_scores], 3).float().masked_fill(~visible, -torch.inf)
    weights = scores.softmax(3).to(query.dtype)
    prefix_output = (weights[..., :n_prefix].flatten(1, 2) @ prefix_value).unflatten(1, (n_groups, -1))
    row_output = unpadded(padded(weights[..., n_prefix:]) @ value)  # [KV, G, T, D]
    return (prefix_output + row_output).flatten(0, 1).transpose(0, 1)[None]


def _uses_gqa(query: torch.Tensor) -> bool:
    """Whether SDPA is given fewer heads of keys than of queries. Off the CPU, that and a mask exclude fast kernels."""
    return query.device.type == "cpu"


def _match_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values with as many heads as SDPA expects: their own number, or that of the query."""
    times = 1 if _uses_gqa(query) else query.shape[1] // key.shape[1]
    return repeat_kv(key, times), repeat_kv(value, times)
