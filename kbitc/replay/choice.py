"""Whether a program's weights are packed in the order of its graph.

The one thing to know: a quantizer that needs the inputs of the partly quantized model is what the user names,
or the strongest one where the model is small enough for it to take no more than minutes.
"""

from __future__ import annotations

from collections.abc import Iterable

from kbitc.errors import UsageError
from kbitc.graph.program import Program
from kbitc.quantizers import AUTO, Quantizer, find_quantizer, strongest_quantizer
from kbitc.sensitivity.gram import GRAM
from kbitc.sensitivity.moments import MOMENTS

LIMIT = 300_000_000
"""Parameters of a model that is packed so unasked: SmolLM2-135M takes about five minutes on two cores."""


def ordered_quantizer(program: Program, named: Iterable[str]) -> Quantizer | None:
    """The quantizer among those named that goes through the graph; None where none does.

    Args:
        program: canonical, with moments if there is something to calibrate on.
        named: quantizers; "" and "auto" leave the choice to us.

    Raises:
        UsageError: one is named, and there is nothing to calibrate on, or no graph.
    """
    names = set(named)
    asked = sorted(filter(goes_in_order, names))
    chosen = find_quantizer(asked[0]) if asked else None
    obstacle = _obstacle(program)
    if chosen is not None and obstacle:
        raise UsageError(f"the quantizer that is asked for {obstacle}; give --quantizer weighted or absmax")
    if chosen is not None or obstacle or not names & {"", AUTO} or program.parameter_count > LIMIT:
        return chosen
    return strongest_quantizer()


def goes_in_order(name: str) -> bool:
    """Whether a quantizer is named that needs the inputs of the partly quantized model."""
    return name not in ("", AUTO) and GRAM in find_quantizer(name).requires


def _obstacle(program: Program) -> str:
    if program.untraced:
        return f"goes through the model's graph, and torch.export cannot trace it ({program.untraced})"
    if program.context.calibration is None or not program.get(MOMENTS):
        return "needs something to calibrate on (--calibrate self, random or TEXT)"
    return ""
