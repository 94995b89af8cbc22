"""The solver: relaxation, branches, and the integer program of what is left.

Items may need shared tables (codebooks), each paid once however many items need it.

    minimise  sum cost   subject to   sum nbytes + sum of the tables in use <= room

The one thing to know: the Lagrangian relaxation gives a bound and, with a greedy choice from the convex
hulls, a gap so small that almost every item can be ruled out by its reduced cost; what is left goes to
HiGHS, and its answer is checked in whole bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import chain

from kbitc.planning.knapsack.exact import branch_and_bound, smallest
from kbitc.planning.knapsack.problem import (
    GAP,
    NO_TABLES,
    Infeasible,
    ItemGroups,
    Solution,
    best_of,
    check,
    total_bytes,
    total_cost,
    undominated,
)
from kbitc.planning.knapsack.relaxation import Branch, fill, greedy, lagrangian

# That are solved one by one. SmolLM2-135M, one core of a Xeon: 0, 1, 2, 6, 12 and 1000 give the plans of 3,
# free at 3, 3.5, 4, 4.25 and 5 bits (24 to 28 s) and with weights that agree at 13 budgets (27 to 33 s).
BRANCHES = 3


def solve(groups: ItemGroups, room: int, shared: Mapping[str, int] = NO_TABLES) -> Solution:
    """The choice of least cost that fits; of equal costs the smaller one, then lower indices.

    Args:
        groups: their items, at least one each.
        room: bytes for the items and their shared tables.
        shared: bytes of each shared table.

    Raises:
        Infeasible: nothing fits.
        ValueError: an empty group, a negative or infinite number, or an unknown table.
    """
    check(groups, shared)
    kept = [undominated(items) for items in groups]
    start = [own[0] for own in kept]
    if total_bytes(groups, start, shared) > room:
        start = smallest(groups, kept, shared)
    if total_bytes(groups, start, shared) > room:
        raise Infeasible(total_bytes(groups, start, shared), room)
    chosen, bound, relaxed = start, math.inf, math.inf
    is_proved = True
    # The bound of the whole relaxation, with each branch's item in place, rules most branches out unseen; if
    # it is too weak for that, as it is with few groups, the solver does better with all the rest at once.
    left = _branches(groups, kept, room)
    at_once = 1
    while left:
        own = _together(own for own, _ in left[:at_once])
        branch = Branch(own, *lagrangian(groups, own, room))
        chosen = _improved(groups, branch, room, shared, chosen)
        exact = branch_and_bound(groups, branch, room, shared, chosen)
        chosen = best_of(groups, shared, room, chosen, exact.chosen)
        relaxed = min(relaxed, branch.bound)
        bound = min(bound, exact.bound)
        is_proved = is_proved and exact.is_proved
        limit = total_cost(groups, chosen) * (1 + GAP)
        left = [(own, least) for own, least in left[at_once:] if least <= limit]
        if len(left) > BRANCHES:  # each relaxed by itself has a better bound
            left = [(own, least) for own, _ in left if (least := lagrangian(groups, own, room)[1]) <= limit]
        at_once = 1 if len(left) <= BRANCHES else len(left)
    fill(groups, kept, chosen, room, shared)
    cost = total_cost(groups, chosen)
    return Solution(
        tuple(chosen),
        cost,
        total_bytes(groups, chosen, shared),
        min(relaxed, cost),
        min(bound, cost),
        is_proved,
    )


def _improved(
    groups: ItemGroups, branch: Branch, room: int, shared: Mapping[str, int], chosen: list[int]
) -> list[int]:
    """The choice, or a better one of a branch that its multipliers lead to."""
    tried = (greedy(groups, branch.kept, room, shared, m, chosen) for m in branch.multipliers)
    return best_of(groups, shared, room, chosen, *tried)


def _branches(groups: ItemGroups, kept: list[list[int]], room: int) -> list[tuple[list[list[int]], float]]:
    """One for each item of the group whose sizes differ most, and a bound of it, least bound first.

    The embedding of a small model is a fifth of it: what the relaxation gains by mixing two of its items is
    what makes its bound weak. All other groups are small beside the room.
    """

    def width(g: int) -> int:
        return groups[g][kept[g][-1]].nbytes - groups[g][kept[g][0]].nbytes

    widest = max(range(len(groups)), key=width)
    multipliers, whole = lagrangian(groups, kept, room)
    multiplier = multipliers[-1]

    def priced(i: int) -> float:
        item = groups[widest][i]
        return item.cost + multiplier * item.nbytes

    rest = whole - min(map(priced, kept[widest]))
    least = sum(items[own[0]].nbytes for items, own in zip(groups, kept, strict=True))
    left = room - least + groups[widest][kept[widest][0]].nbytes
    branches = [
        ([*kept[:widest], [i], *kept[widest + 1 :]], rest + priced(i))
        for i in kept[widest]
        if groups[widest][i].nbytes <= left
    ]
    return sorted(branches, key=lambda branch: branch[1])


def _together(branches: Iterable[list[list[int]]]) -> list[list[int]]:
    """Items that are in any of the branches."""
    return [sorted(set(chain(*own))) for own in zip(*branches, strict=True)]
