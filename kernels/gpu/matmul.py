"""``x @ W.T`` on tensor cores, W cut out of packed words in registers.

The one thing to know: the four bytes of a word and the eight groups of a chunk are 32 small products of their
own, each over the columns 256 * chunk + 32 * group + 4 * lane + byte: x is read in that order, so nothing of
W has to move between threads but what the tensor cores' own layout asks for.
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

TAIL = tl.constexpr(32)  # columns of a short last chunk, or outlier columns, multiplied together


@tiled("matmul", "features", "count", "IS_GROUPED")
@triton.jit
def matmul_kernel(
    x, out,
    planes, words, scales, codebook, zeros, scale_codebook, scale_absmax, scale_mean,
    outlier_values, outlier_index, offsets,
    row_stride, features, blocks, outliers, count, splits, x_stride, m, experts,
    BITS: tl.constexpr, BLOCK: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_DQ: tl.constexpr,
    HAS_OUTLIERS: tl.constexpr, KIND: tl.constexpr, SCALES: tl.constexpr, IS_ALIGNED: tl.constexpr,
    IS_GROUPED: tl.constexpr, TILE_M: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Program (i, j, s): ``out[s]`` of rows i of x and rows j of W, float32.

    ``x``: 16-bit floats as `gemv_kernel` takes them. SCALES is not 0. IS_GROUPED: W has ``experts``
    weights, rows of x up to ``offsets[e]`` meet weight e, ``splits`` is 1.
    """
    dtype: tl.constexpr = tl.bfloat16 if KIND == "bf16" else tl.float16
    tile = tl.program_id(0)
    expert = 0
    first = 0
    if IS_GROUPED:  # tiles of experts follow each other; those past the last expert's do nothing
        last = 0
        begin = 0
        before = 0
        for e in range(experts):
            end = tl.load(offsets + e).to(tl.int32)
            tiles = (end - begin + TILE_M - 1) // TILE_M
            is_here = (tile >= before) & (tile < before + tiles)
            expert = tl.where(is_here, e, expert)
            first = tl.where(is_here, begin + (tile - before) * TILE_M, first)
            last = tl.where(is_here, end, last)
            before += tiles
            begin = end
        m = last
    else:
        first = tile * TILE_M
    slots = first + tl.arange(0, TILE_M)[:, None].to(tl.int64)
    slot_mask = slots < m
    split = tl.program_id(2)
    row, nth, lane = lanes_of(CHUNKS, ROWS)
    begin_row = tl.program_id(1).to(tl.int64) * ROWS
    lanes = tl.arange(0, CHUNKS * 8)[None, :]
    sums = tl.zeros((TILE_M, ROWS), tl.float32)
    whole = features // CHUNK
    GROUPS: tl.constexpr = 8 // SCALES
    for step in range(split, tl.cdiv(whole, CHUNKS), splits):
        chunk = step * CHUNKS + nth
        rows = tl.cast(expert, tl.int64) * count + begin_row + row
        mask = (begin_row + row < count) & (chunk < whole)
        packed = load_words(planes, words, rows, chunk, lane, mask, row_stride, BITS, IS_ALIGNED)
        x_chunk = step * CHUNKS + lanes // 8
        x_mask = slot_mask & (x_chunk < whole)
        for s in tl.static_range(SCALES):
            at = rows * blocks + (chunk * CHUNK + s * (GROUPS * 32) + lane * 4) // BLOCK
            scale = scale_at(at, mask, scales, scale_codebook, scale_absmax, scale_mean, HAS_DQ)
            if HAS_ZEROS:
                zero = tl.load(zeros + at, mask=mask, other=0.0).to(tl.float32)
            for g in tl.static_range(GROUPS):
                place = slots * (x_stride // 4) + x_chunk * 64 + (s * GROUPS + g) * 8 + lanes % 8
                four = tl.load(x + place, mask=x_mask, other=0)
                for byte in tl.static_range(4):
                    value = tl.load(codebook + code_at(packed, s * GROUPS + g, byte, BITS)) * scale
                    if HAS_ZEROS:
                        value += zero
                    given = unpack_lane(four, byte, KIND == "bf16").to(dtype)
                    weight = tl.trans(tl.reshape(value.to(dtype), (ROWS, CHUNKS * 8)))
                    sums = tl.dot(given, weight, sums)
    ours = begin_row + tl.arange(0, ROWS)[:, None]
    row_mask = ours < count
    if split == 0:
        rows = tl.cast(expert, tl.int64) * count + ours
        for start in range(whole * CHUNK, features, TAIL):
            columns = start + tl.arange(0, TAIL)[None, :]
            mask = row_mask & (columns < features)
            value = values_at(
                rows, columns, mask, planes, scales, codebook, zeros, scale_codebook, scale_absmax,
                scale_mean, row_stride, features, blocks, BITS, BLOCK, HAS_ZEROS, HAS_DQ,
            )  # fmt: skip
            x_mask = slot_mask & (columns < features)
            given = x_at(x, slots * x_stride + columns, x_mask, KIND).to(dtype)
            sums = tl.dot(given, tl.trans(value.to(dtype)), sums)
        if HAS_OUTLIERS:
            for start in range(0, outliers, TAIL):  # in place of what their codes stand for
                index = start + tl.arange(0, TAIL)[None, :]
                columns = tl.load(outlier_index + index, mask=index < outliers, other=0)
                mask = row_mask & (index < outliers)
                value = values_at(
                    rows, columns, mask, planes, scales, codebook, zeros, scale_codebook, scale_absmax,
                    scale_mean, row_stride, features, blocks, BITS, BLOCK, HAS_ZEROS, HAS_DQ,
                ).to(dtype)  # fmt: skip
                kept = tl.load(outlier_values + rows * outliers + index, mask=mask, other=0.0).to(dtype)
                given = x_at(x, slots * x_stride + columns, slot_mask & (index < outliers), KIND).to(dtype)
                sums = tl.dot(given, tl.trans(kept), sums)
                sums -= tl.dot(given, tl.trans(value))
    place = (split.to(tl.int64) * m + slots) * count + tl.trans(ours)
    tl.store(out + place, sums, mask=slot_mask & tl.trans(row_mask))
