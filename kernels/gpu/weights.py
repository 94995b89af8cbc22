"""Reading packed weights inside Triton kernels: bit planes to codes, codes and scales to values.

The one thing to know: a chunk of 256 codes is ``bits`` rows of 32 bytes, and a 32-bit word of such a row
holds four lanes. A thread that reads four neighbouring words of every row (16 bytes an instruction,
whatever k is) has all 8 groups of 16 lanes: 128 whole codes, cut out without a word to another thread.

``load_words`` and ``code_at`` do that for whole chunks; ``values_at`` reads any columns, a byte a code,
those of a short last chunk too.
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
def lanes_of(CHUNKS: tl.constexpr, ROWS: tl.constexpr):
    """Row, chunk and lane of each word of a tile, (ROWS * CHUNKS * 8,) int32 each.

    Flat, because of tensors of two dimensions a compiler of Triton 3.6 moves every code through shared
    memory to look its level up.
    """
    at = tl.arange(0, ROWS * CHUNKS * 8)
    return at // (CHUNKS * 8), at // 8 % CHUNKS, at % 8


@triton.jit
def load_words(
    planes, words, rows, chunk, lane, mask, row_stride, BITS: tl.constexpr, IS_ALIGNED: tl.constexpr
):
    """Words of every row of bytes of whole chunks: a tuple of BITS int32 tensors, shape of ``mask``.

    ``rows`` int64, ``chunk`` and ``lane`` of `lanes_of`; ``words`` is ``planes`` as int32, for IS_ALIGNED.
    """
    found = ()
    for i in tl.static_range(BITS):
        if IS_ALIGNED:
            at = words + rows * (row_stride // 4) + chunk * (BITS * 8) + i * 8 + lane
            word = tl.load(at, mask=mask, other=0)
        else:
            at = planes + rows * row_stride + chunk * (BITS * 32) + i * 32 + lane * 4
            word = tl.load(at, mask=mask, other=0).to(tl.int32)
            for byte in tl.static_range(1, 4):
                word |= tl.load(at + byte, mask=mask, other=0).to(tl.int32) << (8 * byte)
        found = found + (word,)
    return found


@triton.jit
def _plane_of(words, GROUP: tl.constexpr, BYTE: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """What the plane of WIDTH bits adds to the codes of a group, in a byte of each word."""
    START: tl.constexpr = BITS - BITS % (2 * WIDTH)
    PER_BYTE: tl.constexpr = 8 // WIDTH
    shift: tl.constexpr = 8 * BYTE + WIDTH * (GROUP % PER_BYTE)
    return ((words[START + GROUP // PER_BYTE] >> shift) & ((1 << WIDTH) - 1)) << START


@triton.jit
def code_at(words, GROUP: tl.constexpr, BYTE: tl.constexpr, BITS: tl.constexpr):
    """Codes int32 of columns ``256 * chunk + 32 * GROUP + 4 * lane + BYTE``, from :func:`load_words`."""
    codes = tl.zeros(words[0].shape, tl.int32)
    if BITS & 8:
        codes |= _plane_of(words, GROUP, BYTE, BITS, 8)
    if BITS & 4:
        codes |= _plane_of(words, GROUP, BYTE, BITS, 4)
    if BITS & 2:
        codes |= _plane_of(words, GROUP, BYTE, BITS, 2)
    if BITS & 1:
        codes |= _plane_of(words, GROUP, BYTE, BITS, 1)
    return codes


@triton.jit
def x_at(x, place, mask, KIND: tl.constexpr):
    """X in float32 at single places; x as `gemv_kernel` takes it."""
    if KIND == "fp32":
        value = tl.load(x + place, mask=mask, other=0.0)
    else:
        four = tl.load(x + place // 4, mask=mask, other=0)
        value = unpack_lane(four >> (place % 4 * 16).to(tl.int64), 0, KIND == "bf16")
    return value


@triton.jit
def unpack_lane(four, BYTE: tl.constexpr, IS_BF16: tl.constexpr):
    """float32 from four 16-bit floats in an int64: the one of column BYTE."""
    bits = (four >> (16 * BYTE)).to(tl.int32) & 0xFFFF
    if IS_BF16:
        value = (bits << 16).to(tl.float32, bitcast=True)
    else:
        value = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def scale_at(at, mask, scales, scale_codebook, scale_absmax, scale_mean, HAS_DQ: tl.constexpr):
    """Scales in float32, by their place in the whole weight."""
    if HAS_DQ:
        stored = tl.load(scales + at, mask=mask, other=0).to(tl.int32)
        constant = tl.load(scale_absmax + at // SCALE_GROUP, mask=mask, other=0.0)
        return tl.load(scale_codebook + stored) * constant + tl.load(scale_mean)
    return tl.load(scales + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def values_at(
    rows, columns, mask,
    planes, scales, codebook, zeros, scale_codebook, scale_absmax, scale_mean, row_stride, features, blocks,
    BITS: tl.constexpr, BLOCK: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_DQ: tl.constexpr,
):  # fmt: skip
    """``codebook[code] * scale (+ zero)`` in float32 at any rows and columns, see `codes_at`; 0 outside."""
    codes = codes_at(planes, rows, columns, mask, row_stride, features, BITS)
    at = rows * blocks + columns // BLOCK
    scale = scale_at(at, mask, scales, scale_codebook, scale_absmax, scale_mean, HAS_DQ)
    value = tl.load(codebook + codes, mask=mask, other=0.0) * scale
    if HAS_ZEROS:
        value += tl.load(zeros + at, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, value, 0.0)
