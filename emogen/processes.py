"""The processes of one run, as `accelerate launch` starts them: rank, world size, and work that they share."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the one that writes files and speaks to people."""
    return os.environ.get("RANK", "0") == "0"


def distribute(work: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]) -> list[R]:
    """Let each process do its share of the items; all of them get all results.

    A model that is itself spread over the processes (FSDP, ZeRO) computes with all of them at once: there each does all
    items.

    Args:
        work: items -> their results, in the same order. It is not called without items.
        items: the same in all processes.

    Returns:
        The results in the order of the items, each once.
    """
    n = world_size()
    if not len(items):
        return []
    if n == 1 or _is_sharded():
        return list(work(items))
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    rank = PartialState(cpu=not torch.cuda.is_available()).process_index

    # Every n-th item, so that the shares of items that are sorted somehow weigh the same. accelerate's own
    # `split_between_processes` gives the last item once more to a process for which there is none.
    own = items[rank::n]
    results: list[R] = [None] * len(items)  # type: ignore[list-item]
    for k, part in enumerate(gather_object([list(work(own)) if len(own) else []])):
        results[k::n] = part
    return results


def shut_down() -> None:
    """Take leave of the other processes; one that ends without may abort."""
    distributed = sys.modules.get("torch.distributed")
    if world_size() > 1 and distributed and distributed.is_initialized():
        distributed.destroy_process_group()


def _is_sharded() -> bool:
    return any(os.environ.get(f"ACCELERATE_USE_{what}") == "true" for what in ("FSDP", "DEEPSPEED"))
