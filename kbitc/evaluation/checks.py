"""What verifying an exported folder compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One thing that was compared.

    Attributes:
        name: what.
        value: what was found.
        limit: what is allowed at most.
    """

    name: str
    value: float
    limit: float

    @property
    def is_passed(self) -> bool:
        """False for NaN too."""
        return self.value <= self.limit


def differing(first: Sequence[int], second: Sequence[int]) -> int:
    """Places at which two sequences of tokens differ; those that only the longer one has count."""
    return sum(a != b for a, b in zip(first, second, strict=False)) + abs(len(first) - len(second))
