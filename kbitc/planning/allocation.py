"""A score table and a budget to a plan."""

from __future__ import annotations

from kbitc.errors import BudgetError, UsageError, did_you_mean
from kbitc.formats.layout import shared_bytes
from kbitc.graph.facts import Fact
from kbitc.graph.plan import Choice, Plan
from kbitc.planning.knapsack import Infeasible, Item, Solution, agreed, solve
from kbitc.sensitivity.score_table import Option, ScoreTable

DEFAULT_BUDGET = 4.0
"""Stored bits per parameter, where nothing is said."""

MIN_BUDGET, MAX_BUDGET = 2.0, 8.0

ALLOCATION: Fact[Solution] = Fact("allocation")
"""How good the plan of a budget is known to be."""


def check_budget(bits: float) -> None:
    """Raises UsageError for a budget that no request may have."""
    if not MIN_BUDGET <= bits <= MAX_BUDGET:
        raise UsageError(
            f"--bits {bits:g}: the budget must be between {MIN_BUDGET:g} and {MAX_BUDGET:g} "
            "stored bits per parameter"
        )


def allocate(
    scores: ScoreTable, budget: float, agree: str = "", quantizer: str = ""
) -> tuple[Plan, Solution]:
    """The best plan of at most ``budget`` bits per parameter, and how good it is known to be.

    Args:
        scores: options of every weight.
        budget: stored bits per parameter of the whole model.
        agree: kind of weights that get one spec, see `kbitc.passes.allocate_bits.AllocateBits`.
        quantizer: that the plan names.

    Raises:
        BudgetError: the smallest options are too large.
        UsageError: no such kind of groups.
    """
    room = int(budget * scores.parameters / 8) - scores.fixed
    specs = {option.spec for options in scores.options.values() for option in options}
    # Another program's file has its codebooks, if any, among each weight's own bytes.
    is_own = not scores.target
    tables = {spec: shared_bytes(spec) if is_own and not spec.is_left_alone else {} for spec in specs}
    names = {spec: tuple(shared) for spec, shared in tables.items()}
    sizes = {name: size for shared in tables.values() for name, size in shared.items()}
    groups = [
        [Item(o.nbytes, o.cost, names[o.spec], key=str(o.spec)) for o in options]
        for options in scores.options.values()
    ]
    merged, members = agreed(groups, _together(scores, agree))
    try:
        solution = solve(merged, room, sizes)
    except Infeasible as error:
        raise BudgetError(_out_of_reach(scores, budget, error.nbytes)) from error
    spec_of = {
        i: merged[group][index].key for group, index in enumerate(solution.chosen) for i in members[group]
    }
    choices = {
        name: _choice(next(o for o in options if str(o.spec) == spec_of[i]), scores, name, quantizer)
        for i, (name, options) in enumerate(scores.options.items())
    }
    return Plan(choices, budget), solution


def _out_of_reach(scores: ScoreTable, budget: float, smallest: int) -> str:
    """What to say of a budget that not even the smallest options, of so many bytes, keep to."""
    least = 8 * (smallest + scores.fixed) / scores.parameters
    packable = sum(scores.numel.values())
    rest = (
        f"{scores.fixed / 1e6:.2f} MB of it are tensors that stay unpacked, with "
        f"{100 * (1 - packable / scores.parameters):.3g} % of the parameters"
    )
    takes = f"the smallest plan for this model takes {least:.4f} bits per parameter ({rest})"
    if least <= MAX_BUDGET:
        return f"--bits {budget:g} cannot be met: {takes}. Ask for --bits {_round_up(least)} or more"
    return (
        f"--bits {budget:g} cannot be met, nor can any other budget, which end at {MAX_BUDGET:g}: {takes}. "
        "'kbitc inspect' says why they do; --spec, without a budget, packs what can be packed"
    )


def _together(scores: ScoreTable, kind: str) -> list[list[int]]:
    """Indices of the weights of each group that must agree."""
    if not kind:
        return []
    if kind not in scores.groups:
        raise UsageError(did_you_mean("kind of weights that agree", kind, scores.groups))
    order = {name: i for i, name in enumerate(scores.options)}
    return [[order[name] for name in names] for names in scores.groups[kind]]


def _choice(option: Option, scores: ScoreTable, name: str, quantizer: str) -> Choice:
    bits = option.nbytes * 8 / scores.numel[name]
    cost = (
        f"{option.cost:.2g} nats" if scores.unit == "nats per token" else f"relative error {option.error:.4f}"
    )
    reason = f"least total loss: {bits:.3f} bits, {cost}"
    return Choice(option.spec, reason, error=option.error, quantizer=quantizer)


def _round_up(bits: float) -> str:
    return f"{-(-bits * 100 // 1) / 100:.2f}"
