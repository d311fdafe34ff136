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
heads of keys and values, G = H / KV heads of queries for each head of keys, D values in a head (those of the values may
be of another width).
"""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any, Protocol

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from emogen.model.onednn import use_onednn
from emogen.model.plain_rows import agree, base_model, logits_alone, spread, takes_positions, trial_ids, tried

log = logging.getLogger(__name__)

# The number of tokens up to which an accelerator attends to a whole packed row at once. A GPU computes scores that a
# mask hides sooner than it starts the kernels of many small groups; but they grow with the square of the tokens.
MAX_PACKED = 8192
PLAIN = "sdpa"  # the attention implementation that is replaced
NAME = "shared_prefix"  # the one that replaces it


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


# Arguments of attention functions that change nothing here: the layout takes their place, or they ask for outputs.
_WITHOUT_EFFECT = {"position_ids", "cache_position", "use_cache", "is_causal", "output_attentions"}


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layout: "Layout | _MaskCheck | None" = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls in each layer; without a layout, that of `sdpa`.

    Raises:
        NotImplementedError: the layer asks for what no layout computes, such as attention sinks or a position bias.
    """
    if layout is None or isinstance(layout, _MaskCheck):
        if attention_mask is not None and attention_mask.shape[-1] < key.shape[2]:
            raise NotImplementedError("its layers do not pass arguments on to their attention")
        if layout:
            is_causal = kwargs.get("is_causal")
            is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            layout.check(attention_mask, sliding_window, is_causal=is_causal)
        settings = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings, **kwargs)
    others = {name for name, argument in kwargs.items() if argument is not None and argument is not False}
    if others - _WITHOUT_EFFECT:
        raise NotImplementedError(f"its attention has {', '.join(sorted(others - _WITHOUT_EFFECT))}")
    settings = {"scale": scaling, "dropout_p": dropout}
    with _without_cudnn(query.device):
        return layout.attend(module.layer_idx, query, key, value, sliding_window, settings), None


def _without_cudnn(device: torch.device) -> AbstractContextManager[None]:
    """SDPA without cuDNN's kernels, which torch prefers on some GPUs (Hopper, Blackwell).

    cuDNN makes a plan for each new shape, which takes a second for a forward and a backward pass; and hardly two packed
    rows have the same length.
    """
    if device.type == "cpu":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


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


def share_prefix(model: PreTrainedModel, prefix_ids: Sequence[int] = range(3, 9), longest: int = 24) -> bool:
    """Switch a model to shared-prefix attention, if rows get the logits that they get alone.

    Args:
        prefix_ids: the token ids of the prefix.
        longest: the number of tokens of the longest row, prefix included. Longer ones are tried when they occur; see
            `shares_prefix`.

    Returns:
        Whether the model supports it. If it does not, it is left as it was and the reason is logged.
    """
    config = model.config.get_text_config()
    other_layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other_layers:
        reason: str | None = f"it has layers of {', '.join(sorted(other_layers))}"
    elif config._attn_implementation != PLAIN:
        reason = f"attn_implementation is {config._attn_implementation}, not {PLAIN}"
    elif not base_model(model)._can_set_attn_implementation():
        reason = "its attention cannot be replaced"
    elif getattr(config, "attn_logit_softcapping", None):
        reason = "its attention scores are soft-capped"
    else:
        use_onednn(model)
        model.set_attn_implementation(NAME)
        reason, _ = _try(model, prefix_ids, longest)
        if reason:
            model.set_attn_implementation(PLAIN)
    if reason:
        log.warning(f"shared_prefix: off for this {config.model_type} model: {reason}. Every row is computed in full.")
    return reason is None


