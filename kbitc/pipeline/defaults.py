"""The default orders of passes, each written once.

The one thing to know: they are names, and the passes are loaded when a list is made, so that nothing here
imports a pass.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from kbitc.graph.program import Stage
from kbitc.pipeline.order import edit_pipeline, make_pass
from kbitc.pipeline.registry import Pass, load_pass

COMPILING = ("canonicalize", "measure_moments", "find_outliers", "score_sensitivity", "allocate_bits")
"""From a captured program to the plan of a budget. Without calibration the two that look at it are left
out."""

LOWERING = ("fuse_dequantize", "fuse_epilogues", "merge_linears", "remove_dead_code")
"""What runs on the graph of a packed model before code is made of it, in this order."""

MEASURING = ("measure_moments", "find_outliers")
"""Of `COMPILING`, those that look at what the model computes."""


def planning_pipeline(
    *,
    with_budget: bool = True,
    is_measured: bool = True,
    finds_outliers: bool = False,
    transforms: Collection[str] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Pass]:
    """From a captured program to a plan.

    Args:
        with_budget: the plan of a budget; otherwise one that is given, by ``apply_plan``.
        is_measured: there is something to measure on.
        finds_outliers: look for outlier features even without.
        transforms: of "rotate" and "equalize" those that are to be made, if anything is measured.
        options: of passes, by name.
    """
    names = [name for name in COMPILING if is_measured or name not in MEASURING]
    if finds_outliers and not is_measured:
        names.insert(1, "find_outliers")
    if is_measured and "rotate" in transforms:  # before anything is measured of what it changes
        names.insert(1, "rotate")
    if is_measured and "equalize" in transforms:
        names.insert(names.index("measure_moments") + 1, "equalize")
    if not with_budget:
        names = [name for name in names if name not in ("score_sensitivity", "allocate_bits")]
        names.append("apply_plan")
    given = options or {}
    return [cast("Any", load_pass(name))(**given.get(name, {})) for name in names]


def default_pipeline(budget: float | None = None) -> list[Pass]:
    """What compiling with a budget runs on a model that can be calibrated."""
    options = {} if budget is None else {"allocate_bits": {"budget": budget}}
    return planning_pipeline(options=options)


def lowering_pipeline(
    chosen: Sequence[Pass | str] | None = None, disabled: Collection[str] = ()
) -> list[Pass]:
    """The passes from a packed graph to the one that code is made of, edited as ``edit_pipeline`` does."""
    usual = [make_pass(name, {}) for name in LOWERING]
    return edit_pipeline(usual, chosen, disabled, start=Stage.PACKED, end=Stage.PACKED)
