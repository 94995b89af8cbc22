"""What the tests of native kernels share: each kernel set that this machine runs."""

from __future__ import annotations

import os

import pytest
import torch

from kbitc.kernels.cpu.build import load


def runnable_sets():
    assert load(), "there is a compiler, so the kernels must load"
    sets = []
    for name in ("avx512", "avx2", "portable"):
        try:
            torch.ops.kbit.use_cpu_kernels(name)
        except RuntimeError:
            continue
        sets.append(name)
    torch.ops.kbit.use_cpu_kernels("auto")
    return sets


@pytest.fixture(params=["avx512", "avx2", "portable"])
def kernel_set(request):
    if request.param not in runnable_sets():
        pytest.skip(f"this machine does not run {request.param}")
    torch.ops.kbit.use_cpu_kernels(request.param)
    yield request.param
    torch.ops.kbit.use_cpu_kernels(os.environ.get("KBITC_CPU", "auto"))