def shares_prefix(model: PreTrainedModel, prefix_ids: Sequence[int], longest: int) -> bool:
    """Whether rows up to a length can share their prefix: `share_prefix` was applied, and they get their own logits.

    If rows of this length are the first ones to differ (because a window or a switch of RoPE is reached), there is a
    warning, and the model stays as it is: without a layout it computes rows in full.
    """
    config = model.config.get_text_config()
    if config._attn_implementation != NAME:
        return False
    # A rounded length is tried first, so that not every row that is a little longer than all before is a new trial.
    reason, is_new = _try(model, prefix_ids, -(-longest // 64) * 64)
    if reason:
        reason, is_new = _try(model, prefix_ids, longest)
    if reason and is_new:
        log.warning(
            f"shared_prefix: off for rows of up to {longest} tokens of this {config.model_type} model: {reason}. They "
            "are computed in full."
        )
    return reason is None


def _try(model: PreTrainedModel, prefix_ids: Sequence[int], longest: int) -> tuple[str | None, bool]:
    """Why rows with a shared prefix differ from rows alone, or None; and whether that was found out just now.

    Only masks and logits are compared. A layout is made of differentiable operations and of the model's own layers, so
    where it computes the same function, it has the same gradients.
    """

    def trial() -> str | None:
        if not prefix_ids:
            return "its chat template has nothing before the text"
        model.set_attn_implementation(PLAIN)
        try:
            rows = _TrialRows(model, prefix_ids, longest)
        finally:
            model.set_attn_implementation(NAME)
        if not takes_positions(model):
            return "it ignores logits_to_keep"
        return rows.find_wrong_mask() or rows.find_difference()

    return tried(model, "shared prefix", len(prefix_ids), longest, trial)


class _MaskCheck:
    """A row that is computed alone, with the model's own masks. They have to be those that layouts assume.

    Logits do not show every difference: a window that is cut from a row of a real model changes them by less than the
    rounding of bf16.

    Args:
        n_tokens: the number of tokens of the row.
    """

    def __init__(self, n_tokens: int):
        self.expected, self.n_tokens = _CausalMasks(n_tokens), n_tokens
        self.wrong: str | None = None  # what is wrong with the mask of a layer
        self.checked: list[tuple[torch.Tensor, int | None]] = []  # masks and windows; most layers have the same ones

    def check(self, mask: torch.Tensor | None, window: int | None, *, is_causal: bool) -> None:
        """Compare the mask of a layer, bool or additive [1, 1 or H, T, T], with a causal one of the layer's window."""
        if mask is None:
            if not is_causal:
                self.wrong = "its attention is not causal"
            elif window is not None and window < self.n_tokens:
                self.wrong = "it does not apply the windows that its layers name"
            return
        if any(mask is other and window == its_window for other, its_window in self.checked):
            return
        self.checked.append((mask, window))
        visible = mask if mask.dtype == torch.bool else mask == 0
        if mask.dtype != torch.bool and ((mask > -1e4) & (mask != 0)).any():
            self.wrong = "its masks have a bias"
        elif not (visible == self.expected.get(window, mask.device)).all():
            self.wrong = "its masks are not those of its windows"


class _TrialRows:
    """Rows that are computed with a shared prefix and alone: one with a short trunk and two branches, and a long one.

    Each branch ends with a token of its own (`last`), which is run after the others in decoding. The rows are computed
    alone at once; the model has to have its plain attention then, and the shared one afterwards.
    """

    def __init__(self, model: PreTrainedModel, prefix_ids: Sequence[int], longest: int):
        self.model, self.n_prefix = model, len(prefix_ids)
        ids = trial_ids(prefix_ids, max(longest, self.n_prefix + 5) + 16, 0)
        self.prefix, drawn = ids[: self.n_prefix], ids[self.n_prefix :]
        self.trunks = [drawn[:2], drawn[16 : max(longest - self.n_prefix - 3, 2) + 16]]
        self.branches = [[drawn[2:4], drawn[4:5]], [drawn[5:7]]]
        self.last = drawn[7:10]
        # The positions that are compared: in the prefix, and in each trunk.
        self.in_prefix = spread(0, self.n_prefix)
        self.in_trunk = [[0, 1], spread(0, len(self.trunks[1]))]
        in_trunks: list[torch.Tensor] = []
        self.expected_branches: list[torch.Tensor] = []  # [N, V], of each branch with its last token
        for trunk, branches, positions in zip(self.trunks, self.branches, self.in_trunk, strict=True):
            start = self.n_prefix + len(trunk)
            for branch in branches:
                self.row = [*self.prefix, *trunk, *branch, self.last[len(self.expected_branches)]]
                wanted = [*self.in_prefix, *(self.n_prefix + i for i in positions), *range(start, len(self.row))]
                alone = logits_alone(self.model, self.row, wanted)
                prefix, own, rest = alone.split([len(self.in_prefix), len(positions), len(branch) + 1])
                self.expected_branches.append(rest)
            in_trunks.append(own)
        self.row_positions, self.row_alone = wanted, alone  # those of the last and longest row
        self.expected_prefix, self.expected_trunks = prefix, in_trunks

    def find_wrong_mask(self) -> str | None:
        """Why the masks of the longest row are not those that layouts assume, or None."""
        check = _MaskCheck(len(self.row))
        positions, ids = (torch.tensor(some, device=self.model.device) for some in (self.row_positions, self.row))
        logits = self.model(input_ids=ids[None], use_cache=False, logits_to_keep=positions, layout=check).logits[0]
        if check.wrong is None and not agree(self.model, logits, self.row_alone):
            return "it depends on the name of its attention function"
        return check.wrong

    def find_difference(self) -> str | None:
        """Which rows with a shared prefix get other logits than rows alone, or None."""
        if not self._agree_in_training():
            return "packed rows get other logits than rows alone"
        if not self._agree_in_decoding():
            return "rows that grow after a kept prefix get other logits than rows alone"
        return None

    def _logits(self, layout: Layout, ids: list[int], positions: list[int]) -> torch.Tensor:
        device = self.model.device
        kept = torch.tensor(positions, device=device)
        return forward(self.model, layout, torch.tensor(ids, device=device), logits_to_keep=kept).logits[0]

    def _agree_in_training(self) -> bool:
        """Whether the prefix and the packed rows with their branches get the logits that they get alone."""
        ids, positions, shapes = list(self.prefix), list(self.in_prefix), []
        expected, branch_logits, last = [self.expected_prefix], iter(self.expected_branches), iter(self.last)
        for trunk, branches, in_trunk, own in zip(
            self.trunks, self.branches, self.in_trunk, self.expected_trunks, strict=True
        ):
            shapes.append((len(trunk), *(len(branch) + 1 for branch in branches)))
            positions += [len(ids) + i for i in in_trunk]
            expected.append(own)
            ids += trunk
            for branch in branches:
                positions += range(len(ids), len(ids) + len(branch) + 1)
                expected.append(next(branch_logits))
                ids += [*branch, next(last)]
        logits = self._logits(TrainingLayout(self.n_prefix, shapes), ids, positions)
        return agree(self.model, logits, torch.cat(expected))

    def _agree_in_decoding(self) -> bool:
        """Whether the prefix, rows after it, their branches and the tokens appended to these get their own logits."""
        device = self.model.device
        prefix = PrefixLayout(self.n_prefix)
        if not agree(self.model, self._logits(prefix, self.prefix, self.in_prefix), self.expected_prefix):
            return False
        layout = DecodingLayout(prefix, [len(trunk) for trunk in self.trunks])
        ids = [token for trunk in self.trunks for token in trunk]
        in_trunks = [*self.in_trunk[0], *(len(self.trunks[0]) + i for i in self.in_trunk[1])]
        if not agree(self.model, self._logits(layout, ids, in_trunks), torch.cat(self.expected_trunks)):
            return False
        branches = [branch for several in self.branches for branch in several]
        layout.branch(torch.tensor([0, 0, 1], device=device))
        steps = [(branches, [own[:-1] for own in self.expected_branches])]
        steps += [([[token] for token in self.last], [own[-1:] for own in self.expected_branches])]
        for added, expected in steps:
            padded = torch.tensor([[*own, *[-1] * (2 - len(own))] for own in added], device=device)
            ids = layout.append_padded(torch.arange(3, device=device), padded)[0].tolist()
            if not agree(self.model, self._logits(layout, ids, list(range(len(ids)))), torch.cat(expected)):
                return False
        return True


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
        self.packed_masks = _PackedMasks(n_prefix, shapes)
        self.positions = self.packed_masks.positions

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
        if _goes_at_once(query.device, query.shape[2]):
            return _attend_packed(query, key, value, self.packed_masks.get(window, query), settings)
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
        if layer in self.keys:
            raise NotImplementedError("its layers attend twice")
        self.keys[layer], self.values[layer] = key, value
        mask = self.causal_masks.get(window, query.device)
        return _attend_prefix(query, key, value, mask, window, settings).contiguous()


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
        device = next(iter(prefix.keys.values())).device
        self.keys: dict[int, torch.Tensor] = {}  # by layer: [B, KV, K, D]
        self.values: dict[int, torch.Tensor] = {}
        self.causal_masks = _CausalMasks(prefix.n_prefix + max(lengths))
        self.packed_masks = _PackedMasks(prefix.n_prefix, [(length,) for length in lengths])
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
            shape = (len(self.n_stored), key.shape[1], self.places.shape[1])
            self.keys[layer] = key.new_zeros(*shape, key.shape[3])
            self.values[layer] = value.new_zeros(*shape, value.shape[3])
        self.keys[layer][self.rows, :, self.columns] = key[0].transpose(0, 1)
        self.values[layer][self.rows, :, self.columns] = value[0].transpose(0, 1)
        prefix_key, prefix_value = self.prefix.keys[layer], self.prefix.values[layer]
        if self.slots is None:
            n_prefix = self.prefix.n_prefix
            if _goes_at_once(query.device, n_prefix + query.shape[2]):
                key, value = torch.cat([prefix_key, key], 2), torch.cat([prefix_value, value], 2)
                mask = self.packed_masks.get(window, query)[n_prefix:]
                return _attend_packed(query, key, value, mask, settings).contiguous()
            mask = self.causal_masks.get(window, query.device)
            masks = [_row_mask(mask, n_prefix, shape) for _, shape in self.groups]
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


class _PackedMasks:
    """The masks of a whole packed row of T tokens, additive [T, T] (query, key), once for each window and precision.

    Attributes:
        positions: int64 [T], the position of each token in its own row.
    """

    def __init__(self, n_prefix: int, shapes: Sequence[Shape]):
        places, branches = zip(*(_places(shape) for shape in shapes), strict=True)
        prefix = torch.arange(n_prefix)
        self.positions = torch.cat([prefix, *(n_prefix + of_row for of_row in places)])
        self._rows = torch.cat(
            [prefix.new_full((n_prefix,), -1), *(b.new_full((len(b),), k) for k, b in enumerate(branches))]
        )
        self._branches = torch.cat([torch.zeros_like(prefix), *branches])
        self._masks: dict[tuple[int | None, torch.dtype], torch.Tensor] = {}

    def get(self, window: int | None, query: torch.Tensor) -> torch.Tensor:
        """The mask in the precision of the queries and on their device."""
        kind = window, query.dtype
        if kind not in self._masks:
            position, row, branch = (x.to(query.device) for x in (self.positions, self._rows, self._branches))
            distance = position[:, None] - position[None, :]
            own_branch = (row[:, None] == row[None, :]) & (
                (branch[None, :] == 0) | (branch[:, None] == branch[None, :])
            )
            seen = (distance >= 0) & (own_branch | (row[None, :] == -1))
            if window is not None:
                seen &= distance < window
            self._masks[kind] = query.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        return self._masks[kind]


def _goes_at_once(device: torch.device, n_tokens: int) -> bool:
    """Whether attention of a whole packed row is one call, instead of one for each group of rows."""
    return device.type != "cpu" and n_tokens <= MAX_PACKED


def _attend_packed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, settings: dict[str, Any]
) -> torch.Tensor:
    """Attention of all tokens of a packed row at once: [1, T, H, D]. See `_PackedMasks` for the mask."""
    matched = _match_heads(query, key, value)
    output = scaled_dot_product_attention(query, *matched, attn_mask=mask, enable_gqa=_uses_gqa(query), **settings)
    return output.transpose(1, 2)


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
    return (prefix_output + row_output).flatten(0, 1).transpose(0, 1)[None].contiguous()


def _uses_gqa(query: torch.Tensor) -> bool:
    """Whether SDPA is given fewer heads of keys than of queries. Off the CPU, that and a mask exclude fast kernels."""
    return query.device.type == "cpu"


def _match_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values with as many heads as SDPA expects: their own number, or that of the query."""
    times = 1 if _uses_gqa(query) else query.shape[1] // key.shape[1]
    return repeat_kv(key, times), repeat_kv(value, times)
