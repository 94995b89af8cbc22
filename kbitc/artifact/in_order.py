"""How the way through a planned program's graph begins."""

from __future__ import annotations

from collections.abc import Mapping

from kbitc.formats.packed import Packed
from kbitc.graph.program import Program
from kbitc.passes.canonicalize import traced_on
from kbitc.replay import ordered
from kbitc.replay.choice import ordered_quantizer
from kbitc.replay.ordered import InOrder, Known


def in_order(program: Program, known: Known) -> InOrder | None:
    """A way through a planned program; None where its weights need none.

    Args:
        program: planned.
        known: what is packed already.

    Raises:
        UsageError: the plan names a quantizer that needs one, without anything to calibrate on or a graph.
    """
    assert program.plan is not None
    chosen = [choice for choice in program.plan.weights.values() if not choice.spec.is_left_alone]
    source = program.context.calibration
    if ordered_quantizer(program, (choice.quantizer for choice in chosen)) is None or source is None:
        return None
    feeds = source.feeds(ordered.FITTED + ordered.HELD_OUT)
    traced = traced_on(source, feeds[0])
    return InOrder(program, traced, feeds, program.as_stored(source.read), known)


def packed_in_order(program: Program) -> Mapping[str, Packed]:
    """What is packed already, and all that a quantizer wants packed in the order of the graph, in memory."""
    packed = dict(program.packed)
    way = in_order(program, packed.get)
    if way is not None:
        for name, _, made in way.run():
            packed[name] = made  # noqa: PERF403  # the way asks for it before the next
    return packed
