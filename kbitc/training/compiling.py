"""`kbitc compile --tune`: compiling and tuning as one, into one folder.

The one thing to know: what is compiled stands in ``.OUT.untuned`` beside OUT until it is tuned; OUT appears,
or is replaced, once and at the end.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from kbitc.artifact.folders import FolderClaim
from kbitc.compiler.calibrator import NONE
from kbitc.compiler.driver import Result, compile_to
from kbitc.compiler.request import Request
from kbitc.compiler.source_path import Manage
from kbitc.errors import UsageError
from kbitc.graph.context import Progress, silent
from kbitc.pipeline.manager import PassManager
from kbitc.system import files
from kbitc.system.work import IN_PROCESS, Engine
from kbitc.training import tuning
from kbitc.training.distilling import Recipe


def compile_tuned_to(
    source: str | Path | nn.Module,
    out: Path,
    request: Request,
    *,
    recipe: Recipe | None = None,
    is_forced: bool = False,
    is_resumed: bool = False,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    on_progress: Progress = silent,
    manage: Manage = PassManager,
    engine: Engine = IN_PROCESS,
) -> tuple[Result, tuning.Result]:
    """Compile a model into an artifact folder, and tune it.

    Args:
        source: as of `kbitc.compiler.driver.compile_to`.
        out: folder to write.
        request: how to choose the specs, and what to calibrate and tune on.
        recipe: how to tune.
        is_forced: replace an existing artifact.
        is_resumed: continue an interrupted run: what was packed is not packed again; tuning begins anew.
        example_inputs: to trace, measure and tune the model on.
        on_progress: told of long work.
        manage: makes the manager that runs the passes.
        engine: as of `kbitc.compiler.driver.compile_to`; tuning is this process's.

    Returns:
        What compiling did, and what tuning did.

    Raises:
        UsageError: nothing to calibrate on, or as of the two.
        SourceError: as of the two.
        BudgetError: no plan meets the budget.
    """
    if isinstance(request.calibrate, str) and request.calibrate == NONE:
        raise UsageError("--calibrate none: --tune needs something to run on: self, random or a text")
    target = Path(os.path.realpath(out))
    untuned = target.with_name(f".{target.name}.untuned")
    with FolderClaim(out, is_forced=is_forced, is_resumed=is_resumed) as claim:
        try:
            compiled = compile_to(
                source,
                untuned,
                request,
                is_forced=True,
                is_resumed=is_resumed,
                example_inputs=example_inputs,
                on_progress=on_progress,
                manage=manage,
                engine=engine,
            )
            tuned = tuning.tune_to(
                untuned,
                source,
                out=out,
                calibrate=request.calibrate,
                recipe=recipe,
                example_inputs=example_inputs,
                on_progress=on_progress,
                claim=claim,
            )
        finally:
            files.remove(untuned)
    return replace(compiled, out=out), tuned
