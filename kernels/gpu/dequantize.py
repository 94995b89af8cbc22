"""Packed rows to values: the whole weight, or the rows that ids pick (an embedding).

The one thing to know: outlier columns are not written here; the caller copies them over the result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kbitc.kernels.gpu.tiles import tiled
from kbitc.kernels.gpu.weights import CHUNK, code_at, lanes_of, load_words, scale_at, values_at


@triton.jit
def _bits_of(value, BYTE: tl.constexpr, IS_BF16: tl.constexpr):
    """float32 to the 16-bit float of column BYTE in an int64 of four."""
    half = value.to(tl.bfloat16) if IS_BF16 else value.to(tl.float16)
    return (half.to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF) << (16 * BYTE)


@tiled("rows", "features", "HAS_IDS")
@triton.jit
def rows_kernel(
    ids, out,
    planes, words, scales, codebook, zeros, scale_codebook, scale_absmax, scale_mean,
    row_stride, features, blocks, begin, count,
    BITS: tl.constexpr, BLOCK: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_DQ: tl.constexpr,
    KIND: tl.constexpr, SCALES: tl.constexpr, IS_ALIGNED: tl.constexpr, HAS_IDS: tl.constexpr,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Program (i, j): whole chunks of tile j, of rows ``ids`` (or ``count`` ones from ``begin``) of tile i.

    ``out`` (count, features): float32 (KIND "fp32"), or 16-bit floats as int64, four each.
    """
    row, nth, lane = lanes_of(CHUNKS, ROWS)
    places = tl.program_id(0).to(tl.int64) * ROWS + row
    mask = places < count
    rows = tl.load(ids + places, mask=mask, other=0).to(tl.int64) if HAS_IDS else begin + places
    chunk = tl.program_id(1) * CHUNKS + nth
    mask = mask & (chunk < features // CHUNK)
    packed = load_words(planes, words, rows, chunk, lane, mask, row_stride, BITS, IS_ALIGNED)
    GROUPS: tl.constexpr = 8 // SCALES
    for s in tl.static_range(SCALES):
        at = rows * blocks + (chunk * CHUNK + s * (GROUPS * 32) + lane * 4) // BLOCK
        scale = scale_at(at, mask, scales, scale_codebook, scale_absmax, scale_mean, HAS_DQ)
        if HAS_ZEROS:
            zero = tl.load(zeros + at, mask=mask, other=0.0).to(tl.float32)
        for g in tl.static_range(GROUPS):
            column = chunk * CHUNK + (s * GROUPS + g) * 32 + lane * 4
            four = tl.zeros(mask.shape, tl.int64)
            for byte in tl.static_range(4):
                value = tl.load(codebook + code_at(packed, s * GROUPS + g, byte, BITS)) * scale
                if HAS_ZEROS:
                    value += zero
                if KIND == "fp32":
                    tl.store(out + places * features + column + byte, value, mask=mask)
                else:
                    four |= _bits_of(value, byte, KIND == "bf16")
            if KIND != "fp32":
                tl.store(out + places * (features // 4) + column // 4, four, mask=mask)


@triton.jit
def columns_kernel(
    ids, out,
    planes, scales, codebook, zeros, scale_codebook, scale_absmax, scale_mean,
    row_stride, features, blocks, begin, first,
    BITS: tl.constexpr, BLOCK: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_DQ: tl.constexpr,
    HAS_IDS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (i, j): ``out[i]`` = row ``ids[i]`` (or begin + i), columns from ``first`` on; any block."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + place).to(tl.int64) if HAS_IDS else begin + place
    columns = first + tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = columns < features
    value = values_at(
        row, columns, mask, planes, scales, codebook, zeros, scale_codebook, scale_absmax, scale_mean,
        row_stride, features, blocks, BITS, BLOCK, HAS_ZEROS, HAS_DQ,
    )  # fmt: skip
    tl.store(out + place * features + columns, value.to(out.dtype.element_ty), mask=mask)
