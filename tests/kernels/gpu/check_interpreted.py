"""Run with TRITON_INTERPRET=1: every op of kernels/gpu against the reference, on CPU tensors."""

import sys

import torch

from kbitc.blockwise import quantize
from kbitc.kernels import reference
from kbitc.kernels.gpu import launch

torch.manual_seed(0)
torch.set_num_threads(1)
SPECS = ["nf4:64", "int3:32+zp", "fp5:48+dq", "dynamic7:64+out2%", "int8:100+zp+out3%", "nf2:32", "nf6:64"]
LIMIT = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def close(got, want, dtype, what):
    error = (got.double() - want).norm() / want.norm()
    assert got.dtype == dtype, what
    assert error < LIMIT[dtype], f"{what}: {error}"


def main():
    for number, spec in enumerate(SPECS):
        dtype = list(LIMIT)[number % 3]
        rows, features = [(37, 531), (9, 101), (21, 512)][number % 3]
        operands = quantize(torch.randn(rows, features), spec).operands()
        exact = reference.dequantize(*operands, dtype=torch.float32)
        close(launch.dequantize(*operands, dtype), exact.double(), dtype, f"{spec} dequantize")
        ids = torch.randint(rows, (3, 2))
        close(launch.embedding(ids, *operands, dtype), exact[ids].double(), dtype, f"{spec} embedding")
        bias = torch.randn(rows)
        # The interpreter's tl.dot multiplies the bit patterns of bfloat16; that one is left to a GPU.
        has_dot = dtype != torch.bfloat16
        for m in (1, 3, 19) if has_dot else (1, 3, 16):
            x, grad = torch.randn(m, features).to(dtype), torch.randn(m, rows).to(dtype)
            want = x.double() @ exact.double().T + bias.double()
            close(launch.linear(x, *operands, bias), want, dtype, f"{spec} linear M={m}")
            if not has_dot:
                continue
            close(
                launch.input_grad(grad, *operands),
                grad.double() @ exact.double(),
                dtype,
                f"{spec} grad M={m}",
            )
    experts = quantize(torch.randn(3, 5, 70), "nf4:32+dq").operands()
    whole = reference.dequantize(*experts, dtype=torch.float32)
    close(launch.dequantize(*experts, torch.float32), whole.double(), torch.float32, "experts")
    sys.stdout.write("all equal\n")


if __name__ == "__main__":
    main()
