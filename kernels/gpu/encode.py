"""Weights to packed codes: whole chunks, a lane word of every row of bytes at a time.

The one thing to know: a code is found by bisecting the boundaries between levels, ``bits`` look-ups deep, and
is the code that `kbitc.formats.encoder` finds: a tie takes the lower one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kbitc.kernels.gpu.tiles import tiled
from kbitc.kernels.gpu.weights import CHUNK, lanes_of


@triton.jit
def _put(words, codes, GROUP: tl.constexpr, BYTE: tl.constexpr, BITS: tl.constexpr):
    """The words with the codes of one group and byte in place: inverse of ``weights.code_at``."""
    found = ()
    for i in tl.static_range(BITS):
        word = words[i]
        for p in tl.static_range(4):
            if BITS & (8 >> p):
                start = BITS - BITS % (16 >> p)
                per_byte = 8 // (8 >> p)
                if i == start + GROUP // per_byte:
                    field = (codes >> start) & ((1 << (8 >> p)) - 1)
                    word |= field << (8 * BYTE + (8 >> p) * (GROUP % per_byte))
        found = found + (word,)
    return found


@tiled("encode", "features")
@triton.jit
def encode_kernel(
    values, inverses, zeros, bounds, out,
    row_words, features, blocks, count,
    BITS: tl.constexpr, BLOCK: tl.constexpr, HAS_ZEROS: tl.constexpr,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Program (i, j): rows of tile i, whole chunks of tile j, of ``values`` (count, features).

    ``inverses`` (count, blocks) float32: 1 / scale. ``bounds`` (2**BITS - 1,) float32, ascending. ``out``
    (count, row_words) int32.
    """
    row, nth, lane = lanes_of(CHUNKS, ROWS)
    rows = tl.program_id(0).to(tl.int64) * ROWS + row
    chunk = tl.program_id(1) * CHUNKS + nth
    mask = (rows < count) & (chunk < features // CHUNK)
    words = ()
    for _ in tl.static_range(BITS):
        words = words + (tl.zeros((ROWS * CHUNKS * 8,), tl.int32),)
    for group in tl.static_range(8):
        for byte in tl.static_range(4):
            column = chunk * CHUNK + group * 32 + lane * 4 + byte
            value = tl.load(values + rows * features + column, mask=mask, other=0.0).to(tl.float32)
            at = rows * blocks + column // BLOCK
            if HAS_ZEROS:
                value -= tl.load(zeros + at, mask=mask, other=0.0).to(tl.float32)
            value *= tl.load(inverses + at, mask=mask, other=0.0)
            codes = tl.zeros((ROWS * CHUNKS * 8,), tl.int32)
            for bit in tl.static_range(BITS):
                upper = codes | (1 << (BITS - 1 - bit))
                codes = tl.where(value > tl.load(bounds + upper - 1), upper, codes)
            words = _put(words, codes, group, byte, BITS)
    for i in tl.static_range(BITS):
        tl.store(out + rows * row_words + chunk * (BITS * 8) + i * 8 + lane, words[i], mask=mask)
