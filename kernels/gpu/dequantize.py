"""Packed rows to values: the whole weight, or the rows that ids pick (an embedding).

The one thing to know: outlier columns are not written here; the caller copies them over the result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kbitc.kernels.gpu.weights import codes_at, values_of


@triton.jit
def dequantize_kernel(
    ids, out,
    planes, scales, codebook, zeros, scale_codebook, scale_absmax, scale_mean,
    row_stride, features, blocks,
    BITS: tl.constexpr, BLOCK: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_DQ: tl.constexpr,
    HAS_IDS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (i, j): ``out[i]`` = row ``ids[i]`` (or i), columns of tile j."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + place).to(tl.int64) if HAS_IDS else place
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = columns < features
    codes = codes_at(planes, row, columns, mask, row_stride, features, BITS)
    value = values_of(
        codes, row, columns, mask, scales, codebook, zeros, scale_codebook, scale_absmax, scale_mean,
        blocks, BLOCK, HAS_ZEROS, HAS_DQ,
    )  # fmt: skip
    tl.store(out + place * features + columns, value.to(out.dtype.element_ty), mask=mask)
