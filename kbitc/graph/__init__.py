"""The captured model: program, plan, what reads a weight, and questions about the graph.

Nothing here decides how a weight is stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbitc.lazy import exports

if TYPE_CHECKING:
    from kbitc.graph.context import Context
    from kbitc.graph.facts import Fact
    from kbitc.graph.plan import Choice, Plan
    from kbitc.graph.program import Program, Rest, Stage, Weight

__all__ = [
    "Choice",
    "Context",
    "Fact",
    "Plan",
    "Program",
    "Rest",
    "Stage",
    "Weight",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "Choice": "kbitc.graph.plan",
        "Context": "kbitc.graph.context",
        "Fact": "kbitc.graph.facts",
        "Plan": "kbitc.graph.plan",
        "Program": "kbitc.graph.program",
        "Rest": "kbitc.graph.program",
        "Stage": "kbitc.graph.program",
        "Weight": "kbitc.graph.program",
    },
)
