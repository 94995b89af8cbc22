"""Multiple-choice knapsack, solved exactly: one item of each group, least cost, within a number of bytes.

Items may need shared tables (codebooks), each paid once however many items need it.

    minimise  sum cost   subject to   sum nbytes + sum of the tables in use <= room

The one thing to know: the Lagrangian relaxation gives a bound and, with a greedy choice from the convex
hulls, a gap so small that almost every item can be ruled out by its reduced cost; what is left goes to
HiGHS, and its answer is checked in whole bytes.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse

Floats = NDArray[np.float64]
NO_TABLES: Mapping[str, int] = MappingProxyType({})
GAP = 1e-5  # relative, at which the solver may stop
NODES = 2_000  # of the solver's tree: a limit that does not depend on the machine's speed
INFEASIBLE = 2  # scipy's status
BRANCHES = 3  # that are solved one by one
ROUNDS = 60  # bisections of the multiplier


class Infeasible(ValueError):
    """Even the smallest choice is larger than the room.

    Attributes:
        nbytes: of the smallest choice, shared tables included.
    """

    def __init__(self, nbytes: int, room: int) -> None:
        super().__init__(f"the smallest choice takes {nbytes} bytes, and there is room for {room}")
        self.nbytes = nbytes


@dataclass(frozen=True)
class Item:
    """One way to fill a group.

    Attributes:
        nbytes: its own size.
        cost: finite, not negative, in any unit.
        shared: names of the shared tables that it needs.
        key: what it is called in every group that offers the same, for :func:`agree`.
    """

    nbytes: int
    cost: float
    shared: tuple[str, ...] = ()
    key: Hashable = None


@dataclass(frozen=True)
class Solution:
    """One item of each group.

    Attributes:
        chosen: index of the item, by group.
        cost: sum over the groups.
        nbytes: sum over the groups, and of the shared tables that the items need.
        lagrangian: no choice that fits costs less, even if tables were free.
        bound: the same, as the solver proved it.
        is_proved: the solver finished: no choice is better by more than ``GAP`` of it.
    """

    chosen: tuple[int, ...]
    cost: float
    nbytes: int
    lagrangian: float
    bound: float
    is_proved: bool

    @property
    def gap(self) -> float:
        """How far the cost lies above the best bound, as a share of it."""
        best = max(self.lagrangian, self.bound)
        return (self.cost - best) / self.cost if self.cost > 0 else 0.0


Groups = Sequence[Sequence[Item]]


def solve(groups: Groups, room: int, shared: Mapping[str, int] = NO_TABLES) -> Solution:
    """The choice of least cost that fits; of equal costs the smaller one, then lower indices.

    Args:
        groups: their items, at least one each.
        room: bytes for the items and their shared tables.
        shared: bytes of each shared table.

    Raises:
        Infeasible: nothing fits.
        ValueError: an empty group, a negative or infinite number, or an unknown table.
    """
    _check(groups, shared)
    kept = [_undominated(items) for items in groups]
    start = [own[0] for own in kept]
    if _size(groups, start, shared) > room:
        start = _smallest(groups, kept, shared)
    if _size(groups, start, shared) > room:
        raise Infeasible(_size(groups, start, shared), room)
    chosen, bound, lagrangian = start, math.inf, math.inf
    is_proved = True
    # The bound of the whole relaxation, with each branch's item in place, rules most branches out unseen; if
    # it is too weak for that, as it is with few groups, the solver does better with all the rest at once.
    left = _branches(groups, kept, room)
    at_once = 1
    while left:
        own = _together(own for own, _ in left[:at_once])
        branch = _Branch(own, *_lagrangian(groups, own, room))
        chosen = _improved(groups, branch, room, shared, chosen)
        exact = _branch_and_bound(groups, branch, room, shared, chosen)
        chosen = _better(groups, shared, room, chosen, exact.chosen)
        lagrangian = min(lagrangian, branch.bound)
        bound = min(bound, exact.bound)
        is_proved = is_proved and exact.is_proved
        limit = _cost(groups, chosen) * (1 + GAP)
        left = [(own, least) for own, least in left[at_once:] if least <= limit]
        if len(left) > BRANCHES:  # each relaxed by itself has a better bound
            left = [(own, least) for own, _ in left if (least := _lagrangian(groups, own, room)[1]) <= limit]
        at_once = 1 if len(left) <= BRANCHES else len(left)
    _fill(groups, kept, chosen, room, shared)
    cost = _cost(groups, chosen)
    return Solution(
        tuple(chosen),
        cost,
        _size(groups, chosen, shared),
        min(lagrangian, cost),
        min(bound, cost),
        is_proved,
    )


@dataclass(frozen=True)
class _Branch:
    """The choices that have one item of the widest group.

    Attributes:
        kept: items of each group, one of the widest.
        multipliers: of the relaxation; the last one gives the bound.
        bound: no choice of these costs less.
    """

    kept: list[list[int]]
    multipliers: list[float]
    bound: float


def _improved(
    groups: Groups, branch: _Branch, room: int, shared: Mapping[str, int], chosen: list[int]
) -> list[int]:
    """The choice, or a better one of a branch that its multipliers lead to."""
    tried = (_greedy(groups, branch.kept, room, shared, m, chosen) for m in branch.multipliers)
    return _better(groups, shared, room, chosen, *tried)


def _branches(groups: Groups, kept: list[list[int]], room: int) -> list[tuple[list[list[int]], float]]:
    """One for each item of the group whose sizes differ most, and a bound of it, least bound first.

    The embedding of a small model is a fifth of it: what the relaxation gains by mixing two of its items is
    what makes its bound weak. All other groups are small beside the room.
    """

    def width(g: int) -> int:
        return groups[g][kept[g][-1]].nbytes - groups[g][kept[g][0]].nbytes

    widest = max(range(len(groups)), key=width)
    multipliers, whole = _lagrangian(groups, kept, room)
    multiplier = multipliers[-1]

    def priced(i: int) -> float:
        item = groups[widest][i]
        return item.cost + multiplier * item.nbytes

    rest = whole - min(map(priced, kept[widest]))
    least = sum(items[own[0]].nbytes for items, own in zip(groups, kept, strict=True))
    left = room - least + groups[widest][kept[widest][0]].nbytes
    found = [
        ([*kept[:widest], [i], *kept[widest + 1 :]], rest + priced(i))
        for i in kept[widest]
        if groups[widest][i].nbytes <= left
    ]
    return sorted(found, key=lambda branch: branch[1])


def _together(branches: Iterable[list[list[int]]]) -> list[list[int]]:
    """Items that are in any of the branches."""
    return [sorted(set(chain(*own))) for own in zip(*branches, strict=True)]


def agree(groups: Groups, together: Sequence[Sequence[int]]) -> tuple[list[list[Item]], list[list[int]]]:
    """Groups that must choose items of equal key, as one group each.

    Args:
        groups: their items' keys are distinct within a group.
        together: indices of groups that must agree; every other group stands for itself.

    Returns:
        The merged groups, and the indices of the groups that each stands for. Expand a solution with
        the key of the chosen item.

    Raises:
        ValueError: groups with no key in common, or a group that is named twice.
    """
    named = [index for members in together for index in members]
    if len(set(named)) != len(named):
        raise ValueError("a group can agree with one set of others only")
    members = [list(each) for each in together] + [[i] for i in range(len(groups)) if i not in set(named)]
    members.sort(key=min)
    return [_merged([groups[i] for i in each]) for each in members], members


def _merged(groups: Groups) -> list[Item]:
    by_key = [{item.key: item for item in items} for items in groups]
    common = [item.key for item in groups[0] if all(item.key in own for own in by_key)]
    if not common:
        raise ValueError("groups that must agree have no item in common")
    return [
        Item(
            sum(own[key].nbytes for own in by_key),
            math.fsum(own[key].cost for own in by_key),
            tuple(sorted({name for own in by_key for name in own[key].shared})),
            key,
        )
        for key in common
    ]


def _check(groups: Groups, shared: Mapping[str, int]) -> None:
    for items in groups:
        if not items:
            raise ValueError("a group without items has no solution")
        for item in items:
            if item.nbytes < 0 or not 0.0 <= item.cost < math.inf:
                raise ValueError(f"{item}: bytes and cost must be finite and not negative")
            if any(name not in shared for name in item.shared):
                raise ValueError(f"{item}: needs a table whose size is not given")


def _undominated(items: Sequence[Item]) -> list[int]:
    """Indices of the items that no other one beats in bytes, cost and tables alike, smallest first."""
    order = sorted(range(len(items)), key=lambda i: (items[i].nbytes, items[i].cost, len(items[i].shared), i))
    kept: list[int] = []
    for i in order:
        tables = set(items[i].shared)
        if not any(items[k].cost <= items[i].cost and tables.issuperset(items[k].shared) for k in kept):
            kept.append(i)
    return kept


def _size(groups: Groups, chosen: Sequence[int], shared: Mapping[str, int]) -> int:
    picked = [items[i] for items, i in zip(groups, chosen, strict=True)]
    tables = {name for item in picked for name in item.shared}
    return sum(item.nbytes for item in picked) + sum(shared[name] for name in tables)


def _cost(groups: Groups, chosen: Sequence[int]) -> float:
    return math.fsum(items[i].cost for items, i in zip(groups, chosen, strict=True))


def _smallest(groups: Groups, kept: list[list[int]], shared: Mapping[str, int]) -> list[int]:
    """The choice of fewest bytes: with tables, not simply the smallest item of each group."""
    chosen = [own[0] for own in kept]
    problem = _Program(groups, kept, shared)
    found = problem.solve(problem.nbytes, None)
    if found is None:
        return chosen
    return min(chosen, found.chosen, key=lambda choice: _size(groups, choice, shared))


def _lagrangian(groups: Groups, kept: list[list[int]], room: int) -> tuple[list[float], float]:
    """Multipliers (the last one gives the best bound) and the bound, tables not counted."""
    pairs = [items[i] for items, own in zip(groups, kept, strict=True) for i in own]
    costs = np.array([item.cost for item in pairs])
    sizes = np.array([item.nbytes for item in pairs], dtype=float)
    counts = np.array([len(own) for own in kept])
    starts = np.cumsum(counts) - counts

    def relaxed(multiplier: float) -> tuple[float, float]:
        values = costs + multiplier * sizes
        least = np.minimum.reduceat(values, starts)
        # Of equal ones the first, which is the smallest.
        size = np.minimum.reduceat(np.where(values == np.repeat(least, counts), sizes, np.inf), starts).sum()
        return float(least.sum() - multiplier * room), float(size)

    bound, size = relaxed(0.0)
    if size <= room:
        return [0.0], bound
    high = 1e-18
    while relaxed(high)[1] > room:
        high *= 4
        if high > 1e30:
            break
    low, best = 0.0, 0.0
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        value, size = relaxed(middle)
        if value > bound:
            bound, best = value, middle
        low, high = (middle, high) if size > room else (low, middle)
    return [high, best], bound


def _greedy(
    groups: Groups,
    kept: list[list[int]],
    room: int,
    shared: Mapping[str, int],
    multiplier: float,
    start: list[int],
) -> list[int]:
    """The relaxation's own choice, shrunk until it fits, then filled."""
    chosen = []
    for items, own in zip(groups, kept, strict=True):
        priced = ((items[i].cost + multiplier * items[i].nbytes, items[i].nbytes, i) for i in own)
        chosen.append(min(priced)[2])
    while _size(groups, chosen, shared) > room:
        moves = [
            ((items[i].cost - items[chosen[g]].cost) / (items[chosen[g]].nbytes - items[i].nbytes), g, i)
            for g, (items, own) in enumerate(zip(groups, kept, strict=True))
            for i in own
            if items[i].nbytes < items[chosen[g]].nbytes
        ]
        if not moves:
            return list(start)
        _, g, i = min(moves)
        chosen[g] = i
    _fill(groups, kept, chosen, room, shared)
    return chosen


