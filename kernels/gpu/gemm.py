"""``x @ W.T`` on tensor cores, and ``grad @ W``: tiles of W are dequantized in registers.

The one thing to know: products are summed in float32; tiles of W are rounded to x's dtype first, as a
16-bit weight would be. Float32 inputs are multiplied in full precision, not in TF32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kbitc.kernels.gpu.weights import codes_at, values_of


@triton.jit
def gemm_kernel(
    x, out,
    planes, scales, codebook, zeros, scale_codebook, scale_absmax, scale_mean,
    row_stride, features, blocks, count, m,
    BITS: tl.constexpr, BLOCK: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_DQ: tl.constexpr,
    IS_GRAD: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """One (TILE_M, TILE_N) tile: of ``x @ W.T`` (m, count), or with IS_GRAD of ``x @ W`` (m, features)."""
    inner = count if IS_GRAD else features
    outer = features if IS_GRAD else count
    slots = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)[:, None]
    ours = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    sums = tl.zeros((TILE_M, TILE_N), tl.float32)
    for start in range(0, inner, TILE_K):
        steps = start + tl.arange(0, TILE_K)
        given = tl.load(
            x + slots * inner + steps[None, :], mask=(slots < m) & (steps[None, :] < inner), other=0.0
        )
        rows = (steps if IS_GRAD else ours).to(tl.int64)[:, None]
        columns = (ours if IS_GRAD else steps)[None, :]
        mask = (rows < count) & (columns < features)
        codes = codes_at(planes, rows, columns, mask, row_stride, features, BITS)
        value = values_of(
            codes, rows, columns, mask, scales, codebook, zeros, scale_codebook, scale_absmax, scale_mean,
            blocks, BLOCK, HAS_ZEROS, HAS_DQ,
        ).to(given.dtype)  # fmt: skip
        weight = value if IS_GRAD else tl.trans(value)
        sums = tl.dot(given, weight, sums, input_precision="ieee")
    mask = (slots < m) & (ours[None, :] < outer)
    tl.store(out + slots * outer + ours[None, :], sums.to(out.dtype.element_ty), mask=mask)
