"""Attention among rows that share a prefix, for any model of transformers that lets its attention be chosen.

Every row of a run begins with the same instruction. A batch is one packed row

    prefix | rest of row 1 | rest of row 2 | ... | rest of row B

whose tokens stand at the positions they would have alone. Everything but attention treats each token by itself, so it
is enough that attention lets each token see the prefix and the earlier tokens of its own row, and nothing else: the
outputs are those of B separate rows, with the prefix computed once and nothing padded.

A layout says how the tokens of a forward pass lie. It is passed to the model as `layout=` and reaches every layer:
`PackedRows` to train on, `Prefix` and `Rows` to generate with.
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

NAME = "shared_prefix"  # of the attention implementation


class Layout(Protocol):
    """How the tokens of a forward pass lie. `positions` int64 [T]: where each stands in its own text."""

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
        """Query [1, H, T, D], key and value [1, KV, T, D] -> output [1, T, H, D].

        Args:
            window: of a sliding layer, in tokens.
            settings: SDPA's `scale` and `dropout_p`.
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
    if layout is None:
        settings = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings, **kwargs)
    settings = {"scale": scaling, "dropout_p": dropout}
    return layout.attend(module.layer_idx, query, key, value, sliding_window, settings), None


AttentionInterface.register(NAME, _attention)


AttentionMaskInterface.register(NAME, sdpa_mask)


def forward(model: Any, layout: Layout, ids: torch.Tensor, **kwargs: Any) -> Any:
    """Run a model, or its decoder alone, on token ids int64 [T] that lie so."""
    # A mask of four dimensions is handed on as it is, so none is made; the layout stands for it.
    unused = torch.empty(1, 1, 1, 1, device=ids.device)
    return model(
        input_ids=ids[None],
        position_ids=layout.positions.to(ids.device)[None],
        attention_mask=unused,
        layout=layout,
        use_cache=False,
        **kwargs,
    )


