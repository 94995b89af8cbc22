"""`Evidence`: what is known of one weight when it is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

from torch import Tensor

from kbitc.formats.spec import Spec
from kbitc.graph.facts import Fact
from kbitc.graph.program import Program
from kbitc.sensitivity.outliers import OUTLIERS

T = TypeVar("T")


@dataclass(frozen=True)
class Evidence:
    """What a program's facts say of one weight.

    Attributes:
        name: how errors call the weight.
        outliers: sorted input features to keep at 16 bits; None leaves the choice to the packer.
        facts: of this weight alone, by the fact that has them of every weight.
    """

    name: str = "weight"
    outliers: Tensor | None = None
    facts: Mapping[Fact[Any], object] = field(default_factory=dict)

    @staticmethod
    def of(program: Program, name: str, spec: Spec) -> Evidence:
        """What a program knows of a weight that is to be quantized under ``spec``."""
        facts = {
            fact: known[name]
            for fact, known in program.facts.items()
            if isinstance(known, Mapping) and name in known
        }
        features = (program.get(OUTLIERS) or {}).get(name)
        return Evidence(name, None if features is None else features.picked(spec), facts)

    def with_facts(self, facts: Mapping[Fact[Any], object]) -> Evidence:
        """A copy that knows more."""
        return replace(self, facts={**self.facts, **facts})

    def get(self, fact: Fact[Mapping[str, T]]) -> T | None:
        """What is known of the weight; None if nothing."""
        return cast("T | None", self.facts.get(fact))
