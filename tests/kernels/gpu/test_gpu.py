"""Triton kernels: interpreted without a GPU, compiled ahead of time for several, run on one if there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")


def run(script, *args, **env):
    """In a process of its own: Triton decides at import whether it interprets."""
    path = Path(__file__).parent / script
    command = [sys.executable, path, *args]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("part", range(2))
def test_interpreted_kernels_equal_the_reference(part):
    run("check_interpreted.py", str(part), "12", TRITON_INTERPRET="1")


def test_every_candidate_is_measured_once_and_the_fastest_kept():
    run("check_autotuned.py", TRITON_INTERPRET="1", KBITC_AUTOTUNE="1")


def test_a_compiler_sees_the_kernels():
    run("check_traced.py")


@pytest.mark.parametrize(
    ("name", "bits", "form", "x", "target"),
    [
        ("gemv", 2, "plain", "fp16", "gfx942"),
        ("gemv", 3, "dq", "bf16", "sm_90"),
        ("gemv", 4, "plain", "fp16", "sm_80"),
        ("gemv", 4, "out", "fp32", "sm_90"),
        ("gemv", 7, "zp", "fp16", "sm_120"),
        ("matmul", 4, "plain", "bf16", "sm_100"),
        ("matmul", 5, "zp", "fp16", "sm_80"),
        ("matmul", 8, "out", "fp16", "sm_90"),
        ("matmul", 8, "zp", "fp16", "sm_120"),
        ("experts", 3, "dq", "fp16", "gfx942"),
        ("experts", 4, "out", "bf16", "sm_80"),
        ("embedding", 6, "dq", "fp16", "sm_90"),
        ("any columns", 5, "zp", "fp16", "sm_90"),
        ("encode", 3, "plain", "fp32", "sm_80"),
        ("encode", 8, "zp", "fp16", "gfx942"),
        ("int8", 8, "plain", "fp16", "sm_90"),
        ("int8", 8, "plain", "fp16", "gfx942"),
    ],
)
def test_compiles_without_spills(name, bits, form, x, target):
    from benchmarks.triton_static import compile_one

    found = compile_one(name, bits, form, target, x)
    assert found.spills == 0
    assert found.shared <= found.shared_limit
    assert (found.matrix_ops > 0) == (name in {"matmul", "experts", "int8"})
    if name not in {"any columns", "encode", "int8"}:  # which read no words
        # Of every row of bytes of a chunk, an instruction.
        assert found.weight_bytes == 16
        assert found.wide_loads >= bits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spec", ["nf4:64", "int3:32+zp", "fp5:48+dq", "dynamic7:64+out2%", "nf2:32"])
def test_ops_on_a_gpu(spec, dtype):
    from kbitc.blockwise import quantize
    from kbitc.kernels import ops, reference  # noqa: F401  # ops registers torch.ops.kbit

    packed = quantize(torch.randn(137, 1031), spec)
    operands = packed.map(lambda part: part.cuda()).operands()
    exact = reference.dequantize(*packed.operands(), dtype=torch.float32).double()
    limit = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]

    def error(got, want):
        return (got.cpu().double() - want).norm() / want.norm()

    assert error(torch.ops.kbit.dequantize(*operands, dtype), exact) < limit
    for m in (1, 5, 16, 17, 200):
        x, grad = torch.randn(m, 1031).to(dtype), torch.randn(m, 137).to(dtype)
        assert error(torch.ops.kbit.linear(x.cuda(), *operands), x.double() @ exact.T) < limit
        assert error(torch.ops.kbit.input_grad(grad.cuda(), *operands), grad.double() @ exact) < limit
    assert torch._C._dispatch_has_kernel_for_dispatch_key("kbit::linear", "CUDA")
