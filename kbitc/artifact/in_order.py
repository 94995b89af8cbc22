"""Which programs are packed in the order of their graph, and how the way through it begins."""

from __future__ import annotations

from kbitc.errors import UsageError
from kbitc.graph.capture import capture
from kbitc.graph.program import Program
from kbitc.passes.canonicalize import Canonicalize
from kbitc.quantizers import AUTO, find_quantizer
from kbitc.replay.ordered import FITTED, HELD_OUT, InOrder, Known
from kbitc.sensitivity.gram import GRAM


def wants_order(program: Program) -> bool:
    """Whether a quantizer that the plan names needs the inputs of the partly quantized model."""
    assert program.plan is not None
    named = {choice.quantizer for choice in program.plan.weights.values()} - {"", AUTO}
    return any(GRAM in find_quantizer(name).requires for name in named)


def in_order(program: Program, known: Known) -> InOrder:
    """A way through a planned program.

    Raises:
        UsageError: there is nothing to calibrate on, or no graph.
    """
    source = program.context.calibration
    if source is None:
        raise UsageError(
            "the quantizer that the plan names needs something to calibrate on: --calibrate self, random or "
            "TEXT; or give --quantizer absmax"
        )
    feeds = source.feeds(FITTED + HELD_OUT)
    traced = Canonicalize().run(capture(source.skeleton(), feeds[0]))
    if traced.untraced:
        raise UsageError(
            "the quantizer that the plan names goes through the model's graph, and torch.export cannot trace "
            f"this model ({traced.untraced}); give --quantizer weighted"
        )
    return InOrder(program, traced, feeds, program.as_stored(source.read), known)
