"""Which quantizer packs: what the request names, what the plan names, or the strongest there is evidence for."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import kbitc
from kbitc.artifact.reader import Artifact
from kbitc.compiler.driver import compile_to
from kbitc.compiler.request import Request, pipeline_of
from kbitc.errors import UsageError
from kbitc.formats.spec import parse
from kbitc.quantizers import find_quantizer, quantize_weight
from kbitc.quantizers.weighted import Weighted
from kbitc.sensitivity.sampled_error import Sample
from kbitc.sensitivity.score_table import ScoreTable

IDS = torch.randint(101, (3, 16), generator=torch.Generator().manual_seed(3))
WEIGHTED = {"weights": {"*.up_proj.*": {"spec": "int3:32", "quantizer": "weighted"}, "*": "int3:32"}}


@pytest.fixture(autouse=True)
def _small(tmp_path, monkeypatch):
    # Not KBITC_CACHE: the compiled kernels lie there, too.
    monkeypatch.setattr("kbitc.compiler.calibrator.cache_folder", lambda: tmp_path / "cache")
    few = tuple(map(parse, ("int2:32", "int3:32", "int4:32")))
    monkeypatch.setattr("kbitc.passes.score_sensitivity.default_candidates", lambda: few)


def compiled(model, tmp_path, **options):
    compile_to(model, tmp_path / "out", Request(**options), is_forced=True)
    return Artifact.open(tmp_path / "out").plan


def quantizers(plan):
    return {entry.choice.quantizer for entry in plan.packed.values()}


@pytest.mark.parametrize(
    "options",
    [{"plan": WEIGHTED}, {"spec": "int3:32", "quantizer": "weighted"}, {"bits": 4, "quantizer": "weighted"}],
)
def test_without_calibration_a_quantizer_that_needs_it_is_an_error_that_says_what_to_do(options, tmp_path):
    message = r"--calibrate none: the quantizer .* needs .*calibrate with self, random or a text, or give --quantizer absmax"
    with pytest.raises(UsageError, match=message):
        kbitc.compile(str(tmp_path / "never opened"), calibrate="none", **options)


def test_passes_without_a_measurement_are_said_too():
    passes = ["canonicalize", "apply_plan"]
    for changed in ({"passes": passes}, {"disabled": ["measure_moments"]}):
        with pytest.raises(
            UsageError, match="needs the fact 'moments', which none of the passes .* provides"
        ):
            pipeline_of(Request(plan=WEIGHTED, **changed))
    assert pipeline_of(Request(plan=WEIGHTED, quantizer="absmax", passes=passes))


def test_a_model_with_nothing_to_calibrate_on_says_so():
    class Sum(nn.Linear):
        def forward(self, *xs):
            return super().forward(sum(xs))

    model = Sum(64, 64).requires_grad_(False)
    with pytest.raises(UsageError, match="nothing to calibrate on by itself.*give --quantizer absmax"):
        kbitc.compile(model, spec="int3:32", quantizer="weighted", example_inputs=(torch.zeros(1, 64),))


def test_a_plan_that_names_one_is_calibrated_for_it(tiny_model, tmp_path):
    plan = compiled(tiny_model("llama"), tmp_path, plan=WEIGHTED)
    assert "that the model sampled itself" in plan.calibration
    # What the plan leaves open takes the strongest that there is evidence for.
    used = {name: entry.choice.quantizer for name, entry in plan.packed.items()}
    assert {quantizer for name, quantizer in used.items() if "up_proj" in name} == {"weighted"}
    assert {quantizer for name, quantizer in used.items() if "up_proj" not in name} == {"feedback"}
    assert compiled(tiny_model("llama"), tmp_path, plan={"weights": {"*": "int3:32"}}).calibration is None


def test_what_a_plan_says_is_used_where_more_is_known(tiny_model, tmp_path):
    rules = {"weights": {"*.up_proj.*": {"spec": "int3:32", "quantizer": "absmax"}, "*": "int3:32"}}
    plan = compiled(tiny_model("llama"), tmp_path, plan=rules, calibrate=IDS)
    for name, entry in plan.weights.items():
        assert entry.choice.quantizer == ("absmax" if "up_proj" in name else "feedback")


def test_an_artifacts_own_plan_packs_the_same_again(tiny_model, tmp_path):
    first = compiled(tiny_model("llama"), tmp_path, bits=5, calibrate=IDS)
    assert quantizers(first) == {"feedback"}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(first.to_json()))
    assert compiled(tiny_model("llama"), tmp_path, plan=path, calibrate=IDS).checksums == first.checksums


def test_absmax_prices_and_packs_although_moments_are_known(tiny_model, tmp_path, monkeypatch):
    model = tiny_model("llama")
    searched = compiled(model, tmp_path, bits=5, calibrate=IDS, quantizer="weighted")
    dear = ScoreTable.open(tmp_path / "out")
    assert quantizers(searched) == {"weighted"}

    def never(*_):
        raise AssertionError("weighted was asked")

    monkeypatch.setattr(Weighted, "quantize", never)
    plan = compiled(model, tmp_path, bits=5, calibrate=IDS, quantizer="absmax")
    scores = ScoreTable.open(tmp_path / "out")
    assert quantizers(plan) == {"absmax"}
    assert scores.source == dear.source == "fisher"
    state = Artifact.open(tmp_path / "out").state()
    absmax = find_quantizer("absmax").quantize
    for name, entry in plan.packed.items():
        weight = model.get_parameter(name).detach()
        own = quantize_weight(weight, entry.spec)
        assert all(torch.equal(t, getattr(state[name].packed, field)) for field, t in own.tensors().items())
        for option in scores.options[name]:
            price, error = Sample.of(weight, None).price(option.spec, None, absmax)
            assert (price, option.error) == (None, pytest.approx(error, rel=1e-4))
    cost = {id(table): sum(o.cost for own in table.options.values() for o in own) for table in (scores, dear)}
    assert cost[id(dear)] < cost[id(scores)]


def test_an_unknown_quantizer_is_said_before_the_model_is_opened(tmp_path):
    with pytest.raises(UsageError, match="no quantizer 'weigthed'; did you mean 'weighted'"):
        kbitc.compile(str(tmp_path / "never opened"), spec="int3:32", quantizer="weigthed")
