"""The processes of one run, as started by `accelerate launch`: rank, world size and shared work."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

KEPT_SHAPES = "128"  # of products, whose compiled code oneDNN and PyTorch keep
CORES = "EMOGEN_CORES"  # environment variable: the most cores that a run uses, where others run beside it

T = TypeVar("T")
R = TypeVar("R")


def world_size() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process is the one that writes files and prints messages."""
    return os.environ.get("RANK", "0") == "0"


def share_machine() -> None:
    """Let this process, and those that it starts, leave cores and memory to other programs.

    The threads of an OpenMP program spin for milliseconds while they wait for each other. If another program needs the
    cores, that takes several times longer than the work. Spinning for microseconds costs nothing on idle cores.

    oneDNN compiles code for each shape of a product, half a megabyte, and it and PyTorch each keep a thousand of them.
    A server, whose batches have hundreds of lengths, grew by a gigabyte. Compiling one again takes less than a
    millisecond.

    Both are measured in benchmarks/README.md. It must be called before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, KEPT_SHAPES)


def distribute(work: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]) -> list[R]:
    """Divide the items among the processes and gather all results in each of them.

    A model that is sharded over the processes (FSDP, ZeRO) needs all of them for each computation. There, every process
    works on all items.

    Args:
        work: maps items to their results, in the same order. It is never called with an empty sequence.
        items: the same sequence in all processes.

    Returns:
        One result per item, in the order of the items.
    """
    n = world_size()
    if not len(items):
        return []
    if n == 1 or is_sharded():
        return list(work(items))
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    rank = PartialState(cpu=not torch.accelerator.is_available()).process_index

    # Every n-th item, so that the shares of sorted items take equally long. accelerate's `split_between_processes`
    # is not used: with fewer items than processes, it repeats the last item.
    own = items[rank::n]
    results: list[R] = [None] * len(items)  # type: ignore[list-item]
    for k, part in enumerate(gather_object([list(work(own)) if len(own) else []])):
        results[k::n] = part
    return results


def of_main_process(value: T) -> T:
    """The value of the main process, in all processes."""
    if world_size() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    values = [value]
    broadcast_object_list(values)
    return values[0]


def shut_down() -> None:
    """Leave the process group. A process that exits without this may abort."""
    distributed = sys.modules.get("torch.distributed")
    if world_size() > 1 and distributed and distributed.is_initialized():
        distributed.destroy_process_group()


def is_sharded() -> bool:
    """Whether each process has a part of the model only (FSDP, ZeRO)."""
    return any(os.environ.get(f"ACCELERATE_USE_{backend}") == "true" for backend in ("FSDP", "DEEPSPEED"))
