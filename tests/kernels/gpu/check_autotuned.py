"""Run with TRITON_INTERPRET=1 and KBITC_AUTOTUNE=1: every candidate of a kernel runs, and the best is kept."""

import sys

import torch

from kbitc.kernels import reference
from kbitc.kernels.gpu import launch
from kbitc.kernels.gpu.tiles import TABLE
from kbitc.quantizers import quantize_weight

KERNELS = {
    "gemv": launch.gemv_kernel,
    "matmul": launch.matmul_kernel,
    "rows": launch.rows_kernel,
    "encode": launch.encode_kernel,
}
LIMIT = 2e-3
runs: list[str] = []


def slowest_first(name):
    """In place of the clock: the later a candidate comes, the faster it is."""

    def do_bench(call, quantiles):
        call()
        runs.append(name)
        return [1.0 / len(runs)] * len(quantiles)

    return do_bench


def run_all(features):
    weight = torch.randn(37, features)
    operands = quantize_weight(weight, "nf3:64+zp").operands()
    given = (operands.scales.float(), operands.zeros, operands.codebook, None, operands.bits, operands.block)
    assert torch.equal(launch.encode(weight, *given), operands.planes)
    exact = reference.dequantize(operands, torch.float32)
    assert torch.equal(launch.dequantize(*operands, torch.float32), exact)
    for m in (1, 5):
        x = torch.randn(m, features).half()
        want = x.double() @ exact.double().T
        error = (launch.linear(x, *operands).double() - want).norm() / want.norm()
        assert error < LIMIT, f"{m}: {error}"


def main():
    torch.manual_seed(0)
    for name, kernel in KERNELS.items():
        kernel.do_bench = slowest_first(name)
    run_all(608)
    for name, kernel in KERNELS.items():
        assert runs.count(name) == len(TABLE[name]), name
        kept = TABLE[name][-1]
        assert kernel.best_config.kwargs["ROWS"] == kept.rows, name
        assert kernel.best_config.kwargs["CHUNKS"] == kept.chunks, name
    before = len(runs)
    run_all(608)
    assert len(runs) == before  # measured once for a format and shape
    run_all(512)
    assert len(runs) == 2 * before
    sys.stdout.write("all equal\n")


if __name__ == "__main__":
    main()
