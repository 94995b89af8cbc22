"""Adam (1412.6980) on a dictionary of tensors, each a change relative to what it tunes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from kbitc.training.classroom import Key

FAST, SLOW = 0.9, 0.98
"""Of the running means of gradients and of their squares: a run is of a hundred steps or so."""


@dataclass
class Adam:
    """Steps of one size for all; what no gradient comes to is not moved."""

    is_shared: bool = False
    counts: dict[Key, int] = field(default_factory=dict)
    means: dict[Key, Tensor] = field(default_factory=dict)
    squares: dict[Key, Tensor] = field(default_factory=dict)

    def step(
        self, values: Mapping[Key, Tensor], gradients: Mapping[Key, Tensor], rates: Mapping[str, float]
    ) -> dict[Key, Tensor]:
        """The values after one step of ``rates[what]``."""
        return {
            key: self._moved(key, value, gradients[key], rates[key[1]]) if key in gradients else value
            for key, value in values.items()
        }

    def _moved(self, key: Key, value: Tensor, grad: Tensor, rate: float) -> Tensor:
        square = grad.square()
        if self.is_shared:
            square = square.mean().expand(grad.shape)
        if key not in self.means:
            self.means[key], self.squares[key] = grad * (1 - FAST), square * (1 - SLOW)
        else:
            self.means[key] = self.means[key] * FAST + grad * (1 - FAST)
            self.squares[key] = self.squares[key] * SLOW + square * (1 - SLOW)
        count = self.counts[key] = self.counts.get(key, 0) + 1
        mean = self.means[key] / (1 - FAST**count)
        width = (self.squares[key] / (1 - SLOW**count)).sqrt()
        return value - rate * mean / (width + 1e-30)


def cosine(step: int, steps: int, warm: int) -> float:
    """The share of the full rate at one of ``steps`` steps: a line up, half a cosine down."""
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
