"""Codes to bytes: dense bit planes, one layout for every device.

The one thing to know: a row of codes is cut into chunks of 256 (the last one shorter). A chunk of t
codes is a matrix of 8 groups x L lanes, L = ceil(t / 8), in row-major order: code j stands in group
j // L, lane j % L. A k-bit code is split into planes of 8, 4, 2 or 1 bits, widest (and lowest bits)
first; plane of width w stores group g in byte row g // (8 / w) at bit w * (g % (8 / w)). So in every
plane one byte lane holds the same lane of consecutive groups, and a vector of 32 bytes unpacks to 32
*consecutive* weights with one shift and one mask, whatever k is. A chunk takes k * L bytes, a row
k * ceil(n / 8): dense, padded to a multiple of 8 codes a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 256
GROUPS = 8

PLANES: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}
"""Widths of the bit planes for each number of bits, lowest bits first."""


def row_bytes(count: int, bits: int) -> int:
    """Bytes of one row of ``count`` codes.

    >>> row_bytes(172, 3)
    66
    """
    return bits * -(-count // GROUPS)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: ``(..., n)`` uint8, each below ``2**bits``.
        bits: 1 to 8.

    Returns:
        ``(..., row_bytes(n, bits))`` uint8.
    """
    lead, count = codes.shape[:-1], codes.shape[-1]
    full = count // CHUNK * CHUNK
    parts = []
    if full:
        chunks = codes[..., :full].reshape(*lead, full // CHUNK, GROUPS, CHUNK // GROUPS)
        parts.append(_pack_chunks(chunks, bits).flatten(-2))
    if full < count:
        lanes = -(-(count - full) // GROUPS)
        tail = torch.nn.functional.pad(codes[..., full:], (0, GROUPS * lanes - (count - full)))
        parts.append(_pack_chunks(tail.reshape(*lead, 1, GROUPS, lanes), bits).flatten(-2))
    return torch.cat(parts, dim=-1) if len(parts) != 1 else parts[0]


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """Inverse of :func:`pack`.

    Args:
        packed: ``(..., row_bytes(count, bits))`` uint8.
        count: codes a row.
        bits: 1 to 8.

    Returns:
        ``(..., count)`` uint8.
    """
    lead = packed.shape[:-1]
    full = count // CHUNK * CHUNK
    split = row_bytes(full, bits)
    parts = []
    if full:
        chunks = packed[..., :split].reshape(*lead, full // CHUNK, bits * (CHUNK // GROUPS))
        parts.append(_unpack_chunks(chunks, bits).reshape(*lead, full))
    if full < count:
        tail = packed[..., split:].reshape(*lead, 1, packed.shape[-1] - split)
        parts.append(_unpack_chunks(tail, bits).flatten(-3)[..., : count - full])
    return torch.cat(parts, dim=-1) if len(parts) != 1 else parts[0]


def _pack_chunks(codes: Tensor, bits: int) -> Tensor:
    """``(..., 8, L)`` codes to ``(..., bits * L)`` bytes."""
    planes = []
    shift = 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        part = (codes >> shift) & (2**width - 1) if width < 8 else codes
        part = part.unflatten(-2, (width, per_byte))
        plane = part[..., 0, :]
        for phase in range(1, per_byte):
            plane = plane | (part[..., phase, :] << (width * phase))
        planes.append(plane.flatten(-2))
        shift += width
    return torch.cat(planes, dim=-1) if len(planes) > 1 else planes[0]


def _unpack_chunks(packed: Tensor, bits: int) -> Tensor:
    """``(..., bits * L)`` bytes to ``(..., 8, L)`` codes."""
    lanes = packed.shape[-1] // bits
    codes: Tensor | None = None
    shift = start = 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        plane = packed[..., start : start + width * lanes].unflatten(-1, (width, 1, lanes))
        if width < 8:
            phases = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
            plane = (plane >> phases.view(per_byte, 1)) & (2**width - 1)
        part = plane.flatten(-3, -2)
        codes = part if codes is None else codes | (part << shift)
        shift += width
        start += width * lanes
    assert codes is not None
    return codes


def pack_row_by_row(codes: Tensor, width: int) -> Tensor:
    """Pack as other programs do, without planes and lanes: each code's bits after those of the one before.

    Args:
        codes: ``(rows, n)`` uint8, each below ``2**width``.
        width: 1, 2, 4 or 8.

    Returns:
        ``(rows, ceil(n * width / 8))`` uint8, low bits first.
    """
    per_byte = 8 // width
    apart = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_byte)).unflatten(1, (-1, per_byte))
    phases = torch.arange(0, 8, width, dtype=torch.uint8)
    packed: Tensor = (apart << phases).sum(-1, dtype=torch.uint8)
    return packed
