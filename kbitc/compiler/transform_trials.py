"""Whether passes that change weights and not the function are worth it for this model: by what it computes.

The one thing to know: every candidate is planned as asked for and its weights packed in memory, and what the
packed model says of inputs that nothing was fitted to is compared with what the source says. Candidates are
added one at a time, and one that does not come closer is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kbitc.artifact.pack import checked_plain, packed_tensors
from kbitc.checkpoint import Checkpoint
from kbitc.compiler.request import AS_MEASURED, OFF, ON, TRANSFORMS, Request, pipeline_of, unmeasured
from kbitc.compiler.source_path import Capture, Inputs, run_passes
from kbitc.errors import UsageError
from kbitc.graph.context import Calibration, Progress, ReadTensor, silent
from kbitc.graph.program import Program
from kbitc.passes.canonicalize import traced_on
from kbitc.pipeline.manager import PassManager
from kbitc.pipeline.records import records
from kbitc.sensitivity.streaming import Streamed
from kbitc.tensor.kbit_tensor import KbitTensor

HELD_OUT = 8  # inputs, beside those that calibration measures on


@dataclass(frozen=True)
class Trial:
    """One candidate.

    Attributes:
        transforms: names of the passes that were tried together.
        divergence: from the source, see :func:`divergence`.
    """

    transforms: tuple[str, ...]
    divergence: float


Attempt: TypeAlias = Callable[[Request], Program]
"""Plans a request whose transforms are on or off."""


def settled(
    request: Request,
    checkpoint: Checkpoint,
    *,
    captured: Capture | None = None,
    example_inputs: Inputs = None,
    on_progress: Progress = silent,
) -> tuple[Request, tuple[Trial, ...]]:
    """The request with every transform on or off, and what was tried for it.

    Args:
        request: some of whose transforms are to be decided by measuring, or none.
        checkpoint: open.
        captured: makes the first program; by default the model's own.
        example_inputs: the user's.
        on_progress: told of long work.

    Raises:
        UsageError: the calibration text is too short to hold any of it out.
    """

    def attempt(tried: Request) -> Program:
        return run_passes(
            checkpoint,
            PassManager(pipeline_of(tried)),
            request.calibrate,
            is_measured=True,
            without=lambda: unmeasured(tried),
            captured=captured,
            example_inputs=example_inputs,
            on_progress=on_progress,
        ).program

    open_ = [name for name in TRANSFORMS if getattr(request, name) == AS_MEASURED]
    if not open_:
        return request, ()
    decided = _with(request, **dict.fromkeys(open_, OFF))
    first = attempt(decided)
    if first.context.calibration is None or first.untraced:
        return decided, ()
    feeds = held_out(first.context.calibration)
    trials = [Trial((), divergence(first, feeds))]
    for name in open_:
        tried = _with(decided, **{name: ON})
        program = attempt(tried)
        if not records(program)[name].groups:
            continue  # nothing to do for this model
        found = Trial((*_kept(decided, open_), name), divergence(program, feeds))
        if found.divergence < min(trial.divergence for trial in trials):
            decided = tried
        trials.append(found)
    return decided, tuple(trials)


def _with(request: Request, **modes: Any) -> Request:
    return replace(request, **modes)


def _kept(request: Request, names: Sequence[str]) -> list[str]:
    return [name for name in names if getattr(request, name) == ON]


def divergence(program: Program, feeds: Sequence[Mapping[str, Any]]) -> float:
    """How far the packed model is from its source on some inputs.

    Of a language model calibrated on text the mean KL divergence of its next-token distributions, in nats; of
    others the mean squared error of their outputs relative to the outputs' own mean square, half of it, which
    is the same of a normal law as wide as the outputs. Weights are packed as the artifact's will be; a
    quantizer that goes through the graph may have fitted codes to inputs that are compared here.

    Args:
        program: planned, with something to measure on.
        feeds: keyword inputs to compare on, all of the same shapes.
    """
    source = program.context.calibration
    assert source is not None
    traced = traced_on(source, feeds[0])
    plain = Streamed(traced, source.read)
    packed = Streamed(traced, stored_reader(program, source.read))
    total = 0.0
    with torch.no_grad():
        for i, feed in enumerate(feeds):
            total += _distance(plain.call(**feed), packed.call(**feed), is_text=source.is_text)
            program.context.on_progress("comparing with the source", i + 1, len(feeds))
    return total / len(feeds)


def held_out(source: Calibration) -> list[dict[str, Any]]:
    """Inputs that calibration does not measure on.

    Raises:
        UsageError: there are none.
    """
    fitted = source.feeds()
    more = source.feeds(len(fitted) + HELD_OUT)[-HELD_OUT:]
    held = [feed for feed in more if not any(_same(feed, other) for other in fitted)]
    if not held:
        raise UsageError(
            f"calibration has {source.label} and nothing beside to hold out, so that 'auto' cannot be "
            "decided; calibrate on a longer text, or say on or off"
        )
    return held


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    tensors = [name for name, value in one.items() if isinstance(value, Tensor)]
    return all(torch.equal(one[name], other[name]) for name in tensors)


def stored_reader(program: Program, read: ReadTensor) -> ReadTensor:
    """Reads every tensor as an artifact of a planned program would have it; packed weights stay packed."""
    assert program.plan is not None
    stored = program.as_stored(read)
    packed: dict[str, KbitTensor] = {}
    for name, tensor in packed_tensors(program, stored):
        packed[name] = tensor
        program.context.on_progress("packing for a trial", len(packed), len(program.plan.weights))

    def as_stored(name: str) -> Tensor:
        if name in packed:
            return packed[name].dequantize(torch.float32)
        if name in program.weights:
            return checked_plain(name, stored(name), must_be_finite=True)
        tensor, rest = stored(name), program.rest.get(name)
        return tensor if rest is None or rest.stored is None else tensor.to(rest.stored)

    return as_stored


def _distance(source: Sequence[Any], packed: Sequence[Any], *, is_text: bool) -> float:
    pairs = [
        (one.double(), other.double())
        for one, other in zip(source, packed, strict=True)
        if isinstance(one, Tensor) and one.is_floating_point() and one.numel()
    ]
    if is_text:
        return _divergence(*pairs[0])
    errors = [
        float((one - other).square().mean() / one.square().mean().clamp_min(1e-300)) for one, other in pairs
    ]
    return sum(errors) / len(errors) / 2


def _divergence(source: Tensor, packed: Tensor) -> float:
    """Mean KL of two ``(..., vocabulary)`` logits, in nats."""
    one, other = source.log_softmax(-1), packed.log_softmax(-1)
    return float((one.exp() * (one - other)).sum(-1).mean())
