"""Codes of a strip of columns, one column after another: what is right, in plain torch.

The one thing to know: a strip is ``(columns, rows)``, one input feature of all rows side by side. Rows know
nothing of each other, every operation is element-wise and rounds once, and so kernels give the same bits.

    feedback   w_i as earlier columns left it -> q_i;  e_i = (w_i - q_i) / U_ii;  w_j -= U_ij e_i for j > i
    descent    w_i = q_i - g_i / H_ii -> q_i';         d_i = q_i' - q_i;          g_j += H_ij d_i for j > i
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KEPT = -1  # the block of a column that has no codes


class Levels(NamedTuple):
    """What the codes of a strip can mean, in the order in which the ops take it.

    Attributes:
        blocks: ``(columns,)`` int64: the block that each column is in; ``KEPT`` where it is kept at 16 bits.
        scales: ``(all blocks, rows)`` float32.
        inverse: the same of 1 / scale, 0 where that is not finite.
        zeros: the same, to be added; None without.
        codebook: ``(levels,)`` float32, sorted.
        bounds: ``(levels - 1,)`` float32 between them; a value of just this size takes the lower code.
        kept: dtype of kept columns.
    """

    blocks: Tensor
    scales: Tensor
    inverse: Tensor
    zeros: Tensor | None
    codebook: Tensor
    bounds: Tensor
    kept: torch.dtype

    def nearest(self, block: int, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values of what is nearest to ``wanted``, ``(rows,)``."""
        if block == KEPT:
            return torch.zeros_like(wanted, dtype=torch.uint8), wanted.to(self.kept).float()
        centred = wanted if self.zeros is None else wanted - self.zeros[block]
        codes = torch.bucketize(centred * self.inverse[block], self.bounds, out_int32=True)
        values = self.codebook[codes] * self.scales[block]
        return codes.to(torch.uint8), values if self.zeros is None else values + self.zeros[block]


def feed_back_strip(wanted: Tensor, factor: Tensor, levels: Levels) -> tuple[Tensor, Tensor, Tensor]:
    """Each column's error passed on to the later ones of the strip.

    Args:
        wanted: ``(columns, rows)`` float32.
        factor: ``(columns, columns)`` float32, upper: U.
        levels: to choose among.

    Returns:
        Codes (uint8, 0 in kept columns), values and errors e (float32), each ``(columns, rows)``.
    """
    rest = wanted.clone()
    codes = torch.empty_like(rest, dtype=torch.uint8)
    values, errors = torch.empty_like(rest), torch.empty_like(rest)
    for i, block in enumerate(levels.blocks.tolist()):
        codes[i], values[i] = levels.nearest(block, rest[i])
        errors[i] = (rest[i] - values[i]) / factor[i, i]
        rest[i + 1 :] -= factor[i, i + 1 :, None] * errors[i]
    return codes, values, errors


def descend_strip(
    slope: Tensor, start: Tensor, moments: Tensor, levels: Levels
) -> tuple[Tensor, Tensor, Tensor]:
    """Each column in turn takes what is best for all others as they are.

    Args:
        slope: ``(columns, rows)`` float32: g, H times the errors of all columns.
        start: ``(columns, rows)`` float32: the values so far, q.
        moments: ``(columns, columns)`` float32: H.
        levels: to choose among.

    Returns:
        Codes (uint8, 0 in kept columns), values and steps d (float32), each ``(columns, rows)``.
    """
    rest = slope.clone()
    codes = torch.empty_like(rest, dtype=torch.uint8)
    values, steps = torch.empty_like(rest), torch.empty_like(rest)
    for i, block in enumerate(levels.blocks.tolist()):
        codes[i], values[i] = levels.nearest(block, start[i] - rest[i] / moments[i, i])
        steps[i] = values[i] - start[i]
        rest[i + 1 :] += moments[i, i + 1 :, None] * steps[i]
    return codes, values, steps
