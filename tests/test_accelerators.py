"""What is known of accelerators without torch, and on a machine that has none."""

import os
from pathlib import Path

import torch

from emogen import accelerators
from emogen.accelerators import NvidiaGpu, nvidia_gpus
from emogen.training.check import check


def driver(folder: Path, monkeypatch, script: str) -> None:
    """Put a program in the place of NVIDIA's."""
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def test_the_driver_names_its_gpus(tmp_path, monkeypatch):
    driver(tmp_path, monkeypatch, "echo 'Tesla T4, 7.5, 15360'; echo 'NVIDIA L4, 8.9, 23034'")
    assert nvidia_gpus() == [NvidiaGpu("Tesla T4", 7.5, 15.0), NvidiaGpu("NVIDIA L4", 8.9, 23034 / 1024)]


def test_a_driver_that_fails_has_no_gpus(tmp_path, monkeypatch):
    driver(tmp_path, monkeypatch, "echo 'No devices were found'; exit 6")
    assert nvidia_gpus() == []


def test_check_proposes_float16_where_bfloat16_is_emulated(tiny_recipe, tmp_path, monkeypatch):
    driver(tmp_path, monkeypatch, "echo 'Tesla T4, 7.5, 15360'")
    recipe = tiny_recipe()

    def found(*overrides):
        return [str(problem) for problem in check(recipe, overrides).problems if "emulates" in str(problem)]

    [warning] = found("dtype=bfloat16")
    assert "Tesla T4 (compute capability 7.5)" in warning
    assert "bf16=false fp16=true dtype=float16" in warning
    assert found("dtype=float16") == found() == []


def test_without_an_accelerator_the_device_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert accelerators.own_device() == torch.device("cpu")
    assert accelerators.names() == []
    assert accelerators.peak_memory_bytes() is None
