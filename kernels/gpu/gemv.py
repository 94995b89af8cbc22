"""``W @ x`` for one row of x: every byte of the weight is read once.

The one thing to know: split-K parts go to their own slice of a float32 buffer that the caller sums, so
that the result does not depend on the order in which programs finish.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kbitc.kernels.gpu.tiles import tiled
from kbitc.kernels.gpu.weights import (
    CHUNK,
    code_at,
    lanes_of,
    load_words,
    scale_at,
    unpack_lane,
    values_at,
    x_at,
)

TAIL = tl.constexpr(32)  # columns of a short last chunk, or outlier columns, that are read together


@tiled("gemv", "features", "count")
@triton.jit
def gemv_kernel(
    x, out,
    planes, words, scales, codebook, zeros, scale_codebook, scale_absmax, scale_mean,
    outlier_values, outlier_index,
    row_stride, features, blocks, outliers, count, splits,
    BITS: tl.constexpr, BLOCK: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_DQ: tl.constexpr,
    HAS_OUTLIERS: tl.constexpr, KIND: tl.constexpr, SCALES: tl.constexpr, IS_ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Program (i, s): ``out[s, tile i]`` over the whole chunks of part s of K, and the last one.

    ``x`` (features,): float32 (KIND "fp32"), or 16-bit floats ("fp16", "bf16") as int64, four each. SCALES:
    scales that a lane meets in a chunk, see ``launch.scales_a_chunk``; 0 if every column looks up its own.
    """
    row, nth, lane = lanes_of(CHUNKS, ROWS)
    rows = tl.program_id(0).to(tl.int64) * ROWS + row
    split = tl.program_id(1)
    parts = tl.zeros((ROWS * CHUNKS * 8,), tl.float32)
    whole = features // CHUNK if SCALES else 0
    GROUPS: tl.constexpr = 8 // SCALES if SCALES else 8
    for step in range(split, tl.cdiv(whole, CHUNKS), splits):
        chunk = step * CHUNKS + nth
        here = chunk < whole
        mask = (rows < count) & here
        packed = load_words(planes, words, rows, chunk, lane, mask, row_stride, BITS, IS_ALIGNED)
        for s in tl.static_range(SCALES):
            part = tl.zeros((ROWS * CHUNKS * 8,), tl.float32)
            xsum = tl.zeros((ROWS * CHUNKS * 8,), tl.float32)
            for g in tl.static_range(GROUPS):
                if KIND != "fp32":
                    four = tl.load(x + chunk * 64 + (s * GROUPS + g) * 8 + lane, mask=here, other=0)
                for byte in tl.static_range(4):
                    if KIND == "fp32":
                        column = chunk * CHUNK + (s * GROUPS + g) * 32 + lane * 4 + byte
                        given = tl.load(x + column, mask=here, other=0.0)
                    else:
                        given = unpack_lane(four, byte, KIND == "bf16")
                    part += tl.load(codebook + code_at(packed, s * GROUPS + g, byte, BITS)) * given
                    xsum += given
            at = rows * blocks + (chunk * CHUNK + s * (GROUPS * 32) + lane * 4) // BLOCK
            parts += part * scale_at(at, mask, scales, scale_codebook, scale_absmax, scale_mean, HAS_DQ)
            if HAS_ZEROS:
                parts += xsum * tl.load(zeros + at, mask=mask, other=0.0).to(tl.float32)
    sums = tl.sum(tl.reshape(parts, (ROWS, CHUNKS * 8)), axis=1)
    if split == 0:
        ours = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        row_mask = ours < count
        for start in range(whole * CHUNK, features, TAIL):
            columns = start + tl.arange(0, TAIL)[None, :]
            mask = row_mask & (columns < features)
            value = values_at(
                ours, columns, mask, planes, scales, codebook, zeros, scale_codebook, scale_absmax,
                scale_mean, row_stride, features, blocks, BITS, BLOCK, HAS_ZEROS, HAS_DQ,
            )  # fmt: skip
            sums += tl.sum(value * x_at(x, columns, columns < features, KIND), axis=1)
        if HAS_OUTLIERS:
            for start in range(0, outliers, TAIL):  # in place of what their codes stand for
                index = start + tl.arange(0, TAIL)[None, :]
                columns = tl.load(outlier_index + index, mask=index < outliers, other=0)
                mask = row_mask & (index < outliers)
                value = values_at(
                    ours, columns, mask, planes, scales, codebook, zeros, scale_codebook, scale_absmax,
                    scale_mean, row_stride, features, blocks, BITS, BLOCK, HAS_ZEROS, HAS_DQ,
                )  # fmt: skip
                kept = tl.load(outlier_values + ours * outliers + index, mask=mask, other=0.0).to(tl.float32)
                sums += tl.sum((kept - value) * x_at(x, columns, index < outliers, KIND), axis=1)
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(out + split.to(tl.int64) * count + place, sums, mask=place < count)
