"""Give every weight the spec that a plan names for it.

before:  stage CANONICAL, no plan; fact "outliers" if a spec says +out
after:   stage PLANNED, plan = rules matched against the weights' names, +out as the share that was found
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from kbitc.errors import UsageError
from kbitc.graph.plan import Choice, Plan
from kbitc.graph.program import Program, Stage
from kbitc.planning.packable import check_packable
from kbitc.sensitivity.outliers import OUTLIERS


@dataclass(frozen=True)
class ApplyPlan:
    """Match a plan's keys, names or globs, against the program's weights.

    Attributes:
        rules: parsed plan file, or ``{"weights": {"*": "nf4:64"}}`` for a uniform spec.
        label: how errors call the plan.
        quantizer: of every weight, whatever the plan says; "" leaves it to the plan.
    """

    rules: Mapping[str, object] = field(default_factory=dict)
    label: str = "plan"
    quantizer: str = ""

    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.PLANNED

    def run(self, program: Program) -> Program:
        """Raises UsageError on a key that names no weight, a weight without a key, or no weight at all."""
        check_packable(program)
        plan = Plan.from_json(self.rules, program.weights, label=self.label)
        chosen = {
            name: replace(_resolved(program, name, choice), quantizer=self.quantizer or choice.quantizer)
            for name, choice in plan.weights.items()
        }
        plan = replace(plan, weights=chosen)
        return replace(program, plan=plan, stage=Stage.PLANNED)


def _resolved(program: Program, name: str, choice: Choice) -> Choice:
    if not choice.keeps_outliers:
        return choice
    features = (program.get(OUTLIERS) or {}).get(name)
    if features is None:
        raise UsageError(
            f"{name}: {choice.spec}+out needs the outlier features; run the pass 'find_outliers' first"
        )
    reason = f"{choice.reason}; {features.reason}"
    return replace(choice, spec=features.kept_under(choice.spec), reason=reason, keeps_outliers=False)


PASS = ApplyPlan
