"""What a change of a weight costs to second order: squared gradients of outcomes that the student draws.

The one thing to know: these are the moments of `kbitc.sensitivity.moments`, of the student instead of the
source: ``h = rows * columns`` summed over uses, and ``h * d² / 2`` nats a position is what a change d costs
by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kbitc.formats.packed import Packed
from kbitc.sensitivity.moments import squared_sums
from kbitc.training.tunable import BlockSums


@dataclass
class Square:
    """``rows * columns / sum(rows)`` is the sum over tokens of squared gradients, as a product.

    Attributes:
        rows: ``(rows,)`` float64.
        columns: ``(experts, in_features)`` float64; 1 where there are no experts.
    """

    rows: Tensor
    columns: Tensor

    def tile(self, start: int, stop: int, per_expert: int) -> Tensor:
        """Rows start to stop, ``(rows, in_features)`` float32."""
        experts = torch.arange(start, stop) // per_expert
        totals = self.rows.view(-1, per_expert).sum(1).clamp_min(1e-300)
        return (self.rows[start:stop, None] * (self.columns / totals[:, None])[experts]).float()


class SquareSums(BlockSums):
    """Squared gradients in place of gradients, of one weight.

    Attributes:
        parts: of products and of look-ups.
    """

    def __init__(self, packed: Packed) -> None:
        super().__init__(packed)
        rows, experts = len(self.scales), packed.planes.shape[0] if packed.planes.dim() == 3 else 1
        self.per_expert = rows // experts

        def zeros() -> Square:
            made: dict[str, Any] = {"dtype": torch.float64}
            return Square(torch.zeros(rows, **made), torch.zeros(experts, packed.in_features, **made))

        self.parts = {"product": zeros(), "rows": zeros()}

    def add_product(self, left: Tensor, right: Tensor, first: int = 0) -> None:
        """Of the gradient ``left.T @ right``."""
        by_row, by_token = squared_sums(left)
        part = self.parts["product"]
        part.rows[first : first + left.shape[1]] += by_row
        part.columns[first // self.per_expert] += (right.square() * by_token).sum(0)

    def add_rows(self, ids: Tensor, grad: Tensor) -> None:
        """Of rows that were looked up: how often each was, times the gradient of a feature."""
        part = self.parts["rows"]
        part.rows += torch.bincount(ids, minlength=len(part.rows))
        part.columns[0] += grad.square().sum(0)

    def merge(self, other: SquareSums) -> None:
        """Add another window's."""
        for what, part in self.parts.items():
            part.rows += other.parts[what].rows
            part.columns += other.parts[what].columns


@dataclass
class Curvature:
    """Of all weights, per position.

    Attributes:
        sums: by name.
        positions: that they are of.
    """

    sums: dict[str, SquareSums] = field(default_factory=dict)
    positions: int = 0

    def tile(self, name: str, start: int, stop: int) -> Tensor:
        """``(rows, in_features)`` float32: second derivatives of the divergence, each weight by itself."""
        own = self.sums[name]
        parts = [part.tile(start, stop, own.per_expert) for part in own.parts.values()]
        return torch.stack(parts).sum(0) / self.positions
