"""Give every weight the spec that a plan names for it.

before:  stage CANONICAL, no plan
after:   stage PLANNED, plan = rules matched against the weights' names
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from kbitc.plan import Plan
from kbitc.program import Program, Stage


@dataclass(frozen=True)
class ApplyPlan:
    """Match a plan's keys, names or globs, against the program's weights.

    Attributes:
        rules: parsed plan file, or ``{"weights": {"*": "nf4:64"}}`` for a uniform spec.
        label: how errors call the plan.
    """

    rules: Mapping[str, object] = field(default_factory=dict)
    label: str = "plan"

    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.PLANNED

    def run(self, program: Program) -> Program:
        """Raises UsageError on a key that names no weight, and on a weight that no key names."""
        plan = Plan.from_json(self.rules, program.weights, label=self.label)
        return replace(program, plan=plan, stage=Stage.PLANNED)


PASS = ApplyPlan
