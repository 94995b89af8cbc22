"""Convex hulls of options, and the trade-off curve of all groups together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from kbitc.planning.knapsack.problem import Item, ItemGroups, undominated


def hull(items: Sequence[Item]) -> list[int]:
    """Indices of the items on the lower convex hull of (bytes, cost), smallest first."""
    found: list[int] = []
    for i in undominated(items):
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


def frontier(groups: ItemGroups) -> list[tuple[int, float]]:
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
