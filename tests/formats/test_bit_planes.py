"""Packing: inverse of unpacking, dense, and the documented layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kbitc.formats.bit_planes import CHUNK, PLANES, pack, row_bytes, unpack


@settings(max_examples=150, deadline=None)
@given(
    bits=st.integers(1, 8),
    count=st.integers(1, 1400),
    lead=st.sampled_from([(), (1,), (3,), (2, 3)]),
    seed=st.integers(0, 2**31),
)
def test_unpack_inverts_pack(bits, count, lead, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (*lead, count), dtype=torch.uint8, generator=generator)
    packed = pack(codes, bits)
    assert packed.shape == (*lead, row_bytes(count, bits))
    assert torch.equal(unpack(packed, count, bits), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 9, 172, 255, 256, 257, 4096])
def test_packing_is_dense_up_to_eight_codes_a_row(bits, count):
    exact = -(-count * bits // 8)
    assert exact <= row_bytes(count, bits) <= exact + bits
    if count % 8 == 0:
        assert row_bytes(count, bits) == exact


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [13, 256, 300])
def test_layout_is_the_documented_one(bits, count):
    """Bit by bit, from the module docstring."""
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8)
    packed = pack(codes, bits).tolist()
    for j in range(count):
        chunk = j // CHUNK
        length = min(CHUNK, count - chunk * CHUNK)
        lanes = -(-length // 8)
        group, lane = divmod(j - chunk * CHUNK, lanes)
        start, shift, code = chunk * bits * (CHUNK // 8), 0, 0
        for width in PLANES[bits]:
            per_byte = 8 // width
            byte = packed[start + group // per_byte * lanes + lane]
            code |= (byte >> width * (group % per_byte) & 2**width - 1) << shift
            shift += width
            start += width * lanes
        assert code == codes[j]


def test_planes_add_up():
    assert all(sum(widths) == bits for bits, widths in PLANES.items())


def test_layout_is_frozen():
    """Artifacts on disk hold these bytes."""
    codes = torch.arange(16, dtype=torch.uint8) % 8
    assert pack(codes, 3).tolist() == [136, 221, 136, 221, 204, 204]
