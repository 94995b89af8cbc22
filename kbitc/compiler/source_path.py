"""The one path of every source: calibrate, capture, passes.

The one thing to know: a folder of 100 GB, a module in memory, a model that is only inspected and the graph
that torch.compile found go through the same statements; they differ in what captures and in what follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeAlias

from kbitc.checkpoint import Checkpoint
from kbitc.checkpoint.reading import Reading
from kbitc.compiler.calibrator import SPARING, Calibrate, make_calibrator
from kbitc.errors import out_of_memory
from kbitc.graph.capture import capture
from kbitc.graph.context import Context, Progress, silent
from kbitc.graph.program import Program
from kbitc.pipeline.manager import PassManager
from kbitc.pipeline.registry import Pass
from kbitc.system.work import IN_PROCESS, Engine

Manage: TypeAlias = Callable[[Sequence[Pass]], PassManager]
"""Makes the manager of a list of passes: ``PassManager``, or one that also prints or observes."""

Inputs: TypeAlias = tuple[Any, ...] | Mapping[str, Any] | None
"""Positional or keyword inputs of a model; None where some that fit are to be made."""

Capture: TypeAlias = Callable[[Checkpoint, Context], Program]
"""Makes the program that the passes start from."""


@dataclass(frozen=True)
class Run:
    """A source's way through the passes.

    Attributes:
        captured: before any pass.
        program: after all of them.
        seconds: wall time by phase.
    """

    captured: Program
    program: Program
    seconds: Mapping[str, float] = field(default_factory=dict)


def from_inputs(inputs: Inputs) -> Capture:
    """A capture of the source's own skeleton on these inputs, or on some that fit it."""
    return lambda checkpoint, context: capture(checkpoint.skeleton(), inputs, context=context)


def run_passes(
    checkpoint: Checkpoint,
    manager: PassManager,
    calibrate: Calibrate,
    *,
    is_measured: bool,
    without: Callable[[], Sequence[str]] = tuple,
    captured: Capture | None = None,
    example_inputs: Inputs = None,
    on_progress: Progress = silent,
    most: Callable[[int], int | None] = lambda _: None,
    engine: Engine = IN_PROCESS,
) -> Run:
    """Capture an open source and run passes on it.

    Args:
        checkpoint: open while this runs.
        manager: of the passes.
        calibrate: what the user said; see `kbitc.compiler.request.Request`.
        is_measured: what "auto" means.
        without: names of passes to leave out where the model has nothing to measure on.
        captured: makes the first program; by default the model's own.
        example_inputs: the user's; else inputs that fit the model are made.
        on_progress: told of long work.
        most: how many inputs the calibration is asked for at most, of a model of so many stored values; None
            for no more than measuring takes.
        engine: see `kbitc.graph.context.Context`.

    Raises:
        UsageError: a calibration that the model cannot have, or what a pass says.
        SourceError: the model cannot be captured.
    """
    calibrator = make_calibrator(
        checkpoint,
        calibrate,
        on_progress,
        is_wanted=is_measured,
        example_inputs=example_inputs,
        most=most(sum(math.prod(info.shape) for info in checkpoint.tensors().values())),
    )
    if calibrator is None:
        manager = manager.without(without())
    on_progress("capture", 0, 0)
    started = perf_counter()
    dtypes = {name: info.dtype for name, info in checkpoint.tensors().items()}
    context = Context(Reading(checkpoint), calibrator, on_progress, dtypes, engine)
    first = (captured or from_inputs(example_inputs))(checkpoint, context)
    middle = perf_counter()
    on_progress("plan", 0, 0)
    with out_of_memory("measuring and planning", SPARING):
        program = manager.run(first)
    return Run(first, program, {"capture": middle - started, "plan": perf_counter() - middle})
