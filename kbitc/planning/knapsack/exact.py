"""What the relaxation leaves open, solved as an integer program.

The one thing to know: the solver works in floats within tolerances, so a choice is only believed once its
bytes are counted again as whole numbers; a bound is only a proof where the solver says that it finished.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import optimize, sparse

from kbitc.planning.knapsack.highs import INFEASIBLE, OPTIMAL, milp
from kbitc.planning.knapsack.problem import GAP, Floats, ItemGroups, total_bytes, total_cost
from kbitc.planning.knapsack.relaxation import Branch

# Of the solver's tree: a limit that does not depend on the machine's speed. SmolLM2-135M, 24476 options, one
# core of a Xeon: up to 4 bits it finishes before 100. Gap and seconds at 100, 500, 2000, 5000, 20000 nodes:
# at 4.25 bits 28e-6 2.0, 8.7e-6 5.8, 7.5e-6 7.1, 8.7e-6 10.0, 8.7e-6 10.4;
# at 5 bits 45e-5 1.5, 42e-5 2.0, 41e-5 4.3, 28e-5 7.5, 1e-5 16.4.
NODES = 2_000


def smallest(groups: ItemGroups, kept: list[list[int]], shared: Mapping[str, int]) -> list[int]:
    """The choice of fewest bytes: with tables, not simply the smallest item of each group."""
    chosen = [own[0] for own in kept]
    program = _IntegerProgram(groups, kept, shared)
    answer = program.solve(program.nbytes, None)
    if answer is None:
        return chosen
    return min(chosen, answer.chosen, key=lambda choice: total_bytes(groups, choice, shared))


@dataclass(frozen=True)
class Answer:
    """What the solver says: a choice, a bound on the cost of any, and whether it finished."""

    chosen: list[int]
    bound: float
    is_proved: bool


def branch_and_bound(
    groups: ItemGroups, branch: Branch, room: int, shared: Mapping[str, int], best: list[int]
) -> Answer:
    """HiGHS on the items of a branch that its relaxation does not rule out, ``best`` being known."""
    multiplier, bound = branch.multipliers[-1], branch.bound
    slack = total_cost(groups, best) - bound
    slack += 1e-9 * max(abs(bound), slack) + 1e-300
    open_items = []
    for items, own in zip(groups, branch.kept, strict=True):
        reduced = {i: items[i].cost + multiplier * items[i].nbytes for i in own}
        least = min(reduced.values())
        open_items.append([i for i in own if reduced[i] - least <= slack])
    if not all(open_items):
        return Answer(best, total_cost(groups, best), is_proved=True)
    program = _IntegerProgram(groups, open_items, shared)
    answer = first = program.solve(program.costs, room)
    # Bytes are whole, the solver's are not: a choice too large by a few is solved again with less room.
    margin = 0
    while answer is not None and answer.chosen and total_bytes(groups, answer.chosen, shared) > room:
        margin += total_bytes(groups, answer.chosen, shared) - room
        answer = program.solve(program.costs, room - margin)
    if answer is None or first is None:  # the solver gave up
        return Answer(best, bound, is_proved=False)
    return Answer(answer.chosen or best, first.bound, first.is_proved and answer is first)


class _IntegerProgram:
    """The choice as an integer program: a variable for each open item, and one for each table."""

    def __init__(self, groups: ItemGroups, open_items: list[list[int]], shared: Mapping[str, int]) -> None:
        self.open_items = open_items
        flat = [(g, i) for g, own in enumerate(open_items) for i in own]
        used = sorted({name for g, i in flat for name in groups[g][i].shared})
        tables = [name for name in used if shared[name] > 0]
        count = len(flat)
        self.costs = np.array([groups[g][i].cost for g, i in flat] + [0.0] * len(tables))
        self.nbytes = np.array(
            [groups[g][i].nbytes for g, i in flat] + [shared[n] for n in tables], dtype=float
        )
        rows, columns, values = [], [], []
        for column, (g, _) in enumerate(flat):
            rows.append(g)
            columns.append(column)
            values.append(1.0)
        self.one_each = sparse.csr_array(
            (values, (rows, columns)), shape=(len(open_items), count + len(tables))
        )
        # Items of one group that use a table, together at most as often as the table is there.
        entries: dict[tuple[int, int], list[int]] = {}
        for column, (g, i) in enumerate(flat):
            for name in groups[g][i].shared:
                if name in tables:
                    entries.setdefault((g, tables.index(name)), []).append(column)
        rows, columns, values = [], [], []
        for row, ((_, table), members) in enumerate(entries.items()):
            rows += [row] * (len(members) + 1)
            columns += [*members, count + table]
            values += [1.0] * len(members) + [-1.0]
        self.linked = sparse.csr_array((values, (rows, columns)), shape=(len(entries), count + len(tables)))

    def solve(self, objective: Floats, room: int | None) -> Answer | None:
        """Least ``objective``; None if the solver has nothing."""
        scale = float(np.abs(objective).max()) or 1.0
        constraints = [optimize.LinearConstraint(self.one_each, 1, 1)]
        if self.linked.shape[0]:
            constraints.append(optimize.LinearConstraint(self.linked, -np.inf, 0))
        if room is not None:
            unit = max(1.0, float(self.nbytes.max()))
            constraints.append(optimize.LinearConstraint(self.nbytes[None, :] / unit, -np.inf, room / unit))
        answer = milp(
            c=objective / scale,
            constraints=constraints,
            bounds=optimize.Bounds(0, 1),
            integrality=np.ones(len(objective)),
            options={"mip_rel_gap": GAP, "node_limit": NODES},
        )
        if answer.status == INFEASIBLE:
            return Answer([], math.inf, is_proved=True)
        if answer.x is None:
            return None
        chosen, column = [], 0
        for own in self.open_items:
            part = answer.x[column : column + len(own)]
            chosen.append(own[int(np.argmax(part))])
            column += len(own)
        return Answer(chosen, scale * (answer.bound or 0.0), is_proved=answer.status == OPTIMAL)