def _fill(
    groups: Groups, kept: list[list[int]], chosen: list[int], room: int, shared: Mapping[str, int]
) -> None:
    """Take single changes that lower the cost and still fit, the largest gain first, until none is left."""
    size = _size(groups, chosen, shared)
    while True:
        left = room - size
        gains = sorted(
            (items[i].cost - items[chosen[g]].cost, items[i].nbytes, g, i)
            for g, (items, own) in enumerate(zip(groups, kept, strict=True))
            for i in own
            if items[i].cost < items[chosen[g]].cost and items[i].nbytes - items[chosen[g]].nbytes <= left
        )
        for _, _, g, i in gains:
            tried = [*chosen[:g], i, *chosen[g + 1 :]]
            if _size(groups, tried, shared) <= room:
                chosen[:] = tried
                size = _size(groups, chosen, shared)
                break
        else:
            return


def _better(groups: Groups, shared: Mapping[str, int], room: int, *choices: list[int]) -> list[int]:
    fitting = [c for c in choices if _size(groups, c, shared) <= room]
    return min(fitting, key=lambda c: (_cost(groups, c), _size(groups, c, shared), c))


@dataclass(frozen=True)
class _Found:
    """What the solver says: a choice, a bound on the cost of any, and whether it finished."""

    chosen: list[int]
    bound: float
    is_proved: bool


