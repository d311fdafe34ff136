"""Rows that are computed in full, and whether a faster way of computing them agrees with that.

The reference is a row alone: without padding, without a cache, without other rows beside it. Every faster way (padded
batches, a cache, a shared prefix) is wrong for some architectures: padding moves the positions of some, a convolution
or a recurrence reads the padding, RoPE may switch with the length of a row, a window may exist in the mask alone. No
list of architectures is complete, so each way is tried on the model itself, with rows as long as those that it is used
for. What was tried is remembered with the model.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig, PreTrainedModel

from emogen.errors import ModelError

log = logging.getLogger(__name__)

# How far logits may be from those of the row alone, relative to their standard deviation over the vocabulary. Rounding
# changes float32 by far less than the first, and bf16, TF32 or quantised layers by less than the second.
EXACT, ROUNDED = 0.002, 0.1
GROUP = 16  # rows that are computed together at most
N_STEPS = 4  # tokens that are generated in a trial

# model -> way of computing -> (shortest row, longest row, why the way is wrong or None)
_tried: WeakKeyDictionary[torch.nn.Module, dict[str, list[tuple[int, int, str | None]]]] = WeakKeyDictionary()


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """A model without peft's wrapper. Its layers keep their adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and restore its mode at the end."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def problem(error: Exception) -> str:
    """An exception in one line; that of a library with its kind."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, NotImplementedError) else f"{type(error).__name__}: {lines[0][:200]}"


def tried(
    model: PreTrainedModel, way: str, low: int, high: int, trial: Callable[[], str | None]
) -> tuple[str | None, bool]:
    """Try a way of computing rows of `low` to `high` tokens, unless that is known already.

    Args:
        trial: returns why the way is wrong, or None.

    Returns:
        Why it is wrong, or None; and whether it has just been tried. An exception is a reason, too.

    Raises:
        ModelError: a row cannot even be computed alone.
    """
    if model.device.type == "meta":
        return None, False
    known = _tried.setdefault(base_model(model), {}).setdefault(way, [])
    for shortest, longest, reason in known:
        if reason is None and shortest <= low and high <= longest:
            return None, False
        if reason is not None and low <= shortest and longest <= high:
            return reason, False
    with evaluating(model), torch.no_grad():
        try:
            reason = trial()
        except ModelError:
            raise
        except _NotLoadedError:
            return None, False
        except Exception as error:  # whatever an architecture raises, it does not support the way
            reason = problem(error)
    known.append((low, high, reason))
    return reason, True


class _NotLoadedError(Exception):
    """The row alone has logits of NaN, as if the weights were not loaded yet: nothing can be compared."""


def agree(model: PreTrainedModel, logits: torch.Tensor, alone: torch.Tensor) -> bool:
    """Whether logits [N, V] equal those of the row alone, up to rounding.

    A model that computes in float32 has to agree at every position. In another one, rounding may change the choice of
    a router, and with it the logits of a token; so it has to agree at three positions in four.
    """
    if logits.shape != alone.shape:
        return False
    alone = alone.float()
    if alone.isnan().any():
        raise _NotLoadedError
    difference = (logits.float() - alone).abs().mean(1) / alone.std(1).clamp(min=1e-9)
    if _is_exact(model):
        return bool((difference < EXACT).all())
    return bool((difference < ROUNDED).float().mean() >= 0.75)


def _is_exact(model: PreTrainedModel) -> bool:
    """Whether a model computes in float32 throughout."""
    # `allow_tf32` raises an error after `fp32_precision` was set, as transformers sets it for the key `tf32`.
    rounds = model.device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return model.dtype == torch.float32 and not getattr(model, "is_quantized", False) and not rounds


def trial_ids(prefix_ids: Sequence[int], n_tokens: int, seed: int) -> list[int]:
    """A row for a trial: the prefix, then random tokens of it."""
    usual = sorted(set(prefix_ids))
    if len(usual) < 8:
        usual = sorted({*usual, *range(3, 11)})
    drawn = torch.randint(
        len(usual), (max(n_tokens - len(prefix_ids), 0),), generator=torch.Generator().manual_seed(seed)
    )
    return [*prefix_ids, *(usual[k] for k in drawn.tolist())][:n_tokens]


def require_causal(model: PreTrainedModel) -> None:
    """Refuse a model whose tokens see those that follow them, such as an encoder: in training it would see the answer.

    Raises:
        ModelError: it is such a model, or it cannot compute a row of text.
    """
    ids = list(range(3, 12))

    def trial() -> str | None:
        before = list(range(len(ids) - 1))
        changed = [*ids[:-1], ids[-1] + 1]
        is_same = agree(model, logits_alone(model, changed, before), logits_alone(model, ids, before))
        return None if is_same else "its tokens see those that follow them"

    reason, _ = tried(model, "causality", len(ids), len(ids), trial)
    if reason:
        kind = base_model(model).config.model_type
        raise ModelError(
            f"a model of type {kind} cannot be trained to generate here: {reason}. Choose a causal language model (a "
            "decoder), or `answer: head`"
        )


def require_length(model: PreTrainedModel, longest: int) -> None:
    """Refuse rows that a model computes in another way after a longer row than before it.

    Dynamic RoPE does so for rows that are longer than those that the model was made for: its frequencies follow the
    longest row so far.

    Args:
        longest: the number of tokens of the longest row.

    Raises:
        ModelError: the result of a row would depend on the rows before it.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        is_dynamic = "dynamic" in (kinds.values() if isinstance(kinds, dict) else [kinds])
        if is_dynamic and longest > (limit := module.original_max_seq_len):
            raise ModelError(
                f"the longest row has {longest} tokens, more than the {limit} that this "
                f"{base_model(model).config.model_type} model was made for; with its dynamic RoPE, the result of such "
                "a row depends on the rows before it. Set a smaller max_length, or choose another model"
            )


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether a model computes the logits of some positions only, if `logits_to_keep` names them."""

    def trial() -> str | None:
        ids = torch.arange(3, 9, device=model.device)[None]
        positions = torch.tensor([1, 4], device=model.device)
        everywhere = model(input_ids=ids, use_cache=False).logits[0]
        some = model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits[0]
        return None if agree(model, some, everywhere[positions]) else "it ignores logits_to_keep"

    return tried(model, "positions", 6, 6, trial)[0] is None


def logits_at(model: PreTrainedModel, positions: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """The logits [B, N, V] at N positions of B rows."""
    if takes_positions(model):
        return model(use_cache=False, logits_to_keep=positions, **inputs).logits
    return model(use_cache=False, **inputs).logits[:, positions]


def logits_alone(model: PreTrainedModel, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
    """The reference: the logits [N, V] at N positions of a row that is computed alone, in full.

    Raises:
        ModelError: the architecture cannot compute such a row.
    """
    tokens = torch.tensor([ids], device=model.device)
    try:
        return logits_at(model, torch.tensor(positions, device=model.device), input_ids=tokens)[0]
    except Exception as error:
        raise ModelError(
            f"a {base_model(model).config.model_type} model cannot compute a row of {len(ids)} tokens of text "
            f"({problem(error)}); choose another model, or a smaller max_length if the row is too long for it"
        ) from error


def spread(start: int, end: int, n: int = 16) -> list[int]:
    """At most n positions from `start` to `end` - 1, evenly spread; the last one is among them."""
    return sorted({end - 1 - (end - 1 - start) * k // n for k in range(n)})


def pads(model: PreTrainedModel, prefix_ids: Sequence[int], longest: int) -> bool:
    """Whether rows that are padded on the right get the logits that they get alone. If not, there is one warning.

    Args:
        prefix_ids: the token ids that the rows begin with.
        longest: the number of tokens of the longest row.
    """
    shortest = len(prefix_ids) + 1

    def trial() -> str | None:
        rows = [trial_ids(prefix_ids, shortest, 0), trial_ids(prefix_ids, max(longest, shortest + 1), 1)]
        ids, mask = _padded(model, rows)
        for k, row in enumerate(rows):
            positions = spread(max(len(prefix_ids) - 1, 0), len(row))
            logits = logits_at(model, torch.tensor(positions, device=model.device), input_ids=ids, attention_mask=mask)
            if not agree(model, logits[k], logits_alone(model, row, positions)):
                return "padding changes its logits"
        return None

    reason, is_new = tried(model, "padding", shortest, longest, trial)
    if reason and is_new:
        kind = base_model(model).config.model_type
        log.warning(f"rows of this {kind} model are not padded: {reason}. Only rows of equal length share a batch.")
    return reason is None


def _padded(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids -> ids and mask, int64 [B, T], padded on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=model.device)
    return ids, mask


def last_logits(model: PreTrainedModel, rows: Sequence[Sequence[int]], *, padded: bool) -> torch.Tensor:
    """The logits [n, V] of the next token of n rows, each computed in full; in groups, to limit memory.

    Args:
        padded: whether rows of different lengths may share a batch; see `pads`.
    """
    order = sorted(range(len(rows)), key=lambda k: len(rows[k]))
    groups: list[list[int]] = []
    for k in order:
        is_alike = groups and (padded or len(rows[groups[-1][0]]) == len(rows[k]))
        if is_alike and len(groups[-1]) < GROUP:
            groups[-1].append(k)
        else:
            groups.append([k])
    found = []
    for group in groups:
        some = [rows[k] for k in group]
        ends, which = torch.tensor([len(row) - 1 for row in some], device=model.device).unique(return_inverse=True)
        ids, mask = _padded(model, some)
        inputs = {"input_ids": ids} if mask.all() else {"input_ids": ids, "attention_mask": mask}
        found.append(logits_at(model, ends, **inputs)[torch.arange(len(some), device=model.device), which])
    place = torch.empty(len(rows), dtype=torch.int64, device=model.device)
    place[torch.tensor(order, device=model.device)] = torch.arange(len(rows), device=model.device)
    return torch.cat(found)[place]


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    stop: set[int],
    pad: int,
    max_new_tokens: int,
    **settings: Any,
) -> Any:
    """Greedy generation by transformers: rows padded on the left, with a cache.

    The settings that a model brings for its generation (penalties, forbidden words) are left out.
    """
    base, n_prompt = base_model(model), max(map(len, prompts))
    own = base.generation_config
    base.generation_config = GenerationConfig(
        eos_token_id=sorted(stop), pad_token_id=pad, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True
    )
    ids = [[*[pad] * (n_prompt - len(row)), *row] for row in prompts]
    mask = [[0] * (n_prompt - len(row)) + [1] * len(row) for row in prompts]
    try:
        return base.generate(
            torch.tensor(ids, device=model.device), attention_mask=torch.tensor(mask, device=model.device), **settings
        )
    finally:
        base.generation_config = own


def generates(model: PreTrainedModel, prefix_ids: Sequence[int], longest: int, pad: int) -> bool:
    """Whether `generate` sees at each step the logits of the row alone. If not, there is one warning.

    Args:
        prefix_ids, longest: see `pads`; the longest row with its answer.
        pad: the token to pad with.
    """
    shortest = len(prefix_ids) + 1

    def trial() -> str | None:
        prompts = [trial_ids(prefix_ids, shortest, 0), trial_ids(prefix_ids, max(longest - N_STEPS, shortest + 1), 1)]
        starts = spread(0, shortest)
        if not agree(
            model, logits_alone(model, prompts[1], starts), logits_alone(model, prompts[1][:shortest], starts)
        ):
            return "the tokens that follow change the logits before them"  # such as RoPE that switches with the length
        n_tokens = base_model(model).config.get_text_config().vocab_size
        allowed = [token for token in range(n_tokens) if token != pad]
        output = generate(
            model,
            prompts,
            stop={pad},
            pad=pad,
            max_new_tokens=N_STEPS,
            prefix_allowed_tokens_fn=lambda *_: allowed,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for k, prompt in enumerate(prompts):
            answer = output.sequences[k, -N_STEPS:].tolist()
            positions = list(range(len(prompt) - 1, len(prompt) + N_STEPS - 1))
            seen = torch.stack([logits[k] for logits in output.logits])
            if not agree(model, seen, logits_alone(model, [*prompt, *answer], positions).to(seen.device)):
                return "its cache or padding on the left changes its logits"
        return None

    reason, is_new = tried(model, "generation", shortest, longest, trial)
    if reason and is_new:
        kind = base_model(model).config.model_type
        log.warning(f"answers of this {kind} model are generated without a cache: {reason}. This is slow.")
    return reason is None
