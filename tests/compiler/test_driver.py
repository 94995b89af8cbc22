"""Which passes a request runs, and what is checked of their plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

import kbitc
from kbitc.compiler.driver import compile_to
from kbitc.compiler.request import Request, equipped, pipeline_of
from kbitc.errors import BudgetError, UsageError
from kbitc.formats.spec import parse
from kbitc.graph.plan import Choice, Plan
from kbitc.graph.program import Stage
from kbitc.passes.allocate_bits import AllocateBits
from kbitc.passes.canonicalize import Canonicalize
from kbitc.passes.find_outliers import FindOutliers
from kbitc.passes.measure_moments import MeasureMoments
from kbitc.passes.score_sensitivity import ScoreSensitivity
from kbitc.tensor.kbit_tensor import KbitTensor


@dataclass(frozen=True)
class FirstAt8Bits:
    needs: ClassVar[Stage] = Stage.PLANNED
    gives: ClassVar[Stage] = Stage.PLANNED

    def run(self, program):
        first = {next(iter(program.weights)): Choice(parse("int8:32"), "first")}
        return replace(program, plan=Plan({**program.plan.weights, **first}, program.plan.budget))


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).requires_grad_(False)


def test_the_passes_of_a_request():
    usual = [
        Canonicalize(),
        MeasureMoments(),
        FindOutliers(),
        ScoreSensitivity(),
        AllocateBits(budget=3.5),
    ]
    assert pipeline_of(Request(bits=3.5)) == usual
    assert pipeline_of(Request(bits=3.5, calibrate="none")) == [usual[0], *usual[3:]]
    assert pipeline_of(Request(bits=3.5, disabled=["measure_moments"])) == [usual[0], *usual[2:]]
    keep = FirstAt8Bits()
    request = Request(bits=3.5, passes=["canonicalize", "score_sensitivity", "allocate_bits", keep])
    assert pipeline_of(request) == [Canonicalize(), ScoreSensitivity(), AllocateBits(budget=3.5), keep]
    assert pipeline_of(replace(request, disabled=["first_at8_bits"])) == [usual[0], *usual[3:]]


def test_passes_are_equipped_once_the_model_is_open():
    def told(*_):
        return None

    request = Request(bits=3.5)
    without = equipped(pipeline_of(request), request, None, told)
    assert without == [Canonicalize(), ScoreSensitivity(on_weight=told), AllocateBits(budget=3.5)]
    text = object()
    assert equipped(pipeline_of(request), request, text)[1] == MeasureMoments(text)
    # Outlier features by weights alone cost a reading of the model: nobody asked for that.
    unmeasured = replace(request, disabled=["measure_moments"])
    assert equipped(pipeline_of(unmeasured), unmeasured, text, told) == without
    # Who names the pass wants it: it says itself that it has no text.
    named = replace(request, passes=["canonicalize", "measure_moments", "score_sensitivity", "allocate_bits"])
    assert equipped(pipeline_of(named), named, None)[1] == MeasureMoments()


def test_scoring_and_a_plan_file_are_told_and_read_once(tmp_path, monkeypatch):
    events, reads = [], []
    monkeypatch.setattr(
        request_module, "read_rules", lambda path: reads.append(path) or {"weights": {"*": "nf4:64"}}
    )
    options = {"example_inputs": (torch.zeros(1, 256),), "on_progress": lambda *e: events.append(e)}
    out = tmp_path / "out"
    compile_to(model(), out, Request(plan=tmp_path / "p.json"), is_dry=True, **options)
    assert len(reads) == 1
    compile_to(model(), out, Request(bits=4.0), is_dry=True, **options)
    assert [event for event in events if event[2]] == [("0.weight", 1, 2), ("2.weight", 2, 2)]


def test_a_spec_that_no_pass_reads_is_an_error():
    with pytest.raises(UsageError, match=r"--spec is what the pass 'apply_plan' applies, which is not among"):
        pipeline_of(Request(spec="nf4:64", passes=["canonicalize", "score_sensitivity", "allocate_bits"]))


def test_a_pass_of_ones_own_runs_in_compile():
    passes = ["canonicalize", "apply_plan", FirstAt8Bits()]
    packed = kbitc.compile(model(), spec="nf4:64", passes=passes, example_inputs=(torch.zeros(1, 256),))
    weights = [p for p in packed.parameters() if isinstance(p, KbitTensor)]
    assert [str(weight.packed.spec) for weight in weights] == ["int8:32", "nf4:64"]


def test_a_pass_cannot_break_the_budget():
    passes = ["canonicalize", "score_sensitivity", "allocate_bits", FirstAt8Bits()]
    with pytest.raises(
        BudgetError, match=r"--bits 4: the passes .*'first_at8_bits'\] ended with a plan of [67]\.\d+ stored"
    ):
        kbitc.compile(model(), 4, passes=passes, example_inputs=(torch.zeros(1, 256),))
