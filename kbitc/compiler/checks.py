"""What is said of a program beside its plan: whether it is what was asked for, and what could not be done.

The one thing to know: a plan is what was asked for, whichever passes made and changed it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from kbitc.compiler.request import Request
from kbitc.errors import BudgetError, UntracedWarning, UsageError
from kbitc.graph.program import Program
from kbitc.graph.stored import stored_bytes
from kbitc.pipeline.manager import STEPS
from kbitc.planning.target import Target, misfits, target_bytes

MOST = 20  # weights that an error lists


def check_request(program: Program, request: Request) -> None:
    """A plan is what was asked for, whichever passes made and changed it."""
    if request.is_strict:
        _check_strict(program)
    if request.target is not None:
        _check_fit(program, request.target)
    size = stored_bytes(program) if request.target is None else target_bytes(request.target, program)
    if request.bits is not None and size > request.bits * program.parameter_count / 8:
        raise BudgetError(
            f"--bits {request.bits:g}: the passes {list(program.history)} ended with a plan of "
            f"{8 * size / program.parameter_count:.4f} stored bits per parameter; a pass that adds bits "
            "needs a planner with a smaller budget before it"
        )


def _check_fit(program: Program, target: Target) -> None:
    """A budget's plan fits; one that was given, or that passes changed, may not."""
    assert program.plan is not None
    listed = [
        f"{name}: {spec} becomes {instead}, {bits:.2f} bits a weight"
        for name, spec, instead, bits in misfits(target, program.weights, program.plan.weights)
    ]
    if listed:
        more = f"\n  ... and {len(listed) - MOST} more" if len(listed) > MOST else ""
        raise UsageError(
            f"--for {target.name}: {len(listed)} weights of the plan have formats that it does not hold as "
            "they are:\n  " + "\n  ".join(listed[:MOST]) + f"{more}\nGive --bits, which plans in its formats "
            "and bytes, or leave out --for, and 'kbitc export' says what each weight takes"
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


def by_class_alone(program: Program) -> list[str]:
    """The weights that no graph reads, and that were found by the class of their module."""
    weights = program.weights.values()
    return [weight.name for weight in weights if all(use.module for use in weight.uses)]


def skipped_passes(program: Program) -> tuple[str, ...]:
    """Names of the passes that were left out for lack of a graph."""
    return tuple(step.name for step in program.get(STEPS) or () if step.is_skipped)


def untraced_note(program: Program, skipped: Sequence[str]) -> str:
    """What the user must know of a program without a graph; "" of any other.

    Args:
        program: planned.
        skipped: names of the passes that were left out, those of lowering included where it was lowered.
    """
    if not program.untraced:
        return ""
    left_out = f" Passes that need a graph were left out: {', '.join(skipped)}." if skipped else ""
    return (
        f"the model has no graph, since torch.export cannot trace it ({program.untraced}): its weights were "
        f"found by the classes of its modules (nn.Linear, nn.Embedding and their like).{left_out} If the "
        "example inputs are to blame, give others"
    )


def warn_untraced(label: str, program: Program) -> None:
    """The same as a warning, where nobody reads a result."""
    note = untraced_note(program, skipped_passes(program))
    if note:
        warnings.warn(f"{label}: {note}", UntracedWarning, stacklevel=3)
