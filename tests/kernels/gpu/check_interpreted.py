"""Run with TRITON_INTERPRET=1 and numbers i, n: ops of kernels/gpu against the reference, on CPU tensors.

Every n-th format from the i-th on.
"""

import itertools
import sys

import torch

from kbitc.formats import datatypes
from kbitc.formats.encode import encode_rows
from kbitc.formats.scales import effective_scales
from kbitc.kernels import reference
from kbitc.kernels.gpu import launch
from kbitc.quantizers import quantize_weight

torch.manual_seed(0)
torch.set_num_threads(1)
LIMIT = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
DTYPES = itertools.cycle([torch.float32, torch.float16, torch.bfloat16, torch.float16])
FLAGS = itertools.cycle(["", "+zp", "+dq", "+out2%", "+zp+dq+out3%"])
BLOCKS = itertools.cycle([64, 32, 128, 512, 48, 100, 20, 7])
SHAPES = itertools.cycle([(37, 531), (9, 101), (21, 512), (5, 780)])


def close(got, want, dtype, what):
    error = (got.double() - want).norm() / want.norm()
    assert got.dtype == dtype, what
    assert got.shape == want.shape, what
    assert error < LIMIT[dtype], f"{what}: {error}"


def check_weight(spec, rows, features, dtype):
    what = f"{spec} {rows} x {features} {dtype}"
    operands = quantize_weight(torch.randn(rows, features), spec).operands()
    exact = reference.dequantize(operands, torch.float32)
    close(launch.dequantize(*operands, dtype), exact.double(), dtype, f"{what} dequantize")
    ids = torch.randint(rows, (3, 2))
    close(launch.embedding(ids, *operands, dtype), exact[ids].double(), dtype, f"{what} embedding")
    bias = torch.randn(rows)
    # The interpreter's tl.dot multiplies the bit patterns of bfloat16; that one is left to a GPU.
    for m in (1, 2, 5, 19) if dtype != torch.bfloat16 else (1, launch.MANY + 1):
        x = torch.randn(m, features).to(dtype)
        want = x.double() @ exact.double().T + bias.double()
        close(launch.linear(x, *operands, bias), want, dtype, f"{what} linear M={m}")
    grad = torch.randn(3, rows).to(dtype)
    close(launch.input_grad(grad, *operands), grad.double() @ exact.double(), dtype, f"{what} grad")


def check_experts(spec, dtype):
    operands = quantize_weight(torch.randn(5, 9, 300), spec).operands()
    exact = reference.dequantize(operands, torch.float32)
    close(launch.dequantize(*operands, torch.float32), exact.double(), torch.float32, f"{spec} experts")
    offsets = torch.tensor([3, 3, 23, 24, 30], dtype=torch.int32)
    x = torch.randn(30, 300).to(dtype)
    want = reference.grouped_linear(x.double(), operands, offsets)
    close(launch.grouped_linear(x, *operands, offsets), want.double(), dtype, f"{spec} grouped")


def check_codes(spec, rows, features, dtype):
    weight = torch.randn(rows, features).to(dtype)
    packed = quantize_weight(weight, spec)
    scales = effective_scales(packed.scales, packed.scale_codebook, packed.scale_absmax, packed.scale_mean)
    given = (scales, packed.zeros, packed.codebook, packed.outlier_index, packed.spec.bits, packed.spec.block)
    wanted = encode_rows(weight, *given)
    assert torch.equal(packed.planes, wanted), f"{spec} {rows} x {features}: packed"
    assert torch.equal(launch.encode(weight, *given), wanted), f"{spec} {rows} x {features}: planes"


def check_int8():
    operands = quantize_weight(torch.randn(11, 200), "int8:200+out3%").operands()
    x = torch.randn(2, 9, 200)
    x[0, 3] = 0
    bias = torch.randn(11)
    wanted = reference.linear_int8(x, operands, bias)
    torch.testing.assert_close(launch.linear_int8(x, *operands, bias), wanted, rtol=1e-6, atol=1e-6)
    x[1, 2, 5] = torch.nan
    found, wanted = launch.linear_int8(x, *operands), reference.linear_int8(x, operands, None)
    assert torch.equal(found.isnan(), wanted.isnan())


def main():
    part, parts = map(int, sys.argv[1:])
    everything = [f"{family}{bits}" for family in datatypes.FAMILIES for bits in range(2, 9)]
    for name in everything[part::parts]:
        check_weight(f"{name}:{next(BLOCKS)}{next(FLAGS)}", *next(SHAPES), next(DTYPES))
    for bits in range(2 + part % 2, 9, 2):
        spec = f"nf{bits}:{next(BLOCKS)}{next(FLAGS)}"
        for features in (512, 531, 780):
            check_codes(spec, 7, features, next(DTYPES))
    check_int8()
    check_experts("nf4:32+dq", torch.float32)
    check_experts("int3:64+zp+out2%", torch.float16)
    check_experts("int4:18", torch.float16)  # blocks of which the kernel for experts knows nothing
    sys.stdout.write("all equal\n")


if __name__ == "__main__":
    main()
