"""The blocks of a weight as ONNX Runtime's packed matmul takes them: powers of two, 16 to 128.

The one thing to know: a block that is a multiple of 16 is cut, its scale repeated; any other is padded
to one with weights that meet zeros, and the activations are padded alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

LARGEST = 128  # a power of two that every kernel takes at full speed


@dataclass(frozen=True)
class Geometry:
    """Geometry of one weight's rows.

    Attributes:
        in_features: weights a row.
        block: weights a scale, as stored.
        padded: the same, with padding.
        group: weights a scale in the container.
    """

    in_features: int
    block: int
    padded: int
    group: int

    @property
    def count(self) -> int:
        """Blocks a row."""
        return math.ceil(self.in_features / self.block)

    @property
    def is_padded(self) -> bool:
        """True if activations must be padded block by block."""
        return self.padded != self.block

    @property
    def width(self) -> int:
        """Columns that the matmul sees."""
        return self.count * self.padded if self.is_padded else self.in_features

    @property
    def groups(self) -> int:
        """Scales a row in the container."""
        return math.ceil(self.width / self.group)

    @property
    def stored(self) -> int:
        """Digits a row in the container."""
        return self.groups * self.group

    @property
    def repeats(self) -> int:
        """Groups a block."""
        return self.padded // self.group

    def spread(self, codes: Tensor, fill: int) -> Tensor:
        """Codes ``(rows, in_features)`` in the places where the container wants them, ``(rows, stored)``."""
        if self.is_padded:
            codes = pad(codes, (0, self.count * self.block - self.in_features), value=fill)
            codes = pad(codes.unflatten(1, (-1, self.block)), (0, self.padded - self.block), value=fill)
            codes = codes.flatten(1)
        return pad(codes, (0, self.stored - codes.shape[1]), value=fill)

    def repeat(self, scales: Tensor) -> Tensor:
        """Scales ``(rows, count)`` as ``(rows, groups)``."""
        return scales.repeat_interleave(self.repeats, dim=1)[:, : self.groups]


def make_geometry(in_features: int, block: int, smallest: int) -> Geometry:
    """The geometry of rows of ``in_features`` weights in blocks of ``block``.

    Args:
        smallest: group that the kernel takes: 16, or 32 for 2 bits.

    >>> make_geometry(576, 64, 16)
    Geometry(in_features=576, block=64, padded=64, group=64)
    >>> make_geometry(100, 24, 16).padded
    32
    """
    if block >= in_features:
        # One scale a row: any group will do, and its padding lies behind the row.
        group = min(LARGEST, max(smallest, 1 << (in_features - 1).bit_length()))
        whole = math.ceil(in_features / group) * group
        return Geometry(in_features, whole, whole, group)
    padded = math.ceil(block / smallest) * smallest
    return Geometry(in_features, block, padded, min(LARGEST, padded & -padded))
