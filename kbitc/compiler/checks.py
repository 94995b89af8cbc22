"""A plan is what was asked for, whichever passes made and changed it."""

from __future__ import annotations

from kbitc.compiler.request import Request
from kbitc.errors import BudgetError, UsageError
from kbitc.graph.program import Program
from kbitc.graph.stored import stored_bytes


def check_request(program: Program, request: Request) -> None:
    """A plan is what was asked for, whichever passes made and changed it."""
    if request.is_strict:
        _check_strict(program)
    size = stored_bytes(program)
    if request.bits is not None and size > request.bits * program.parameter_count / 8:
        raise BudgetError(
            f"--bits {request.bits:g}: the passes {list(program.history)} ended with a plan of "
            f"{8 * size / program.parameter_count:.4f} stored bits per parameter; a pass that adds bits "
            "needs a planner with a smaller budget before it"
        )


def _check_strict(program: Program) -> None:
    left = [f"{name} ({rest.reason})" for name, rest in program.rest.items() if rest.is_matmul]
    assert program.plan is not None
    left += [
        f"{name} (spec fp16)" for name, choice in program.plan.weights.items() if choice.spec.is_left_alone
    ]
    if left:
        raise UsageError(
            f"--strict: {len(left)} matmul weights would be left unquantized, the first is {left[0]}; "
            "run without --strict to accept that, or see 'kbitc inspect'"
        )
