"""What the relaxation leaves open, solved by HiGHS as an integer program."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import optimize, sparse

from kbitc.planning.knapsack.problem import GAP, Floats, ItemGroups, total_bytes, total_cost
from kbitc.planning.knapsack.relaxation import Branch

NODES = 2_000  # of the solver's tree: a limit that does not depend on the machine's speed
INFEASIBLE = 2  # scipy's status


def smallest(groups: ItemGroups, kept: list[list[int]], shared: Mapping[str, int]) -> list[int]:
    """The choice of fewest bytes: with tables, not simply the smallest item of each group."""
    chosen = [own[0] for own in kept]
    problem = _IntegerProgram(groups, kept, shared)
    found = problem.solve(problem.nbytes, None)
    if found is None:
        return chosen
    return min(chosen, found.chosen, key=lambda choice: total_bytes(groups, choice, shared))


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
    problem = _IntegerProgram(groups, open_items, shared)
    found = first = problem.solve(problem.costs, room)
    # Bytes are whole, the solver's are not: a choice too large by a few is solved again with less room.
    margin = 0
    while found is not None and found.chosen and total_bytes(groups, found.chosen, shared) > room:
        margin += total_bytes(groups, found.chosen, shared) - room
        found = problem.solve(problem.costs, room - margin)
    if found is None or first is None:  # the solver gave up
        return Answer(best, bound, is_proved=False)
    return Answer(found.chosen or best, first.bound, first.is_proved and found is first)


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
        with _silent():
            found = optimize.milp(
                objective / scale,
                constraints=constraints,
                bounds=optimize.Bounds(0, 1),
                integrality=np.ones(len(objective)),
                options={"mip_rel_gap": GAP, "node_limit": NODES},
            )
        if found.status == INFEASIBLE:
            return Answer([], math.inf, is_proved=True)
        if found.x is None:
            return None
        chosen, column = [], 0
        for own in self.open_items:
            part = found.x[column : column + len(own)]
            chosen.append(own[int(np.argmax(part))])
            column += len(own)
        return Answer(chosen, scale * (found.mip_dual_bound or 0.0), is_proved=found.status == 0)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Standard output closed to HiGHS, which prints a line of its own now and then, past Python."""
    sys.stdout.flush()
    kept = os.dup(1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)
