"""Multiple-choice knapsack: one item of each group, least cost, within a number of bytes, solved exactly.

Nothing in here knows what the items are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbitc.lazy import exports

if TYPE_CHECKING:
    from kbitc.planning.knapsack.hulls import frontier, hull
    from kbitc.planning.knapsack.problem import Infeasible, Item, Solution, agreed
    from kbitc.planning.knapsack.solver import solve

__all__ = ["Infeasible", "Item", "Solution", "agreed", "frontier", "hull", "solve"]

__getattr__, __dir__ = exports(
    __name__,
    {
        "Infeasible": "kbitc.planning.knapsack.problem",
        "Item": "kbitc.planning.knapsack.problem",
        "Solution": "kbitc.planning.knapsack.problem",
        "agreed": "kbitc.planning.knapsack.problem",
        "frontier": "kbitc.planning.knapsack.hulls",
        "hull": "kbitc.planning.knapsack.hulls",
        "solve": "kbitc.planning.knapsack.solver",
    },
)
