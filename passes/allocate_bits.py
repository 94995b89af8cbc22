"""Choose a spec for every weight under a bit budget: the exact optimum of the score table.

before:  stage CANONICAL, fact "scores", no plan; a budget of B bits per parameter of the whole model
after:   stage PLANNED, sum of stored bytes <= B * parameters / 8; fact "allocation": `knapsack.Solution`

One option a weight, least sum of costs, within the bytes: a multiple-choice knapsack, solved exactly
(`kbitc.knapsack`), shared codebooks counted once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import ClassVar, cast

from kbitc import datatypes, knapsack
from kbitc.blockwise import dynamic_map, shared_codebook
from kbitc.errors import BudgetError, UsageError, did_you_mean
from kbitc.knapsack import Infeasible, Item, Solution
from kbitc.passes import score_sensitivity
from kbitc.plan import Choice, Plan
from kbitc.program import Program, Stage
from kbitc.scores import Option, Scores
from kbitc.spec import Spec

FACT = "allocation"


@dataclass(frozen=True)
class AllocateBits:
    """Spends a budget where the score table says that it helps most.

    Attributes:
        budget: stored bits per parameter that the whole model must not exceed.
        agree: kind of weights that get one spec: "input" for those that read one value (queries, keys and
            values; gate and up), "role" for those that stand at one place of every layer; "" for none.
    """

    budget: float = 4.0
    agree: str = ""

    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.PLANNED
    requires: ClassVar[tuple[str, ...]] = (score_sensitivity.FACT,)
    provides: ClassVar[tuple[str, ...]] = (FACT,)

    def run(self, program: Program) -> Program:
        """Raises BudgetError when not even the smallest options fit; UsageError for an unknown ``agree``."""
        scores = cast("Scores", program.facts[score_sensitivity.FACT])
        plan, solution = allocate(scores, self.budget, self.agree)
        return replace(program, plan=plan, stage=Stage.PLANNED).with_fact(FACT, solution)


def allocate(scores: Scores, budget: float, agree: str = "") -> tuple[Plan, Solution]:
    """The best plan of at most ``budget`` bits per parameter, and how good it is known to be.

    Args:
        scores: options of every weight.
        budget: stored bits per parameter of the whole model.
        agree: kind of weights that get one spec, see `AllocateBits`.

    Raises:
        BudgetError: the smallest options are too large.
        UsageError: no such kind of groups.
    """
    room = int(budget * scores.parameters / 8) - scores.fixed
    specs = {option.spec for found in scores.options.values() for option in found}
    names = {spec: tuple(_codebooks(spec)) for spec in specs}
    sizes = {name: size for spec in names for name, size in _codebooks(spec).items()}
    groups = [
        [Item(o.nbytes, o.cost, names[o.spec], key=str(o.spec)) for o in found]
        for found in scores.options.values()
    ]
    merged, members = knapsack.agree(groups, _together(scores, agree))
    try:
        solution = knapsack.solve(merged, room, sizes)
    except Infeasible as error:
        least = 8 * (error.nbytes + scores.fixed) / scores.parameters
        raise BudgetError(
            f"--bits {budget:g} cannot be met: the smallest plan for this model takes {least:.4f} bits per "
            f"parameter ({scores.fixed / 1e6:.2f} MB of it are tensors that stay at 16 bits). Ask for "
            f"--bits {_round_up(least)} or more"
        ) from error
    spec_of = {
        i: merged[group][index].key for group, index in enumerate(solution.chosen) for i in members[group]
    }
    choices = {
        name: _choice(next(option for option in found if str(option.spec) == spec_of[i]), scores, name)
        for i, (name, found) in enumerate(scores.options.items())
    }
    return Plan(choices, budget), solution


def _together(scores: Scores, kind: str) -> list[list[int]]:
    """Indices of the weights of each group that must agree."""
    if not kind:
        return []
    if kind not in scores.groups:
        raise UsageError(did_you_mean("kind of weights that agree", kind, scores.groups))
    order = {name: i for i, name in enumerate(scores.options)}
    return [[order[name] for name in names] for names in scores.groups[kind]]


def _choice(option: Option, scores: Scores, name: str) -> Choice:
    bits = option.nbytes * 8 / scores.numel[name]
    cost = (
        f"{option.cost:.2g} nats" if scores.unit == "nats per token" else f"relative error {option.error:.4f}"
    )
    return Choice(option.spec, reason=f"least total loss: {bits:.3f} bits, {cost}", error=option.error)


@functools.cache
def _codebooks(spec: Spec) -> dict[str, int]:
    """Bytes of the shared codebooks that a spec needs, by name."""
    if spec.is_left_alone:
        return {}
    needed = {"scales": dynamic_map().nbytes} if spec.has_double_quant else {}
    if not datatypes.FAMILIES[spec.family].is_fitted:
        needed[spec.codebook_name] = shared_codebook(spec).nbytes
    return needed


def _round_up(bits: float) -> str:
    return f"{-(-bits * 100 // 1) / 100:.2f}"


PASS = AllocateBits
