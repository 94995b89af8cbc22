"""``x @ W.T`` for few rows of x (M <= 16): every weight byte is read once, for all M.

The one thing to know: split-K parts go to their own slice of a float32 buffer that the caller sums, so
that the result does not depend on the order in which programs finish.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kbitc.kernels.gpu.weights import CHUNK, chunk_codes, codes_at, values_of


@triton.jit
def gemv_kernel(
    x, out,
    planes, scales, codebook, zeros, scale_codebook, scale_absmax, scale_mean,
    row_stride, features, blocks, count, splits,
    M: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, HAS_ZEROS: tl.constexpr,
    HAS_DQ: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (i, s): ``out[s, m, tile i]`` over every chunk c with c % splits == s; x (M, features)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < count
    split = tl.program_id(1)
    slots = tl.arange(0, M)
    sums = tl.zeros((M, ROWS), tl.float32)
    whole = features // CHUNK
    for chunk in range(split, whole, splits):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
        mask = row_mask[:, None] & (columns < features)
        codes = chunk_codes(planes, rows, row_mask, chunk, row_stride, BITS, ROWS)
        value = values_of(
            codes, rows[:, None], columns, mask, scales, codebook, zeros, scale_codebook, scale_absmax,
            scale_mean, blocks, BLOCK, HAS_ZEROS, HAS_DQ,
        )  # fmt: skip
        for m in tl.static_range(M):
            part = tl.sum(value * tl.load(x + m * features + columns).to(tl.float32), axis=1)
            sums += tl.where(slots[:, None] == m, part[None, :], 0.0)
    if (split == 0) & (whole * CHUNK < features):
        columns = whole * CHUNK + tl.arange(0, CHUNK)[None, :]
        mask = row_mask[:, None] & (columns < features)
        codes = codes_at(planes, rows[:, None], columns, mask, row_stride, features, BITS)
        value = values_of(
            codes, rows[:, None], columns, mask, scales, codebook, zeros, scale_codebook, scale_absmax,
            scale_mean, blocks, BLOCK, HAS_ZEROS, HAS_DQ,
        )  # fmt: skip
        for m in tl.static_range(M):
            given = tl.load(x + m * features + columns, mask=columns < features, other=0.0)
            part = tl.sum(value * given.to(tl.float32), axis=1)
            sums += tl.where(slots[:, None] == m, part[None, :], 0.0)
    at = (split * M + slots[:, None]).to(tl.int64) * count + rows[None, :]
    tl.store(out + at, sums, mask=row_mask[None, :])
