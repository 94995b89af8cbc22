"""Paired bootstrap over windows: how sure a difference of two models is, scored on the same text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences, and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Of lower-is-better figures: "lower", "higher", or "even" where the interval holds 0."""
        if self.high < 0:
            return "lower"
        return "higher" if self.low > 0 else "even"

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def paired(
    ours: Sequence[float], theirs: Sequence[float], *, draws: int = DRAWS, seed: int = 0
) -> Difference:
    """Ours minus theirs.

    Args:
        ours: one figure a window.
        theirs: of the same windows, in the same order.
        draws: resamples of the windows, with replacement.
        seed: of the draws.

    Raises:
        ValueError: not of the same windows, or none.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} and {len(theirs)} windows cannot be paired")
    differences = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    rows = np.random.default_rng(seed).integers(0, len(differences), (draws, len(differences)))
    low, high = np.quantile(differences[rows].mean(1), (0.025, 0.975))
    return Difference(float(differences.mean()), float(low), float(high))
