"""What is asked of a compilation, and the passes that answer it.

The one thing to know: a request is checked, and its passes are chosen, before the model is opened. Where the
model turns out to have nothing to measure on, :func:`unmeasured` says which of the passes are left out.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from kbitc.compiler.calibrator import AUTO, NONE, Calibrate
from kbitc.errors import UsageError, did_you_mean
from kbitc.formats.datatypes import find_family
from kbitc.formats.spec import parse_wish
from kbitc.graph.plan import checked, read_rules
from kbitc.graph.queries import KINDS
from kbitc.pipeline.defaults import planning_pipeline
from kbitc.pipeline.order import edit_pipeline
from kbitc.pipeline.registry import Pass, name_of, provided
from kbitc.planning.allocation import DEFAULT_BUDGET, check_budget
from kbitc.planning.target import Target
from kbitc.quantizers import AUTO as ANY_QUANTIZER
from kbitc.quantizers import find_quantizer
from kbitc.replay import choice, ordered
from kbitc.sensitivity.moments import MOMENTS

OFF, ON, AS_MEASURED = "off", "on", "auto"
TRANSFORMS = ("rotate", "equalize")
"""Passes that change weights and not the function, in their order; each is an attribute of a request."""


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
            language model samples itself, random inputs of another model of transformers or of one that
            cannot sample; otherwise nothing), "self", "random", "none", a UTF-8 text file, or int64 token ids
            ``(windows, length)``; text and ids for every model that takes them.
        agree: weights that a budget's plan gives one spec, see `kbitc.passes.allocate_bits.AllocateBits`.
        quantizer: name of what packs the weights, see `kbitc.quantizers`; "auto" leaves it to the plan, and
            the plan to what is known of each weight.
        equalize: scale features between weights, see `kbitc.passes.equalize`: "off", "on", or "auto": as
            held-out inputs say, see `kbitc.compiler.transform_trials`.
        rotate: the same of turning the residual stream, see `kbitc.passes.rotate`.
        target: another program that is to hold the weights: a budget is in bytes of its file.
        types: families of data types that a budget may choose from; empty for all.
    """

    bits: float | None = None
    spec: str | None = None
    plan: Path | Mapping[str, Any] | None = None
    is_strict: bool = False
    passes: Sequence[Pass | str] | None = None
    disabled: Sequence[str] = ()
    calibrate: Calibrate = AUTO
    agree: str = ""
    quantizer: str = ANY_QUANTIZER
    equalize: str = OFF
    rotate: str = OFF
    target: Target | None = None
    types: Sequence[str] = ()

    def __post_init__(self) -> None:
        given = [name for name in ("bits", "spec", "plan") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError(
                f"give exactly one of --bits, --spec and --plan; got {' and '.join(given) or 'none'}"
            )
        if self.bits is not None:
            check_budget(self.bits)
        if self.agree and self.agree not in KINDS:
            raise UsageError(f"--agree: {did_you_mean('kind of weights', self.agree, KINDS)}")
        if self.agree and self.bits is None:
            raise UsageError("--agree says how a budget is spent: it goes with --bits alone")
        if self.types and self.bits is None:
            raise UsageError("--types says what a budget may choose from: it goes with --bits alone")
        for family in self.types:
            find_family(family)
        if self.quantizer != ANY_QUANTIZER:
            find_quantizer(self.quantizer)
        for name in TRANSFORMS:
            mode = getattr(self, name)
            if mode not in (OFF, ON, AS_MEASURED):
                raise UsageError(f"--{name}: {did_you_mean('choice', mode, (OFF, ON, AS_MEASURED))}")
            if mode != OFF and self.passes is not None:
                raise UsageError(f"--{name} is for the usual passes; name '{name}' among --passes instead")

    @classmethod
    def of(
        cls,
        bits: float | None = None,
        spec: str | None = None,
        plan: Path | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Request:
        """A request; of the default budget where neither budget, spec nor plan is given."""
        is_open = bits is None and spec is None and plan is None
        return cls(DEFAULT_BUDGET if is_open else bits, spec, plan, **options)

    @cached_property
    def quantizers(self) -> frozenset[str]:
        """The quantizers that are named, here or in the plan; "" where one is left open."""
        named = {self.quantizer}
        if self.quantizer == ANY_QUANTIZER and self.plan is not None:
            entries = self.rules["weights"].values()
            named = {str(e.get("quantizer", "")) if isinstance(e, Mapping) else "" for e in entries}
        return frozenset("" if name == ANY_QUANTIZER else name for name in named)

    def needs_moments(self) -> bool:
        """Whether a quantizer that is named needs what calibration measures."""
        return any(MOMENTS in find_quantizer(name).requires for name in self.quantizers - {""})

    def most_inputs(self, parameters: int) -> int | None:
        """How many inputs a quantizer may ask the calibration for; None for as many as measuring takes.

        Args:
            parameters: of the model.
        """
        is_open = "" in self.quantizers and parameters <= choice.LIMIT
        if is_open or any(map(choice.goes_in_order, self.quantizers)):
            return ordered.FITTED + ordered.HELD_OUT
        return None

    def is_measured(self) -> bool:
        """Whether something is measured for it, if the model has something to measure on."""
        if not isinstance(self.calibrate, str):
            return True
        return self.wants_moments() if self.calibrate == AUTO else self.calibrate != NONE

    def wants_moments(self) -> bool:
        """Whether measuring is worth its time where the user says nothing of it."""
        return self.bits is not None or self.needs_moments() or bool(self.transforms())

    def transforms(self) -> tuple[str, ...]:
        """Names of the transforms that may be made."""
        return tuple(name for name in TRANSFORMS if getattr(self, name) != OFF)

    def asks_for_outliers(self) -> bool:
        """Whether a spec that the user gave keeps outlier features."""
        if self.plan is None:
            wish = None if self.spec is None else parse_wish(self.spec)
            return wish is not None and (wish.keeps_outliers or wish.spec.outliers > 0)
        return any("+out" in str(rule) for rule in self.rules.values())

    @cached_property
    def rules(self) -> Mapping[str, Any]:
        """The plan's entries by name or pattern; a file is read once.

        Raises:
            UsageError: it is no plan.
        """
        assert self.plan is not None
        return checked(self.plan, "plan") if isinstance(self.plan, Mapping) else read_rules(self.plan)

    def options(self) -> dict[str, dict[str, Any]]:
        """Options of the default passes, by the passes' names."""
        quantizer = "" if self.quantizer == ANY_QUANTIZER else self.quantizer
        equalize = {"equalize": {"spec": self._typical_spec()}}
        return equalize | self._planning_options(quantizer)

    def _typical_spec(self) -> str:
        """What a weight is tried under before there is a plan: of a given one what it says most often."""
        count: Counter[str] = Counter()
        entries = (
            [self.spec] if self.spec is not None else self.rules["weights"].values() if self.plan else []
        )
        for entry in entries:
            text = entry.get("spec") if isinstance(entry, Mapping) else entry
            with contextlib.suppress(UsageError):  # who applies the plan says what is wrong with it
                count[str(replace(parse_wish(str(text)).spec, outliers=0.0))] += 1
        del count["fp16"]
        return count.most_common(1)[0][0] if count else f"nf{math.floor(self.bits or DEFAULT_BUDGET)}:64+dq"

    @property
    def _together(self) -> str:
        return self.agree or (self.target.agree if self.target is not None else "")

    def _planning_options(self, quantizer: str) -> dict[str, dict[str, Any]]:
        if self.bits is not None:
            return {
                "score_sensitivity": {"quantizer": quantizer, "target": self.target, "types": self.types},
                "allocate_bits": {"budget": self.bits, "agree": self._together, "quantizer": quantizer},
            }
        if self.spec is not None:
            parse_wish(self.spec)
            entry = {"spec": self.spec, "reason": f"uniform {self.spec}"}
            rules: Mapping[str, Any] = {"weights": {"*": entry}}
            return {"apply_plan": {"rules": rules, "label": "--spec", "quantizer": quantizer}}
        label = {} if isinstance(self.plan, Mapping) else {"label": str(self.plan)}
        return {"apply_plan": {"rules": self.rules, "quantizer": quantizer, **label}}


def pipeline_of(request: Request) -> list[Pass]:
    """The passes between capture and pack, as the request edits them.

    Raises:
        UsageError: an unknown or misplaced pass, no plan at the end, a spec or plan that no pass reads, or a
            quantizer that needs measuring where there is to be none.
    """
    if request.needs_moments() and not request.is_measured():
        raise UsageError(
            "--calibrate none: the quantizer that was asked for, or that the plan names, needs calibration; "
            "calibrate with self, random or a text, or give --quantizer absmax"
        )
    if request.transforms() and not request.is_measured():
        raise UsageError(
            f"--calibrate none: --{request.transforms()[0]} proves on inputs that the model stays the same "
            "function; calibrate with self, random or a text"
        )
    usual = planning_pipeline(
        with_budget=request.bits is not None,
        is_measured=request.is_measured(),
        finds_outliers=request.asks_for_outliers(),
        transforms=request.transforms(),
        options=request.options(),
    )
    passes = edit_pipeline(usual, request.passes, request.disabled)
    if request.passes is None and "measure_moments" in request.disabled and not request.asks_for_outliers():
        # Outlier features by weights alone cost a reading of the model: nobody asked for that.
        passes = [pass_ for pass_ in passes if name_of(pass_) != "find_outliers"]
    if request.needs_moments() and not any(MOMENTS in provided(pass_) for pass_ in passes):
        raise UsageError(
            f"the quantizer that was asked for, or that the plan names, needs the fact '{MOMENTS}', which "
            f"none of the passes {[name_of(pass_) for pass_ in passes]} provides; add measure_moments, or "
            "give --quantizer absmax"
        )
    planner = usual[-1]
    if request.bits is None and planner not in passes:
        option = "--spec" if request.spec is not None else "--plan"
        raise UsageError(
            f"{option} is what the pass '{name_of(planner)}' applies, which is not among the passes "
            f"{[name_of(pass_) for pass_ in passes]}; add it, or leave {option} out"
        )
    return passes


def unmeasured(request: Request) -> tuple[str, ...]:
    """The default passes that are left out where the model has nothing to measure on.

    Who names passes gets them, and hears from them what they lack.

    Raises:
        UsageError: a quantizer that needs it is named.
    """
    if request.passes is not None:
        return ()
    if request.needs_moments():
        raise UsageError(
            "this model has nothing to calibrate on by itself, which the quantizer that was asked for, or "
            "that the plan names, needs; calibrate on token ids, or give --quantizer absmax"
        )
    on = [name for name in request.transforms() if getattr(request, name) == ON]
    if on:
        raise UsageError(
            f"--{on[0]}: this model has nothing to calibrate on by itself, on which it could be proven that "
            "it stays the same function; calibrate on token ids, or give example inputs"
        )
    kept = request.asks_for_outliers()
    measuring = ("measure_moments",) if kept else ("measure_moments", "find_outliers")
    return (*measuring, *request.transforms())
