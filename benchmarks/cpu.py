"""What CPU benchmarks say of the machine."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from kbitc.kernels.cpu.build import load


def cpu_name() -> str:
    """The processor as the operating system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    values = {key.strip(): value.strip() for key, value in fields.items()}
    name = values.get("model name", platform.machine())
    return f"{name} (family {values.get('cpu family', '?')}, model {values.get('model', '?')})"


def kernel_set() -> str:
    """The kernel set that runs."""
    if not load():
        return "reference"
    return str(torch.ops.kbit.cpu_kernels())