def share_prefix(model: PreTrainedModel) -> bool:
    """Let a model compute rows that share their prefix. False, and said why, where it could not do so exactly."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    reason = None
    if kinds:
        reason = f"it has layers of {', '.join(sorted(kinds))}"
    elif config._attn_implementation != "sdpa":
        reason = f"attn_implementation is {config._attn_implementation}, and sdpa is needed"
    elif not model._can_set_attn_implementation() or getattr(config, "attn_logit_softcapping", None):
        reason = "its attention is of its own kind"
    else:
        use_onednn(model)
        model.set_attn_implementation(NAME)
        if not _agrees(model):
            model.set_attn_implementation("sdpa")
            reason = "it answers otherwise than on plain rows"
    if reason:
        log.warning(f"shared_prefix: not for this {config.model_type} model: {reason}. Every row is computed in full.")
    return reason is None


@torch.no_grad()
def _agrees(model: PreTrainedModel) -> bool:
    """Whether two packed rows get the logits of plain ones: a look at the real model, since no list of them is whole.

    What would be wrong in principle is wrong by as much as logits vary. Rounding, in bf16 too, is far from that.
    """
    if model.device.type == "meta":
        return True
    rows = torch.arange(3, 15, device=model.device).view(2, 6) % model.config.get_text_config().vocab_size
    rows[1, :3] = rows[0, :3]
    plain = model(input_ids=rows, use_cache=False).logits.float()
    packed = torch.cat([rows[0], rows[1, 3:]])
    try:
        logits = forward(model, PackedRows(3, [(3,), (3,)]), packed).logits.float()
    except TypeError:  # its forward passes on no arguments that it does not know
        return False
    shared = torch.stack([logits[0, :6], torch.cat([logits[0, :3], logits[0, 6:]])])
    difference = (shared - plain).abs().mean(2).max()  # NaN for weights that are not there yet: nothing to say then
    return not bool(difference > 0.1 * plain.std())


Shape = tuple[int, ...]  # of a row after the prefix: how many tokens, and how many in each branch after them


class PackedRows:
    """A prefix and the rest of B rows, to train on. Gradients flow back into the prefix from all rows.

    A row may branch: after its first tokens come several continuations, each of which goes on from those and sees
    nothing of the others (the questions of `yes_no`).

    Args:
        n_prefix: how many tokens the rows share.
        shapes: of the rest of each row. Neighbours of equal shape are computed together, so sort the rows.
    """

    def __init__(self, n_prefix: int, shapes: Sequence[Shape]):
        self.n_prefix = n_prefix
        self.groups = _groups(shapes)
        self.masks = _Masks(n_prefix + max(shape[0] + max(shape[1:], default=0) for shape in shapes))
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
        """As `Layout` says."""
        sizes = [self.n_prefix, query.shape[2] - self.n_prefix]
        (query, row_queries), (key, row_keys), (value, row_values) = (x.split(sizes, 2) for x in (query, key, value))
        mask = self.masks.get(window, query.device)
        of_prefix = _causal(query, key, value, mask, window, settings)
        for _, shape in self.groups:
            if (window, shape) not in self.row_masks:
                self.row_masks[window, shape] = _row_mask(mask, self.n_prefix, shape)
        masks = [self.row_masks[window, shape] for _, shape in self.groups]
        of_rows = _attend_rows(self.groups, masks, row_queries, row_keys, row_values, key, value, settings)
        return torch.cat([of_prefix, of_rows], 1)


class Prefix:
    """The prefix alone; its keys and values [1, KV, P, D], by layer, are kept for `Rows`."""

    def __init__(self, n_prefix: int):
        self.n_prefix = n_prefix
        self.positions = torch.arange(n_prefix)
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.masks = _Masks(n_prefix)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
        settings: dict[str, Any],
    ) -> torch.Tensor:
        """As `Layout` says."""
        self.keys[layer], self.values[layer] = key, value
        mask = self.masks.get(window, query.device)
        return _causal(query, key, value, mask, window, settings)


class Rows:
    """B rows after a prefix, to generate with: first the rest of each row, then a few tokens at a time for some.

    A row may branch: its branches see what they have in common, which is kept once, and nothing of each other. At first
    each row is one branch.

    Args:
        prefix: what all rows begin with, computed.
        lengths: of the rest of each row.
    """

    def __init__(self, prefix: Prefix, lengths: Sequence[int]):
        self.prefix = prefix
        self.groups = _groups([(length,) for length in lengths])
        device = prefix.keys[0].device
        self.keys: dict[int, torch.Tensor] = {}  # by layer: [B, KV, K, D]
        self.values: dict[int, torch.Tensor] = {}
        self.masks = _Masks(prefix.n_prefix + max(lengths))
        self.lengths = torch.tensor(lengths, device=device)  # [A], how many tokens each branch has
        self.row = torch.arange(len(lengths), device=device)  # [A], the row of each branch, ascending
        # Of each row, how many tokens are kept [B] and where each of them stands [B, K]; which a branch sees [A, K].
        self.used = self.lengths
        self.places = torch.arange(max(lengths), device=device).repeat(len(lengths), 1)
        self.seen = self.places < self.lengths[:, None]
        # The tokens that are run next: all there are, one row after another. Of each, the row and the place in it.
        self.rows = self.row.repeat_interleave(self.lengths)  # [T]
        self.columns = self.places[self.seen]  # [T]
        self.positions = prefix.n_prefix + self.columns
        self.slots: torch.Tensor | None = None

    def branch(self, parents: torch.Tensor) -> None:
        """Go on with these branches, int64 [A], alone; one that stands there several times branches. The rows that they
        belong to have to be in ascending order."""
        self.row, self.lengths, self.seen = self.row[parents], self.lengths[parents], self.seen[parents]

    def append(self, branches: torch.Tensor, slots: torch.Tensor) -> None:
        """Say where the next T tokens go: token t is the `slots[t]`-th new one of `branches[t]`, in ascending order."""
        places = self.lengths[branches] + slots
        self.rows = self.row[branches]
        self.slots = torch.arange(len(slots), device=slots.device) - torch.searchsorted(self.rows, self.rows)
        self.columns = self.used[self.rows] + self.slots
        self._make_room(int(self.columns.max()) + 1)
        self.places[self.rows, self.columns] = places
        self.seen[branches, self.columns] = True
        # What a branch sees that stands later is what follows the token.
        self.own = self.seen[branches] & (self.places[self.rows] <= places[:, None])  # [T, K]
        self.visible: dict[int | None, torch.Tensor] = {}
        one = torch.ones_like(slots)
        self.lengths = self.lengths.index_add(0, branches, one)
        self.used = self.used.index_add(0, self.rows, one)
        self.positions = self.prefix.n_prefix + places
        # The A rows that go on, and which of them each token is of.
        self.active, self.token_rows = self.rows.unique(return_inverse=True)

    def _make_room(self, n_columns: int) -> None:
        more = n_columns - self.places.shape[1]
        if more > 0:
            more = max(more, 32)  # seldom, since all is copied
            self.places, self.seen = (functional.pad(of, (0, more)) for of in (self.places, self.seen))
            for of_layer in (self.keys, self.values):
                for layer, tensor in of_layer.items():
                    of_layer[layer] = functional.pad(tensor, (0, 0, 0, more))

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
        settings: dict[str, Any],
    ) -> torch.Tensor:
        """As `Layout` says."""
        if layer not in self.keys:
            shape = (len(self.used), key.shape[1], self.places.shape[1], key.shape[3])
            self.keys[layer], self.values[layer] = key.new_zeros(shape), value.new_zeros(shape)
        self.keys[layer][self.rows, :, self.columns] = key[0].transpose(0, 1)
        self.values[layer][self.rows, :, self.columns] = value[0].transpose(0, 1)
        prefix_key, prefix_value = self.prefix.keys[layer], self.prefix.values[layer]
        if self.slots is None:
            mask = self.masks.get(window, query.device)
            masks = [_row_mask(mask, self.prefix.n_prefix, shape) for _, shape in self.groups]
            return _attend_rows(self.groups, masks, query, key, value, prefix_key, prefix_value, settings)
        if window not in self.visible:
            self.visible[window] = self._visible(window)
        scale = settings["scale"]
        return _attend_few(
            query * (query.shape[3] ** -0.5 if scale is None else scale),
            prefix_key[0],
            prefix_value[0],
            self._of_active(self.keys[layer]),
            self._of_active(self.values[layer]),
            self.token_rows,
            self.slots,
            self.visible[window],
        )

    def _of_active(self, by_row: torch.Tensor) -> torch.Tensor:
        """[B, ...] -> [A, ...], copied only where some rows do not go on."""
        return by_row if len(self.active) == len(by_row) else by_row.index_select(0, self.active)

    def _visible(self, window: int | None) -> torch.Tensor:
        """What each token sees of the prefix and of its row, bool [T, P + K]."""
        visible = functional.pad(self.own, (self.prefix.n_prefix, 0), value=True)
        if window is None:
            return visible
        own = self.prefix.n_prefix + self.places[self.rows]
        places = torch.cat([self.prefix.positions.to(own.device).expand(len(own), -1), own], 1)
        return visible & (self.positions[:, None] - places < window)


class _Masks:
    """Who sees whom among the tokens of one row, by window: bool [n, n] (query, key)."""

    def __init__(self, n_tokens: int):
        self.n_tokens = n_tokens
        self._made: dict[int | None, torch.Tensor] = {}

    def get(self, window: int | None, device: torch.device) -> torch.Tensor:
        if window not in self._made:
            index = torch.arange(self.n_tokens, device=device)
            distance = index[:, None] - index[None, :]
            seen = distance >= 0
            self._made[window] = seen if window is None else seen & (distance < window)
        return self._made[window]


def _groups(shapes: Sequence[Shape]) -> list[tuple[int, Shape]]:
    """Runs of equal shapes, as (how many, shape)."""
    return [(len(list(run)), shape) for shape, run in groupby(shapes)]


def _places(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each of the S tokens of a row, its position after the prefix, and its branch (0 before they begin)."""
    parts = [torch.arange(shape[0]), *(torch.arange(shape[0], shape[0] + n) for n in shape[1:])]
    return torch.cat(parts), torch.arange(len(shape)).repeat_interleave(torch.tensor(shape))


