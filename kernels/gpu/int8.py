"""LLM.int8(): integers of x times integers of W on tensor cores, summed exactly.

The one thing to know: 8-bit codes are packed in natural order, a byte each; less 127 they are W's integers.
"""

from __future__ import annotations

import triton
import triton.language as tl

MIDDLE = tl.constexpr(127)


@triton.jit
def int8_kernel(
    x, out, planes, row_stride, features, count, m,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Program (i, j): ``x @ W.T`` int32 of rows i of x (m, features) int8 and rows j of W."""
    slots = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)[:, None]
    rows = tl.program_id(1).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)[:, None]
    sums = tl.zeros((TILE_M, TILE_N), tl.int32)
    for start in range(0, features, TILE_K):
        columns = start + tl.arange(0, TILE_K)[None, :]
        here = columns < features
        given = tl.load(x + slots * features + columns, mask=(slots < m) & here, other=0)
        codes = tl.load(planes + rows * row_stride + columns, mask=(rows < count) & here, other=0)
        weight = (codes.to(tl.int32) - MIDDLE).to(tl.int8)
        sums = tl.dot(given, tl.trans(weight), sums, out_dtype=tl.int32)
    ours = tl.trans(rows)
    tl.store(out + slots * count + ours, sums, mask=(slots < m) & (ours < count))
