"""Choose a spec for every weight under a bit budget: the exact optimum of the score table.

before:  stage CANONICAL, fact "scores", no plan; a budget of B bits per parameter of the whole model
after:   stage PLANNED, sum of stored bytes <= B * parameters / 8; fact "allocation": `knapsack.Solution`

One option a weight, least sum of costs, within the bytes: a multiple-choice knapsack, solved exactly
(`kbitc.planning.knapsack`), shared codebooks counted once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from kbitc.errors import UsageError
from kbitc.graph.facts import Fact
from kbitc.graph.program import Program, Stage
from kbitc.planning.allocation import ALLOCATION, DEFAULT_BUDGET, allocate
from kbitc.sensitivity.score_table import SCORES


@dataclass(frozen=True)
class AllocateBits:
    """Spends a budget where the score table says that it helps most.

    Attributes:
        budget: stored bits per parameter that the whole model must not exceed.
        agree: kind of weights that get one spec: "input" for those that read one value (queries, keys and
            values; gate and up), "role" for those that stand at one place of every layer; "" for none.
        quantizer: that the plan names for every weight; "" for the strongest one that there is evidence for.
    """

    budget: float = DEFAULT_BUDGET
    agree: str = ""
    quantizer: str = ""

    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.PLANNED
    requires: ClassVar[tuple[Fact[Any], ...]] = (SCORES,)
    provides: ClassVar[tuple[Fact[Any], ...]] = (ALLOCATION,)

    def run(self, program: Program) -> Program:
        """Raises BudgetError where not even the smallest options fit; UsageError for a wrong ``agree``."""
        if program.untraced and self.agree == "input":
            raise UsageError(
                "--agree input: weights that read one value are found in the model's graph, and torch.export "
                f"cannot trace this model ({program.untraced}); use --agree role, or leave it out"
            )
        plan, solution = allocate(program.known(SCORES), self.budget, self.agree, self.quantizer)
        return replace(program, plan=plan, stage=Stage.PLANNED).with_fact(ALLOCATION, solution)


PASS = AllocateBits