def _branch_and_bound(
    groups: Groups, branch: _Branch, room: int, shared: Mapping[str, int], best: list[int]
) -> _Found:
    """HiGHS on the items of a branch that its relaxation does not rule out, ``best`` being known."""
    multiplier, bound = branch.multipliers[-1], branch.bound
    slack = _cost(groups, best) - bound
    slack += 1e-9 * max(abs(bound), slack) + 1e-300
    open_items = []
    for items, own in zip(groups, branch.kept, strict=True):
        reduced = {i: items[i].cost + multiplier * items[i].nbytes for i in own}
        least = min(reduced.values())
        open_items.append([i for i in own if reduced[i] - least <= slack])
    if not all(open_items):
        return _Found(best, _cost(groups, best), is_proved=True)
    problem = _Program(groups, open_items, shared)
    found = first = problem.solve(problem.costs, room)
    # Bytes are whole, the solver's are not: a choice too large by a few is solved again with less room.
    margin = 0
    while found is not None and found.chosen and _size(groups, found.chosen, shared) > room:
        margin += _size(groups, found.chosen, shared) - room
        found = problem.solve(problem.costs, room - margin)
    if found is None or first is None:  # the solver gave up
        return _Found(best, bound, is_proved=False)
    return _Found(found.chosen or best, first.bound, first.is_proved and found is first)


