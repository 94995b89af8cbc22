"""The multiple-choice knapsack: items, groups that must agree, and what a choice costs.

The one thing to know: a choice is the index of one item for each group, and a shared table is paid once, so
that the bytes of a choice are not the sum of its items'.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
NO_TABLES: Mapping[str, int] = MappingProxyType({})
GAP = 1e-5  # relative, at which the solver may stop


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
        key: what it is called in every group that offers the same, for :func:`agreed`.
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


ItemGroups = Sequence[Sequence[Item]]


def agreed(groups: ItemGroups, together: Sequence[Sequence[int]]) -> tuple[list[list[Item]], list[list[int]]]:
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


def _merged(groups: ItemGroups) -> list[Item]:
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


def check(groups: ItemGroups, shared: Mapping[str, int]) -> None:
    """Raises ValueError for what is no instance: an empty group, a number out of range, an unknown table."""
    for items in groups:
        if not items:
            raise ValueError("a group without items has no solution")
        for item in items:
            if item.nbytes < 0 or not 0.0 <= item.cost < math.inf:
                raise ValueError(f"{item}: bytes and cost must be finite and not negative")
            if any(name not in shared for name in item.shared):
                raise ValueError(f"{item}: needs a table whose size is not given")


def undominated(items: Sequence[Item]) -> list[int]:
    """Indices of the items that no other one beats in bytes, cost and tables alike, smallest first."""
    order = sorted(range(len(items)), key=lambda i: (items[i].nbytes, items[i].cost, len(items[i].shared), i))
    kept: list[int] = []
    for i in order:
        tables = set(items[i].shared)
        if not any(items[k].cost <= items[i].cost and tables.issuperset(items[k].shared) for k in kept):
            kept.append(i)
    return kept


def total_bytes(groups: ItemGroups, chosen: Sequence[int], shared: Mapping[str, int]) -> int:
    """Bytes of a choice, each table that it needs counted once."""
    picked = [items[i] for items, i in zip(groups, chosen, strict=True)]
    tables = {name for item in picked for name in item.shared}
    return sum(item.nbytes for item in picked) + sum(shared[name] for name in tables)


def total_cost(groups: ItemGroups, chosen: Sequence[int]) -> float:
    """Cost of a choice."""
    return math.fsum(items[i].cost for items, i in zip(groups, chosen, strict=True))


def best_of(groups: ItemGroups, shared: Mapping[str, int], room: int, *choices: list[int]) -> list[int]:
    """Of the choices that fit, the one of least cost, then least bytes, then lower indices."""
    fitting = [c for c in choices if total_bytes(groups, c, shared) <= room]
    return min(fitting, key=lambda c: (total_cost(groups, c), total_bytes(groups, c, shared), c))
