"""Triton kernels: interpreted without a GPU, compiled ahead of time for several, run on one if there."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from kbitc.kernels import reference
from kbitc.quantizers import quantize_weight

pytest.importorskip("triton", reason="triton is not installed")


def run(script, *args, **env):
    """In a process of its own: Triton decides at import whether it interprets."""
    path = Path(__file__).parent / script
    command = [sys.executable, path, *args]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_interpreted_kernels_equal_the_reference(part):
    run("check_interpreted.py", str(part), "16", TRITON_INTERPRET="1")


@pytest.mark.slow
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


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
LIMIT = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def error(got, want):
    return (got.cpu().double() - want).norm() / want.norm()


def packed_pair(spec, *shape):
    """Operands on the device, and W in float64."""
    packed = quantize_weight(torch.randn(*shape), spec)
    exact = reference.dequantize(packed.operands(), torch.float32).double()
    return packed.map(lambda part: part.to("cuda")).operands(), exact


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "spec", ["nf4:64", "int3:32+zp", "fp5:48+dq", "dynamic7:64+out2%", "nf2:32", "int4:7"]
)
def test_products_on_a_gpu(spec, dtype):
    operands, exact = packed_pair(spec, 137, 1031)
    assert error(torch.ops.kbit.dequantize(*operands, dtype), exact) < LIMIT[dtype]
    ids = torch.randint(137, (2, 5))
    assert error(torch.ops.kbit.embedding(ids.to("cuda"), *operands, dtype), exact[ids]) < LIMIT[dtype]
    for m in (1, 5, 16, 17, 200):
        x, grad = torch.randn(m, 1031).to(dtype), torch.randn(m, 137).to(dtype)
        assert error(torch.ops.kbit.linear(x.to("cuda"), *operands), x.double() @ exact.T) < LIMIT[dtype]
        found = torch.ops.kbit.input_grad(grad.to("cuda"), *operands)
        assert error(found, grad.double() @ exact) < LIMIT[dtype]
    if operands.planes.is_cuda:
        assert torch._C._dispatch_has_kernel_for_dispatch_key("kbit::linear", "CUDA")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_experts_on_a_gpu(dtype):
    operands, exact = packed_pair("nf4:32+dq", 5, 9, 300)
    offsets = torch.tensor([3, 3, 23, 24, 30], dtype=torch.int32)
    for name, columns, weights in (("linear", 300, exact.mT), ("input_grad", 9, exact)):
        x = torch.randn(30, columns).to(dtype)
        ends = [0, *offsets.tolist()]
        want = torch.cat([x[a:b].double() @ weights[e] for e, (a, b) in enumerate(pairwise(ends))])
        found = getattr(torch.ops.kbit, f"grouped_{name}")(x.to("cuda"), *operands, offsets.to("cuda"))
        assert error(found, want) < LIMIT[dtype]


@pytest.mark.gpu
@needs_gpu
def test_codes_and_int8_on_a_gpu():
    weight = torch.randn(33, 780)
    for spec in ("nf3:64", "int8:128+zp+out2%"):
        wanted, found = quantize_weight(weight, spec), quantize_weight(weight.to("cuda"), spec)
        assert torch.equal(found.planes.cpu(), wanted.planes), spec
    packed = quantize_weight(weight, "int8:780+out1%")
    operands = packed.map(lambda part: part.to("cuda")).operands()
    x = torch.randn(70, 780)
    wanted = reference.linear_int8(x, packed.operands(), None)
    torch.testing.assert_close(
        torch.ops.kbit.linear_int8(x.to("cuda"), *operands).cpu(), wanted, rtol=1e-5, atol=1e-5
    )


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("spec", ["nf4:64", "int3:32+zp+out2%"])
def test_inductor_on_a_gpu(spec, mode):
    """What it fuses around the kernels, and CUDA graphs of them, equals calling the operation."""
    operands, _ = packed_pair(spec, 256, 1024)
    compiled = torch.compile(
        lambda x: torch.ops.kbit.linear(x, *operands).relu(), mode=mode, fullgraph=True, dynamic=False
    )
    for m in (1, 7, 100):
        x = torch.randn(m, 1024, dtype=torch.float16, device="cuda")
        wanted = torch.ops.kbit.linear(x, *operands).relu()
        for _ in range(3):
            torch.testing.assert_close(compiled(x), wanted, rtol=2e-3, atol=2e-3)