class _Program:
    """The choice as an integer program: a variable for each open item, and one for each table."""

    def __init__(self, groups: Groups, open_items: list[list[int]], shared: Mapping[str, int]) -> None:
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

    def solve(self, objective: Floats, room: int | None) -> _Found | None:
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
            return _Found([], math.inf, is_proved=True)
        if found.x is None:
            return None
        chosen, column = [], 0
        for own in self.open_items:
            part = found.x[column : column + len(own)]
            chosen.append(own[int(np.argmax(part))])
            column += len(own)
        return _Found(chosen, scale * (found.mip_dual_bound or 0.0), is_proved=found.status == 0)


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


def hull(items: Sequence[Item]) -> list[int]:
    """Indices of the items on the lower convex hull of (bytes, cost), smallest first."""
    found: list[int] = []
    for i in _undominated(items):
        if found and items[i].cost >= items[found[-1]].cost:
            continue
        while len(found) > 1:
            a, b = items[found[-2]], items[found[-1]]
            if (items[i].cost - a.cost) * (b.nbytes - a.nbytes) > (b.cost - a.cost) * (
                items[i].nbytes - a.nbytes
            ):
                break
            found.pop()
        found.append(i)
    return found


def frontier(groups: Groups) -> list[tuple[int, float]]:
    """``(bytes, cost)`` of the choices on the relaxation's hull, smallest first: a trade-off curve.

    Each point is the best choice for its own bytes, shared tables not counted.
    """
    hulls = [hull(items) for items in groups]
    size = sum(items[own[0]].nbytes for items, own in zip(groups, hulls, strict=True))
    cost = math.fsum(items[own[0]].cost for items, own in zip(groups, hulls, strict=True))
    steps = sorted(
        (
            (items[b].cost - items[a].cost) / max(1, items[b].nbytes - items[a].nbytes),
            items[b].nbytes - items[a].nbytes,
            items[b].cost - items[a].cost,
        )
        for items, own in zip(groups, hulls, strict=True)
        for a, b in pairwise(own)
    )
    points = [(size, cost)]
    for _, nbytes, change in steps:
        size, cost = size + nbytes, cost + change
        points.append((size, cost))
    return points
