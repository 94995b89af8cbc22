"""That a changed model computes what it did: both run in float32 on one input, and outputs are compared.

The one thing to know: changes of stored tensors are computed from float32 copies here, so that what is left
is the rounding of the arithmetic alone; storing at the source's 16 bits rounds as it always does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kbitc.errors import PassError, UsageError
from kbitc.graph.context import Calibration, ReadTensor
from kbitc.graph.program import Program
from kbitc.passes.canonicalize import traced_on
from kbitc.sensitivity.streaming import Streamed

TOLERANCE = 1e-4
"""Relative error of an output, in norm: float32 rounds at 6e-8, some hundred operations deep."""


def proven(before: Program, after: Program, name: str) -> float:
    """The largest relative error, in norm, of an output of ``after``, which stores other tensors.

    Args:
        before: canonical, with something to run it on.
        after: the same graph.
        name: of the pass that made it.

    Raises:
        UsageError: there is nothing to run them on.
        PassError: they are not the same function.
    """
    source = before.context.calibration
    if source is None:
        raise UsageError(
            f"the pass '{name}' proves on an input that the model stays the same function, and has none; "
            "'kbitc compile --calibrate' gives it text or random inputs"
        )
    one, other = (_outputs(program, source) for program in (before, after))
    error = max((_relative(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    if not error <= TOLERANCE:
        raise PassError(
            f"pass '{name}': the changed model is another function: an output differs by {error:.1e} of its "
            f"norm, where rounding explains {TOLERANCE:.0e}; leave the pass out, and report it"
        )
    return error


def _outputs(program: Program, source: Calibration) -> list[Tensor]:
    feed = source.feeds(1)[0]
    traced = traced_on(source, feed)
    read = program.as_stored(_widely(source.read))
    with torch.no_grad():
        return [out for out in Streamed(traced, read).call(**feed) if _is_float(out)]


def _widely(read: ReadTensor) -> ReadTensor:
    def wide(name: str) -> Tensor:
        tensor = read(name)
        return tensor.float() if _is_float(tensor) else tensor

    return wide


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _relative(one: Tensor, other: Tensor) -> float:
    # What masks hold at minus infinity is the same in both.
    exact, near = (value.double().nan_to_num(posinf=0.0, neginf=0.0) for value in (one, other))
    norm = float(exact.norm())
    return float((exact - near).norm()) / norm if norm else float(near.norm())
