"""Reading packed weights inside Triton kernels: bit planes to codes, codes and scales to values.

The one thing to know: ``codes_at`` reads any columns, also those of a short last chunk, a byte a code;
``chunk_codes`` reads whole chunks of 256 codes, each byte once and 16 bytes an instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = tl.constexpr(256)
LANES = tl.constexpr(32)
SCALE_GROUP = tl.constexpr(256)


@triton.jit
def _plane_at(base, group, lane, lanes, mask, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """What the plane of WIDTH bits adds to the codes; wider planes come first."""
    START: tl.constexpr = BITS - BITS % (2 * WIDTH)
    PER_BYTE: tl.constexpr = 8 // WIDTH
    at = (START + group // PER_BYTE) * lanes + lane
    byte = tl.load(base + at, mask=mask, other=0).to(tl.int32)
    return ((byte >> (WIDTH * (group % PER_BYTE))) & ((1 << WIDTH) - 1)) << START


@triton.jit
def codes_at(planes, rows, columns, mask, row_stride, features, BITS: tl.constexpr):
    """Codes int32 at ``rows`` (R, 1) int64 and ``columns`` (1, C), shape of ``mask``; 0 outside it."""
    chunk = columns // CHUNK
    inside = columns % CHUNK
    lanes = tl.maximum((tl.minimum(features - chunk * CHUNK, CHUNK) + 7) // 8, 1)
    group = inside // lanes
    lane = inside % lanes
    base = planes + rows * row_stride + chunk * (BITS * LANES)
    codes = tl.zeros(mask.shape, tl.int32)
    if BITS & 8:
        codes |= _plane_at(base, group, lane, lanes, mask, BITS, 8)
    if BITS & 4:
        codes |= _plane_at(base, group, lane, lanes, mask, BITS, 4)
    if BITS & 2:
        codes |= _plane_at(base, group, lane, lanes, mask, BITS, 2)
    if BITS & 1:
        codes |= _plane_at(base, group, lane, lanes, mask, BITS, 1)
    return codes


@triton.jit
def _whole_plane(start, row_mask, BITS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """What the plane of WIDTH bits adds to the codes of a whole chunk, (ROWS, 256)."""
    START: tl.constexpr = BITS - BITS % (2 * WIDTH)
    PER_BYTE: tl.constexpr = 8 // WIDTH
    at = START * LANES + tl.arange(0, WIDTH * LANES)
    byte = tl.load(start[:, None] + at[None, :], mask=row_mask[:, None], other=0)
    byte = tl.reshape(byte, (ROWS, WIDTH, 1, LANES)).to(tl.int32)
    shift = tl.reshape(tl.arange(0, PER_BYTE) * WIDTH, (1, 1, PER_BYTE, 1))
    return tl.reshape((byte >> shift) & ((1 << WIDTH) - 1), (ROWS, CHUNK)) << START


@triton.jit
def chunk_codes(planes, rows, row_mask, chunk, row_stride, BITS: tl.constexpr, ROWS: tl.constexpr):
    """Codes ``(ROWS, 256)`` int32 of one whole chunk; ``rows`` (ROWS,) int64."""
    start = planes + rows * row_stride + chunk * (BITS * LANES)
    codes = tl.zeros((ROWS, CHUNK), tl.int32)
    if BITS & 8:
        codes |= _whole_plane(start, row_mask, BITS, 8, ROWS)
    if BITS & 4:
        codes |= _whole_plane(start, row_mask, BITS, 4, ROWS)
    if BITS & 2:
        codes |= _whole_plane(start, row_mask, BITS, 2, ROWS)
    if BITS & 1:
        codes |= _whole_plane(start, row_mask, BITS, 1, ROWS)
    return codes


@triton.jit
def values_of(
    codes, rows, columns, mask, scales, codebook, zeros, scale_codebook, scale_absmax, scale_mean,
    blocks, BLOCK: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_DQ: tl.constexpr,
):  # fmt: skip
    """``codebook[code] * scale (+ zero)`` in float32, 0 where not ``mask``."""
    at = rows * blocks + columns // BLOCK
    if HAS_DQ:
        stored = tl.load(scales + at, mask=mask, other=0).to(tl.int32)
        constant = tl.load(scale_absmax + at // SCALE_GROUP, mask=mask, other=0.0)
        scale = tl.load(scale_codebook + stored) * constant + tl.load(scale_mean)
    else:
        scale = tl.load(scales + at, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(codebook + codes, mask=mask, other=0.0) * scale
    if HAS_ZEROS:
        value += tl.load(zeros + at, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, value, 0.0)
