"""Whether a model has anything to plan."""

from __future__ import annotations

from collections import Counter

from kbitc.errors import UsageError
from kbitc.graph.program import Program

MOST = 4  # reasons that are listed


def check_packable(program: Program) -> None:
    """See that a canonical program has a weight.

    Raises:
        UsageError: it has none; says what it has instead, and why that stays as it is.
    """
    if program.weights:
        return
    reasons = Counter(rest.reason for rest in program.rest.values())
    listed = [f"{count} x {reason}" for reason, count in reasons.most_common(MOST)]
    more = f", and {len(reasons) - MOST} more reasons" if len(reasons) > MOST else ""
    found = f"{len(program.rest)} tensors, none of which can be packed: {'; '.join(listed)}{more}"
    raise UsageError(
        f"nothing to pack: the model has {found if program.rest else 'no parameters at all'}. kbitc packs "
        "the weights of matmuls and look-up tables; 'kbitc inspect' lists every tensor with its reason"
    )
