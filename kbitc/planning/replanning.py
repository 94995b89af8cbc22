"""Another budget from a score table alone.

The one thing to know: neither the model nor a request is needed, so that it takes as long as the solver does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kbitc.planning.allocation import allocate, check_budget
from kbitc.sensitivity.score_table import ScoreTable


def replan(folder: Path, bits: float, agree: str = "") -> dict[str, Any]:
    """A plan for another budget, from the score table of an artifact alone.

    Args:
        folder: an artifact that was compiled with ``--bits``, or a score table.
        bits: stored bits per parameter of the whole model.
        agree: weights that get one spec, see `kbitc.passes.allocate_bits.AllocateBits`.

    Returns:
        The contents of a plan file for ``--plan``, with the predicted loss and its bound.

    Raises:
        UsageError: no score table there, or a budget out of range.
        BudgetError: no plan meets the budget.
    """
    check_budget(bits)
    scores = ScoreTable.open(folder)
    plan, solution = allocate(scores, bits, agree, scores.quantizer)
    stored = 8 * (solution.nbytes + scores.fixed) / scores.parameters
    return plan.to_json() | {
        "bits_per_param": stored,
        "predicted": {"cost": solution.cost, "unit": scores.unit, "gap": solution.gap},
    }
