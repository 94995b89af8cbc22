"""Which passes a request runs, and what is checked of their plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

import kbitc
from kbitc.artifact.reader import Artifact
from kbitc.compiler import request as request_module
from kbitc.compiler.driver import compile_to
from kbitc.compiler.request import Request, pipeline_of, unmeasured
from kbitc.errors import BudgetError, UsageError
from kbitc.formats.spec import parse
from kbitc.graph.plan import Choice, Plan
from kbitc.graph.program import Stage
from kbitc.passes.allocate_bits import AllocateBits
from kbitc.passes.canonicalize import Canonicalize
from kbitc.passes.find_outliers import FindOutliers
from kbitc.passes.measure_moments import MeasureMoments
from kbitc.passes.score_sensitivity import ScoreSensitivity
from kbitc.pipeline.manager import PassManager
from kbitc.pipeline.registry import name_of
from kbitc.quantizers.absmax import Absmax
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
    assert pipeline_of(Request(bits=3.5, disabled=["find_outliers"])) == [*usual[:2], *usual[3:]]
    keep = FirstAt8Bits()
    request = Request(bits=3.5, passes=["canonicalize", "score_sensitivity", "allocate_bits", keep])
    assert pipeline_of(request) == [Canonicalize(), ScoreSensitivity(), AllocateBits(budget=3.5), keep]
    assert pipeline_of(replace(request, disabled=["first_at8_bits"])) == [usual[0], *usual[3:]]


def test_the_usual_passes_where_there_is_nothing_to_measure_on():
    request = Request(bits=3.5)
    without = PassManager(pipeline_of(request)).without(unmeasured(request)).passes
    assert without == (Canonicalize(), ScoreSensitivity(), AllocateBits(budget=3.5))
    # Outlier features by weights alone cost a reading of the model: nobody asked for that.
    assert tuple(pipeline_of(replace(request, disabled=["measure_moments"]))) == without
    asked = Request(spec="nf4:64+out", calibrate="random", disabled=["measure_moments"])
    assert [name_of(pass_) for pass_ in pipeline_of(asked)] == ["canonicalize", "find_outliers", "apply_plan"]
    assert unmeasured(replace(asked, disabled=())) == ("measure_moments",)
    # Who names the pass wants it: it says itself that it has no text.
    named = replace(request, passes=["canonicalize", "measure_moments", "score_sensitivity", "allocate_bits"])
    assert unmeasured(named) == ()
    with pytest.raises(UsageError, match="'measure_moments' has nothing to measure on"):
        inputs = {"example_inputs": (torch.zeros(1, 256),), "calibrate": "none"}
        kbitc.compile(model(), 3.5, passes=named.passes, **inputs)


def test_scoring_and_a_plan_file_are_told_and_read_once(tmp_path, monkeypatch):
    events, reads = [], []
    monkeypatch.setattr(
        request_module, "read_rules", lambda path: reads.append(path) or {"weights": {"*": "nf4:64"}}
    )
    options = {"example_inputs": (torch.zeros(1, 256),), "on_progress": lambda *e: events.append(e)}
    out = tmp_path / "out"
    compile_to(model(), out, Request(plan=tmp_path / "p.json"), is_dry=True, **options)
    assert len(reads) == 1
    compile_to(model(), out, Request(bits=4.0, calibrate="none"), is_dry=True, **options)
    sizes = [weight.numel() for weight in model().parameters() if weight.dim() == 2]
    priced = [event for event in events if event[0].startswith("pricing")]
    assert priced == [
        ("pricing 0.weight", sizes[0], sum(sizes)),
        ("pricing 2.weight", sum(sizes), sum(sizes)),
    ]


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


def test_a_module_that_is_also_written_is_quantized_once(tiny_model, tmp_path, monkeypatch):
    quantized, encoded = [], []
    absmax, encode = Absmax.quantize, torch.ops.kbit.encode
    monkeypatch.setattr(Absmax, "quantize", lambda *given: quantized.append(given[-1].name) or absmax(*given))
    monkeypatch.setattr(torch.ops.kbit, "encode", lambda *given: encoded.append(1) or encode(*given))
    source = tiny_model("gpt2")
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    packed = kbitc.compile(source, spec="nf4:32", out=tmp_path / "out")
    artifact = Artifact.open(tmp_path / "out")
    assert sorted(quantized) == sorted(artifact.specs)
    assert len(encoded) == len(artifact.specs)
    artifact.verify()
    state = artifact.state()
    for name in artifact.specs:
        mine, stored = packed.get_parameter(name), state[name]
        assert (mine.spec, mine.dtype, mine.is_transposed) == (
            stored.spec,
            stored.dtype,
            stored.is_transposed,
        )
        for field, tensor in stored.packed.tensors().items():
            assert torch.equal(getattr(mine.packed, field), tensor)
    assert packed.lm_head.weight is packed.transformer.wte.weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())
