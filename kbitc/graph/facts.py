"""`Fact`: a typed key for what passes find out and leave for each other in a program.

The one thing to know: a fact is named by one constant that stands beside the type of its value
(``MOMENTS: Fact[Mapping[str, Moments]] = Fact("moments")``), so that no name is written twice and no value is
cast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Fact(Generic[T]):
    """The key of one fact; ``program.get(FACT)`` reads it, ``program.with_fact(FACT, value)`` adds it.

    Attributes:
        name: as texts, drawings and errors call it.
    """

    name: str

    def __str__(self) -> str:
        return self.name