def _row_mask(mask: torch.Tensor, n_prefix: int, shape: Shape) -> torch.Tensor:
    """Whom the S tokens of a row see among prefix and row, bool [S, P + S], from who sees whom in a straight one."""
    if len(shape) == 1:
        return mask[n_prefix : n_prefix + shape[0], : n_prefix + shape[0]]
    places, branch = (of.to(mask.device) for of in _places(shape))
    own = n_prefix + places
    everything = torch.cat([torch.arange(n_prefix, device=mask.device), own])
    seen_branch = torch.cat([branch.new_zeros(n_prefix), branch])
    return mask[own][:, everything] & ((seen_branch == 0) | (seen_branch == branch[:, None]))


def _causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    window: int | None,
    settings: dict[str, Any],
) -> torch.Tensor:
    """The prefix among itself: [1, P, H, D]."""
    n = query.shape[2]
    whole = window is None or n <= window
    output = scaled_dot_product_attention(
        query,
        *_for_each_head(query, key, value),
        attn_mask=None if whole else mask[:n, :n],
        is_causal=whole,
        enable_gqa=_grouped(query),
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
    """Whole rows, packed, to the prefix and to themselves: [1, T, H, D]. Rows of one shape go together, unpadded.

    Args:
        masks: of each group, bool [S, P + S].
    """
    key, value = _for_each_head(query, key, value)
    prefix_key, prefix_value = _for_each_head(query, prefix_key, prefix_value)
    sizes = [n_rows * sum(shape) for n_rows, shape in groups]
    parts = [x.split(sizes, 2) for x in (query, key, value)]
    outputs = []
    for (n_rows, shape), mask, *of_group in zip(groups, masks, *parts, strict=True):
        q, k, v = (x[0].unflatten(1, (n_rows, sum(shape))).transpose(0, 1) for x in of_group)  # [rows, heads, S, D]
        output = scaled_dot_product_attention(
            q,
            torch.cat([prefix_key.expand(n_rows, -1, -1, -1), k], 2),
            torch.cat([prefix_value.expand(n_rows, -1, -1, -1), v], 2),
            attn_mask=mask,
            enable_gqa=_grouped(query),
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
    seen: torch.Tensor,
) -> torch.Tensor:
    """A few tokens of each row: written out, so that the prefix is read once for all rows, and not copied for each.

    Args:
        query: [1, H, T, D], scaled.
        prefix_key, prefix_value: [KV, P, D].
        key, value: [A, KV, K, D], of the rows themselves.
        row, slots: int64 [T], the row of each token, and its place among the new tokens of that row.
        seen: bool [T, P + K], what each may look at.

    Returns:
        [1, T, H, D].
    """
    n_rows, n_kv = key.shape[:2]
    n_prefix, shared = prefix_key.shape[1], query.shape[1] // n_kv  # heads that share a key
    n_slots = int(slots.max()) + 1

    def padded(by_token: torch.Tensor) -> torch.Tensor:  # [KV, G, T, X] -> [A, KV, G S, X]
        full = by_token.new_zeros(n_rows, n_kv, shared, n_slots, by_token.shape[3])
        full[row, :, :, slots] = by_token.permute(2, 0, 1, 3)
        return full.flatten(2, 3)

    def unpadded(by_row: torch.Tensor) -> torch.Tensor:  # [A, KV, G S, X] -> [KV, G, T, X]
        return by_row.unflatten(2, (shared, n_slots))[row, :, :, slots].permute(1, 2, 0, 3)

    query = query[0].unflatten(0, (n_kv, shared))  # [KV, G, T, D]
    to_prefix = (query.flatten(1, 2) @ prefix_key.mT).unflatten(1, (shared, -1))  # [KV, G, T, P]
    to_own = unpadded(padded(query) @ key.mT)  # [KV, G, T, K]
    scores = torch.cat([to_prefix, to_own], 3).float().masked_fill(~seen, -torch.inf)
    weights = scores.softmax(3).to(query.dtype)
    from_prefix = (weights[..., :n_prefix].flatten(1, 2) @ prefix_value).unflatten(1, (shared, -1))
    from_own = unpadded(padded(weights[..., n_prefix:]) @ value)  # [KV, G, T, D]
    return (from_prefix + from_own).flatten(0, 1).transpose(0, 1)[None]


def _grouped(query: torch.Tensor) -> bool:
    # On other devices a mask together with grouped heads would leave the fast kernels.
    return query.device.type == "cpu"


def _for_each_head(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as SDPA takes them: as they are, or one for each head of the query."""
    times = 1 if _grouped(query) else query.shape[1] // key.shape[1]
    return repeat_kv(key, times), repeat_kv(value, times)
