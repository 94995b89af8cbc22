"""What the codes of an optimizer's states stand for: the dynamic maps of block-wise 8-bit optimizers.

The one thing to know: first moments take the signed map and second moments the unsigned one, and there what
is above 0 never becomes 0. A second moment of 0 beside a first one that is not would make a step of 1 / eps.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kbitc.formats import datatypes
from kbitc.formats.encoder import Encoder

BITS = (4, 8)
BLOCK = 256
"""Numbers that share a scale, by default."""

BLOCK_MOST = 4096  # what kernels keep beside their registers


class StateLevels(NamedTuple):
    """Two maps, one a row: of first moments, and of second ones.

    Attributes:
        levels: ``(2, 2**bits)`` float32, sorted.
        cells: ``(2, 65536)`` int32, the bounds between levels in one look-up: by the upper 16 bits of a
            float32, what its lower 16 bits (turned where its sign is set) are added to; the code is the sum's
            upper half.
    """

    levels: Tensor
    cells: Tensor

    def codes(self, at: int, values: Tensor) -> Tensor:
        """The nearest codes of map ``at``, uint8, of float32 values in [-1, 1]; what the look-up means."""
        bits = values.view(torch.int32)
        lower = (bits ^ (bits >> 31)) & 0xFFFF
        return ((self.cells[at][(bits >> 16 & 0xFFFF).long()] + lower) >> 16).to(torch.uint8)


def unsigned_map(bits: int) -> Tensor:
    """The dynamic tree of what is never negative, ``(2**bits,)`` float32; a sign's bit is the fraction's.

    >>> unsigned_map(3)
    tensor([0.0000, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0000])
    """
    return torch.from_numpy(np.concatenate([[0.0], datatypes.decades(bits - 1, 2), [1.0]])).float()


@functools.cache
@torch.inference_mode(mode=False)
def state_levels(bits: int) -> StateLevels:
    """The maps of 4 or 8 bits, on the CPU.

    Args:
        bits: of a code.
    """
    signed = datatypes.codebook("dynamic", datatypes.CodebookRequest(bits=bits))
    levels = torch.stack([torch.from_numpy(signed).float(), unsigned_map(bits)])
    return StateLevels(levels, torch.stack([_cells(own) for own in state_bounds(levels)]))


def state_bounds(levels: Tensor) -> Tensor:
    """What lies between the levels of two maps, ``(2, levels - 1)``; just this size takes the lower code."""
    bounds = torch.stack([Encoder(own).bounds for own in levels])
    bounds[1, 0] = 0.0
    return bounds


def _cells(bounds: Tensor) -> Tensor:
    """At most one bound lies within the floats that share their upper 16 bits."""
    upper = torch.arange(2**16) << 16
    is_negative = upper >= 2**31
    turn = torch.where(is_negative, 0xFFFF, 0)
    lowest, highest = _floats(upper | turn), _floats(upper | (0xFFFF - turn))
    below, after = (torch.bucketize(edge.nan_to_num(0.0), bounds) for edge in (lowest, highest))
    if bool((after - below > 1).any()):
        raise AssertionError("a map has levels closer than 16 bits of a float tell apart")
    at = bounds[below.clamp_max(len(bounds) - 1)].view(torch.int32).long() & 0xFFFF
    # What is above the bound within these carries into the upper half.
    room = torch.where(after > below, 0xFFFF - (at ^ turn), 0)
    return ((below << 16) + room).to(torch.int32)


def _floats(bits: Tensor) -> Tensor:
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
