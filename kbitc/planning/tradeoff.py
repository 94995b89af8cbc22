"""What a score table says beside the optimum: the curve of bits against loss, and each weight's neighbours.

The one thing to know: everything here follows from lower convex hulls, without a solver, so that a report
costs milliseconds. Shared codebooks, a few kilobytes of a model, are not counted.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kbitc.formats.spec import Spec
from kbitc.planning.knapsack import Item, frontier, hull
from kbitc.sensitivity.score_table import Option, ScoreTable

STEP = 0.25
"""Bits per parameter from one budget to the next in "what would change"."""

MOST_STEPS = 4
"""Budgets below and above the one at hand that are listed."""


@dataclass(frozen=True)
class Point:
    """A plan's size and predicted cost.

    Attributes:
        bits: stored bits per parameter of the whole model.
        cost: in the table's unit.
        label: what is there: a uniform spec, or "".
    """

    bits: float
    cost: float
    label: str = ""


def curve(scores: ScoreTable) -> list[Point]:
    """The best plans, from the smallest to 16 bits; cost falls and is convex in bits."""
    groups = [_items(options) for options in scores.options.values()]
    return [Point(_bits(scores, size), cost) for size, cost in frontier(groups)]


def at(points: Sequence[Point], bits: float) -> float | None:
    """The curve's cost at a size, between two of its points on their line; None below the smallest."""
    if bits < points[0].bits:
        return None
    for left, right in pairwise(points):
        if left.bits <= bits <= right.bits:
            share = (bits - left.bits) / ((right.bits - left.bits) or 1.0)
            return left.cost + share * (right.cost - left.cost)
    return points[-1].cost


def uniform(scores: ScoreTable) -> list[Point]:
    """One spec for every weight, for each spec that every weight was priced at, smallest first."""
    tables = [{o.spec: o for o in options} for options in scores.options.values()]
    common = [spec for spec in tables[0] if not spec.is_left_alone and all(spec in table for table in tables)]
    points = [
        Point(
            _bits(scores, sum(table[spec].nbytes for table in tables)),
            math.fsum(table[spec].cost for table in tables),
            str(spec),
        )
        for spec in common
    ]
    return sorted(points, key=lambda point: (point.bits, point.cost))


def best_uniform(points: Sequence[Point], bits: float) -> Point | None:
    """Of uniform plans, the one of least cost that takes at most ``bits``."""
    return min((p for p in points if p.bits <= bits), key=lambda p: p.cost, default=None)


def trade_off_rows(scores: ScoreTable, around: float) -> list[tuple[float, float, Point | None]]:
    """Budgets around one: ``(bits, predicted cost of the best plan, best uniform plan that fits)``."""
    best, uniforms = curve(scores), uniform(scores)
    centre = round(around / STEP) * STEP
    rows = []
    for i in range(-MOST_STEPS, MOST_STEPS + 1):
        bits = centre + i * STEP
        cost = at(best, bits)
        if cost is not None:
            rows.append((bits, cost, best_uniform(uniforms, bits)))
    return rows


def priced(scores: ScoreTable, specs: Mapping[str, Spec]) -> dict[str, Option] | None:
    """The option behind each weight's spec; None when a spec is not in the table."""
    chosen = {}
    for name, options in scores.options.items():
        option = next((o for o in options if o.spec == specs.get(name)), None)
        if option is None:
            return None
        chosen[name] = option
    return chosen


def neighbours(options: Sequence[Option], chosen: Option) -> tuple[Option | None, Option | None]:
    """The next smaller and the next larger option on the weight's convex hull."""
    own = [options[i] for i in hull(_items(options))]
    smaller = [o for o in own if o.nbytes < chosen.nbytes]
    larger = [o for o in own if o.nbytes > chosen.nbytes and o.cost < chosen.cost]
    return (smaller[-1] if smaller else None), (larger[0] if larger else None)


def shifted(scores: ScoreTable, chosen: Mapping[str, Option], bits: float) -> dict[str, Option]:
    """The weights that change when the budget does, and what to: steps along hulls, best ratio first.

    Args:
        scores: the table.
        chosen: the plan to start from, :func:`priced`.
        bits: how many stored bits per parameter more; fewer if negative.
    """
    room = abs(bits) * scores.parameters / 8
    current = dict(chosen)
    side = int(bits > 0)
    queue: list[tuple[float, str, Option]] = []

    def push(name: str) -> None:
        following = neighbours(scores.options[name], current[name])[side]
        if following is not None:
            nbytes = abs(following.nbytes - current[name].nbytes)
            heapq.heappush(queue, ((following.cost - current[name].cost) / nbytes, name, following))

    for name in chosen:
        push(name)
    spent = 0
    while queue and spent < room:
        _, name, following = heapq.heappop(queue)
        nbytes = abs(following.nbytes - current[name].nbytes)
        if side and spent + nbytes > room:
            continue  # a smaller step may still fit
        spent += nbytes
        current[name] = following
        push(name)
    return {name: option for name, option in current.items() if option != chosen[name]}


def _items(options: Sequence[Option]) -> list[Item]:
    return [Item(o.nbytes, o.cost) for o in options]


def _bits(scores: ScoreTable, nbytes: int) -> float:
    return 8 * (nbytes + scores.fixed) / scores.parameters
