"""What verifying an exported folder compares."""

from __future__ import annotations

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
