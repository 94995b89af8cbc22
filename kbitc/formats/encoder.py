"""`Encoder`: the code of the level nearest to a value, for any sorted codebook."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Encoder:
    """Nearest code of a codebook for values in [-1, 1]; a tie takes the lower code.

    A grid of cells is laid over [-1, 1], so fine that a cell holds at most one boundary between two
    codes; then ``code = base[cell] + (value > boundary[cell])``: two small table look-ups instead of
    a binary search (16 levels, 4096 x 4096, 2 threads: 0.05 s against 0.18 s). Codebooks with levels
    closer than a cell (wide exponents) take the binary search; both give the same codes.
    """

    CELLS = 2**13

    def __init__(self, codebook: Tensor) -> None:
        levels = codebook.double()
        # Rounded down to float32: a value of exactly this size still belongs to the lower code.
        self.bounds = _round_down((levels[1:] + levels[:-1]) / 2)
        cell = self._cell(self.bounds.clone())
        self.uses_cells = bool((cell.diff() > 0).all()) if cell.numel() else False
        if self.uses_cells:
            base = torch.bincount(cell.long() + 1, minlength=self.CELLS + 2)[: self.CELLS + 1]
            self.base = base.cumsum(0).to(torch.uint8)
            self.edge = torch.full((self.CELLS + 1,), math.inf)
            self.edge[cell.long()] = self.bounds

    def _cell(self, values: Tensor) -> Tensor:
        return values.add_(1.0).mul_(self.CELLS / 2).clamp_(0, self.CELLS).to(torch.int32)

    def __call__(self, values: Tensor) -> Tensor:
        """Codes, uint8, of float32 values of any shape."""
        if not self.uses_cells:
            return torch.bucketize(values, self.bounds, out_int32=True).to(torch.uint8)
        cell = self._cell(values.clone()).flatten()
        codes = self.base.index_select(0, cell)
        codes += values.flatten() > self.edge.index_select(0, cell)
        return codes.view(values.shape)


def _round_down(values: Tensor) -> Tensor:
    rounded = values.float()
    return torch.where(
        rounded.double() > values, torch.nextafter(rounded, torch.full_like(rounded, -math.inf)), rounded
    )
