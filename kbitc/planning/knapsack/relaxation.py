"""Bounds by the Lagrangian relaxation, and the choices that its multipliers lead to.

The one thing to know: a multiplier is a price for a byte. At any price, the cheapest item of each group
gives a bound on every choice that fits; the price at which those items just fill the room gives the best.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kbitc.planning.knapsack.problem import ItemGroups, total_bytes

# Bisections of the multiplier. SmolLM2-135M at 3, 3.5, 4, 4.25 and 5 bits: 10 give other plans (gap at 4.25
# bits 11.5e-6, not 7.5e-6), 20 and 30 another one at 5 bits, 40, 60 and 100 the same; all in 25 to 31 s.
ROUNDS = 60


@dataclass(frozen=True)
class Branch:
    """The choices that have one item of the widest group.

    Attributes:
        kept: items of each group, one of the widest.
        multipliers: of the relaxation; the last one gives the bound.
        bound: no choice of these costs less.
    """

    kept: list[list[int]]
    multipliers: list[float]
    bound: float


def lagrangian(groups: ItemGroups, kept: list[list[int]], room: int) -> tuple[list[float], float]:
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


def greedy(
    groups: ItemGroups,
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
    while total_bytes(groups, chosen, shared) > room:
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
    fill(groups, kept, chosen, room, shared)
    return chosen


def fill(
    groups: ItemGroups, kept: list[list[int]], chosen: list[int], room: int, shared: Mapping[str, int]
) -> None:
    """Take single changes that lower the cost and still fit, the largest gain first, until none is left."""
    size = total_bytes(groups, chosen, shared)
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
            if total_bytes(groups, tried, shared) <= room:
                chosen[:] = tried
                size = total_bytes(groups, chosen, shared)
                break
        else:
            return
