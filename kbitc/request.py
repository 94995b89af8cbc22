"""What is asked of a compilation, and the passes that answer it.

The one thing to know: a request is checked, and its passes are chosen, before the model is opened; what only
an open model has (the text to measure on) is given to the passes afterwards, by :func:`equipped`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from kbitc.calibration import AUTO, NONE, Calibrate, Calibrator, make_calibrator
from kbitc.checkpoint import Checkpoint
from kbitc.errors import UsageError, did_you_mean
from kbitc.graphs import KINDS
from kbitc.passes.allocate_bits import AllocateBits
from kbitc.passes.apply_plan import ApplyPlan
from kbitc.passes.canonicalize import Canonicalize
from kbitc.passes.find_outliers import FindOutliers
from kbitc.passes.measure_moments import MeasureMoments
from kbitc.passes.score_sensitivity import ScoreSensitivity
from kbitc.pipeline import Pass, edit_pipeline, name_of
from kbitc.plan import read_rules
from kbitc.spec import parse

Event = Callable[[str, int, int], None]
"""Progress: ``(what, bytes done, bytes in all)``; ``what`` is a phase or a tensor's name."""

MIN_BUDGET, MAX_BUDGET = 2.0, 8.0


@dataclass(frozen=True)
class Request:
    """How to choose the specs: exactly one of budget, spec and plan.

    Attributes:
        bits: budget in stored bits per parameter of the whole model, 2 to 8.
        spec: one spec for every weight.
        plan: a plan file, or its parsed contents.
        is_strict: fail when the weight of a matmul would be left unquantized.
        passes: what to run between capture and pack instead, as values or names; a name that is in the
            usual pipeline means the pass there, with its options.
        disabled: names of passes to leave out.
        calibrate: on what to measure what errors cost: "auto" (where a budget is to be spent, text that a
            language model samples itself, random inputs of another model of transformers; otherwise nothing),
            "self", "random", "none", a UTF-8 text file, or int64 token ids ``(windows, length)``.
        agree: weights that a budget's plan gives one spec, see `kbitc.passes.allocate_bits.AllocateBits`.
    """

    bits: float | None = None
    spec: str | None = None
    plan: Path | Mapping[str, Any] | None = None
    is_strict: bool = False
    passes: Sequence[Pass | str] | None = None
    disabled: Sequence[str] = ()
    calibrate: Calibrate = AUTO
    agree: str = ""

    def __post_init__(self) -> None:
        given = [name for name in ("bits", "spec", "plan") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError(
                f"give exactly one of --bits, --spec and --plan; got {' and '.join(given) or 'none'}"
            )
        if self.bits is not None and not MIN_BUDGET <= self.bits <= MAX_BUDGET:
            raise UsageError(
                f"--bits {self.bits:g}: the budget must be between {MIN_BUDGET:g} and {MAX_BUDGET:g} "
                "stored bits per parameter"
            )
        if self.agree and self.agree not in KINDS:
            raise UsageError(f"--agree: {did_you_mean('kind of weights', self.agree, KINDS)}")
        if self.agree and self.bits is None:
            raise UsageError("--agree says how a budget is spent: it goes with --bits alone")

    def asks_for_outliers(self) -> bool:
        """Whether a spec that the user gave keeps outlier features."""
        if self.plan is None:
            spec = None if self.spec is None else parse(self.spec)
            return spec is not None and (spec.wants_found or spec.outliers > 0)
        return any("+out" in str(rule) for rule in self.rules.values())

    @cached_property
    def rules(self) -> Mapping[str, Any]:
        """The plan's entries by name or pattern; a file is read once.

        Raises:
            UsageError: it is no plan file.
        """
        assert self.plan is not None
        return self.plan if isinstance(self.plan, Mapping) else read_rules(self.plan)

    def planner(self) -> Pass:
        """The pass that makes the plan."""
        if self.bits is not None:
            return AllocateBits(budget=self.bits, agree=self.agree)
        if self.spec is not None:
            parse(self.spec)
            entry = {"spec": self.spec, "reason": f"uniform {self.spec}"}
            return ApplyPlan({"weights": {"*": entry}}, label="--spec")
        label = {} if isinstance(self.plan, Mapping) else {"label": str(self.plan)}
        return ApplyPlan(self.rules, **label)


def pipeline_of(request: Request) -> list[Pass]:
    """The passes between capture and pack, as the request edits them; :func:`equipped` once it is open.

    Raises:
        UsageError: an unknown or misplaced pass, no plan at the end, or a spec or plan that no pass reads.
    """
    planner = request.planner()
    usual: list[Pass] = [Canonicalize()]
    if _is_calibrated(request):
        usual += [MeasureMoments(), FindOutliers()]
    elif request.asks_for_outliers():
        usual.append(FindOutliers())
    if request.bits is not None:
        usual.append(ScoreSensitivity())
    passes = edit_pipeline([*usual, planner], request.passes, request.disabled)
    if request.bits is None and planner not in passes:
        option = "--spec" if request.spec is not None else "--plan"
        raise UsageError(
            f"{option} is what the pass '{name_of(planner)}' applies, which is not among the passes "
            f"{[name_of(pass_) for pass_ in passes]}; add it, or leave {option} out"
        )
    return passes


def _is_calibrated(request: Request) -> bool:
    if not isinstance(request.calibrate, str):
        return True
    return request.bits is not None if request.calibrate == AUTO else request.calibrate != NONE


def equipped(
    passes: Sequence[Pass], request: Request, calibrator: Calibrator | None, on_event: Event = lambda *_: None
) -> list[Pass]:
    """The passes with what only an open model has: the text to measure on, and someone to tell of progress.

    Args:
        passes: of :func:`pipeline_of`.
        request: the same.
        calibrator: None where there is no text; the usual passes that look at it are left out then.
        on_event: told of each weight that is scored.
    """
    found: list[Pass] = []
    is_measured = calibrator is not None and any(isinstance(pass_, MeasureMoments) for pass_ in passes)
    for pass_ in passes:
        if isinstance(pass_, ScoreSensitivity):
            found.append(replace(pass_, on_weight=on_event))
        elif isinstance(pass_, FindOutliers) and request.passes is None:
            if is_measured or request.asks_for_outliers():
                found.append(pass_)
        elif not isinstance(pass_, MeasureMoments) or pass_.calibrator is not None:
            found.append(pass_)
        elif calibrator is not None or request.passes is not None:
            found.append(replace(pass_, calibrator=calibrator))
    return found


def calibrator_of(request: Request, checkpoint: Checkpoint, on_event: Event) -> Calibrator | None:
    """What measures on the text that was asked for; None where there is none.

    Raises:
        UsageError: see :func:`kbitc.calibration.make_calibrator`.
    """
    return make_calibrator(checkpoint, request.calibrate, on_event, is_wanted=request.bits is not None)
