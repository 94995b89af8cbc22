"""Convex hulls of options, and the trade-off curve of all groups together.

The one thing to know: the curve's points are optima of the relaxation that are whole choices, one for each
step of a hull; between two of them the exact optimum may lie above their line, never below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from kbitc.planning.knapsack.problem import Item, ItemGroups, undominated


def hull(items: Sequence[Item]) -> list[int]:
    """Indices of the items on the lower convex hull of (bytes, cost), smallest first."""
    corners: list[int] = []
    for i in undominated(items):
        if corners and items[i].cost >= items[corners[-1]].cost:
            continue
        while len(corners) > 1:
            a, b = items[corners[-2]], items[corners[-1]]
            if (items[i].cost - a.cost) * (b.nbytes - a.nbytes) > (b.cost - a.cost) * (
                items[i].nbytes - a.nbytes
            ):
                break
            corners.pop()
        corners.append(i)
    return corners


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
