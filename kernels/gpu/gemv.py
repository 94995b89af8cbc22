"""``x @ W.T`` for few rows of x: every weight byte is read once, for all of them.

The one thing to know: split-K parts go to their own slice of a float32 buffer that the caller sums, so
that the result does not depend on the order in which programs finish.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kbitc.kernels.gpu.weights import (
    CHUNK,
    code_at,
    codes_at,
    load_words,
    scale_at,
    unpack_lane,
    values_of,
    x_at,
)

TAIL = tl.constexpr(32)  # columns of a short last chunk, or outlier columns, that are read together


@triton.jit
def _zeros(ROWS: tl.constexpr, LANES: tl.constexpr, M: tl.constexpr):
    found = ()
    for _ in tl.static_range(M):
        found = found + (tl.zeros((ROWS, LANES), tl.float32),)
    return found


@triton.jit
def _load_x(x, at, here, x_stride, M: tl.constexpr):
    """For each row of x the four 16-bit floats of a lane word, int64."""
    found = ()
    for m in tl.static_range(M):
        found = found + (tl.load(x + m * (x_stride // 4) + at, mask=here, other=0),)
    return found


@triton.jit
def gemv_kernel(
    x, out,
    planes, words, scales, codebook, zeros, scale_codebook, scale_absmax, scale_mean,
    outlier_values, outlier_index,
    row_stride, features, blocks, outliers, count, splits, x_stride,
    M: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, HAS_ZEROS: tl.constexpr,
    HAS_DQ: tl.constexpr, KIND: tl.constexpr, SCALES: tl.constexpr, IS_ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Program (i, s): ``out[s, m, tile i]`` over the whole chunks of part s of K, and the last one.

    ``x`` (M, x_stride): float32 (KIND "fp32"), or 16-bit floats as int64, four each. SCALES: scales that a
    lane meets in a chunk, see ``launch.scales_a_chunk``; 0 if every column must look up its own.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    row_mask = rows < count
    split = tl.program_id(1)
    lanes = tl.arange(0, CHUNKS * 8)[None, :]
    slots = tl.arange(0, M)[:, None]
    sums = tl.zeros((M, ROWS), tl.float32)
    whole = features // CHUNK if SCALES else 0
    GROUPS: tl.constexpr = 8 // SCALES if SCALES else 8
    for step in range(split, tl.cdiv(whole, CHUNKS), splits):
        chunk = step * CHUNKS + lanes // 8
        lane = lanes % 8
        here = chunk < whole
        mask = row_mask & here
        packed = load_words(planes, words, rows, chunk, lane, mask, row_stride, BITS, IS_ALIGNED)
        totals = _zeros(ROWS, CHUNKS * 8, M)
        for s in tl.static_range(SCALES):
            parts = _zeros(ROWS, CHUNKS * 8, M)
            xsums = _zeros(1, CHUNKS * 8, M)
            for g in tl.static_range(GROUPS):
                if KIND != "fp32":
                    fours = _load_x(x, chunk * 64 + (s * GROUPS + g) * 8 + lane, here, x_stride, M)
                for byte in tl.static_range(4):
                    level = tl.load(codebook + code_at(packed, s * GROUPS + g, byte, BITS))
                    new_parts = ()
                    new_xsums = ()
                    for m in tl.static_range(M):
                        if KIND == "fp32":
                            at = m * x_stride + chunk * CHUNK + (s * GROUPS + g) * 32 + lane * 4 + byte
                            given = tl.load(x + at, mask=here, other=0.0)
                        else:
                            given = unpack_lane(fours[m], byte, KIND == "bf16")
                        new_parts = new_parts + (parts[m] + level * given,)
                        new_xsums = new_xsums + (xsums[m] + given,)
                    parts = new_parts
                    xsums = new_xsums
            at = rows * blocks + (chunk * CHUNK + s * (GROUPS * 32) + lane * 4) // BLOCK
            scale = scale_at(at, mask, scales, scale_codebook, scale_absmax, scale_mean, HAS_DQ)
            if HAS_ZEROS:
                zero = tl.load(zeros + at, mask=mask, other=0.0).to(tl.float32)
            new_totals = ()
            for m in tl.static_range(M):
                total = totals[m] + parts[m] * scale
                if HAS_ZEROS:
                    total += xsums[m] * zero
                new_totals = new_totals + (total,)
            totals = new_totals
        for m in tl.static_range(M):
            sums += tl.where(slots == m, tl.sum(totals[m], axis=1)[None, :], 0.0)
    if split == 0:
        for start in range(whole * CHUNK, features, TAIL):
            columns = start + tl.arange(0, TAIL)[None, :]
            mask = row_mask & (columns < features)
            codes = codes_at(planes, rows, columns, mask, row_stride, features, BITS)
            value = values_of(
                codes, rows, columns, mask, scales, codebook, zeros, scale_codebook, scale_absmax,
                scale_mean, blocks, BLOCK, HAS_ZEROS, HAS_DQ,
            )  # fmt: skip
            for m in tl.static_range(M):
                given = x_at(x, m * x_stride + columns, columns < features, KIND)
                part = tl.sum(value * given, axis=1)
                sums += tl.where(slots == m, part[None, :], 0.0)
        for start in range(0, outliers, TAIL):  # in place of what their codes stand for
            index = start + tl.arange(0, TAIL)[None, :]
            columns = tl.load(outlier_index + index, mask=index < outliers, other=0)
            mask = row_mask & (index < outliers)
            codes = codes_at(planes, rows, columns, mask, row_stride, features, BITS)
            value = values_of(
                codes, rows, columns, mask, scales, codebook, zeros, scale_codebook, scale_absmax,
                scale_mean, blocks, BLOCK, HAS_ZEROS, HAS_DQ,
            )  # fmt: skip
            kept = tl.load(outlier_values + rows * outliers + index, mask=mask, other=0.0).to(tl.float32)
            for m in tl.static_range(M):
                given = x_at(x, m * x_stride + columns, index < outliers, KIND)
                part = tl.sum((kept - value) * given, axis=1)
                sums += tl.where(slots == m, part[None, :], 0.0)
    at = (split * M + slots).to(tl.int64) * count + tl.trans(rows)
    tl.store(out + at, sums, mask=tl.trans(row_mask))
