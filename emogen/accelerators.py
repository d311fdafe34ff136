"""The accelerators of this machine, as torch names them: CUDA (NVIDIA, and AMD by ROCm), XPU (Intel), MPS (Apple)."""

import os
import shutil
import subprocess
from typing import Any, NamedTuple

BF16_CAPABILITY = 8.0  # NVIDIA's GPUs from Ampere on compute in bfloat16; older ones, such as a T4, emulate it slowly


class NvidiaGpu(NamedTuple):
    """A GPU as the driver describes it: its name, its compute capability, and its memory in GiB."""

    name: str
    capability: float
    memory: float


def nvidia_gpus() -> list[NvidiaGpu]:
    """The NVIDIA GPUs of this machine, without importing torch; none if the driver does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        rows = [line.split(", ") for line in done.stdout.strip().splitlines()]
        return [NvidiaGpu(name, float(capability), float(memory) / 1024) for name, capability, memory in rows]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def own_device() -> Any:
    """The `torch.device` of this process: an accelerator, or the CPU.

    Of several accelerators on a machine it is the one of the process's rank, and is selected.
    """
    import torch

    if not torch.accelerator.is_available():
        return torch.device("cpu")
    if torch.accelerator.device_count() > 1:
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.accelerator.current_accelerator(check_available=True)


def names() -> list[str]:
    """The names of the accelerators that torch can use."""
    import torch

    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator().type
    module = getattr(torch, kind)
    indices = range(torch.accelerator.device_count())
    return [module.get_device_name(k) if hasattr(module, "get_device_name") else kind for k in indices]


def peak_memory_bytes() -> int | None:
    """The peak of the memory of this process on its accelerator; None without one, or where torch does not count it."""
    import torch

    if not torch.accelerator.is_available():
        return None
    module = getattr(torch, torch.accelerator.current_accelerator().type)
    return module.max_memory_allocated() if hasattr(module, "max_memory_allocated") else None
