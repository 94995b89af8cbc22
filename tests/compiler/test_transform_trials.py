"""Equalisation and rotation on, off, or as held-out inputs say."""

from __future__ import annotations

import json
import math

import pytest
import torch

import kbitc
from kbitc.artifact.folders import PLAN_FILE
from kbitc.artifact.reader import Artifact
from kbitc.checkpoint import open_checkpoint
from kbitc.compiler import transform_trials
from kbitc.compiler.calibrator import Calibrator
from kbitc.compiler.driver import compile_to
from kbitc.compiler.modules import plan_module
from kbitc.compiler.request import Request, pipeline_of
from kbitc.compiler.transform_trials import divergence, held_out, stored_reader
from kbitc.errors import UsageError
from kbitc.pipeline.registry import name_of
from kbitc.tensor.kbit_tensor import KbitTensor

SPEC = "int3:32"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("kbitc.compiler.calibrator.cache_folder", lambda: tmp_path)


@pytest.fixture
def uneven(tiny_model):
    """A model whose columns differ by up to 2 ** 6 where nobody but the next weight sees it."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            sizes = (torch.arange(75) % 7).exp2()
            layer.mlp.up_proj.weight.mul_(sizes[:, None])
            layer.mlp.down_proj.weight.div_(sizes)
    return model


def names(request):
    return [name_of(pass_) for pass_ in pipeline_of(request)]


def test_where_they_run():
    both = {"equalize": "on", "rotate": "on"}
    budget = ["canonicalize", "rotate", "measure_moments", "equalize", "find_outliers", "score_sensitivity"]
    assert names(Request(4.0, **both)) == [*budget, "allocate_bits"]
    assert names(Request(spec="nf4:64", equalize="auto"))[1:3] == ["measure_moments", "equalize"]
    assert not {"equalize", "rotate"} & {*names(Request(4.0)), *names(Request(spec="nf4:64"))}


@pytest.mark.parametrize(
    ("request_", "spec"),
    [
        (Request(3.9, equalize="on"), "nf3:64+dq"),
        (Request(2.0, equalize="on"), "nf2:64+dq"),
        (Request(spec="int5:32+out1%", equalize="on"), "int5:32"),
        (
            Request(plan={"weights": {"*a*": "fp16", "*b*": {"spec": "int3:32+out"}}}, equalize="on"),
            "int3:32",
        ),
        (Request(plan={"weights": {"*": "fp16"}}, equalize="on"), "nf4:64+dq"),
    ],
)
def test_weights_are_tried_under_what_is_asked_for(request_, spec):
    assert next(pass_ for pass_ in pipeline_of(request_) if name_of(pass_) == "equalize").spec == spec


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Request(4.0, rotate="yes"), "--rotate: no choice 'yes'"),
        (lambda: Request(4.0, equalize="on", passes=["canonicalize"]), "name 'equalize' among --passes"),
        (
            lambda: pipeline_of(Request(4.0, equalize="auto", calibrate="none")),
            "--calibrate none: --equalize",
        ),
    ],
)
def test_what_cannot_be_asked_for(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_auto_takes_what_brings_the_model_closer(uneven, tmp_path):
    request = Request(spec=SPEC, equalize="auto", rotate="auto", calibrate="self")
    result = compile_to(uneven, tmp_path / "out", request)
    by = {trial.transforms: trial.divergence for trial in result.trials}
    best = min(by, key=by.get)
    assert () in by
    assert ("rotate",) in by
    assert len(by) == 3
    assert "equalize" in best
    assert by[best] < 0.9 * by[()]
    assert ("equalize" in result.fusions, "rotate" in result.fusions) == (True, "rotate" in best)
    assert [trial["transforms"] for trial in result.to_json()["trials"]][0] == ()
    ran = [step["name"] for step in json.loads((tmp_path / "out" / PLAN_FILE).read_text())["passes"]]
    assert set(best) == {"equalize", "rotate"} & {*ran}
    # What was judged is what lies in the artifact.
    stored = Artifact.open(tmp_path / "out").state()
    with open_checkpoint(uneven) as checkpoint:
        judged = stored_reader(result.program, Calibrator(checkpoint, "random").read)
        for name, value in stored.items():
            dense = value.dequantize(torch.float32) if isinstance(value, KbitTensor) else value.float()
            if name in {*result.program.weights, *result.program.rest}:
                torch.testing.assert_close(judged(name).float(), dense, rtol=1e-3, atol=1e-6)


def test_auto_leaves_what_does_not_help(tiny_model, monkeypatch):
    said = iter([0.1, 0.1])  # no better is no reason
    monkeypatch.setattr(transform_trials, "divergence", lambda *_: next(said))
    program = plan_module(tiny_model("llama"), Request(spec=SPEC, rotate="auto", calibrate="self"))
    assert "rotate" not in program.history


def test_a_model_that_cannot_turn_is_not_tried_twice(tiny_model, tmp_path):
    request = Request(spec=SPEC, rotate="auto", calibrate="self")
    result = compile_to(tiny_model("gpt2"), tmp_path / "out", request, is_dry=True)
    assert [trial.transforms for trial in result.trials] == [()]
    assert "rotate" not in result.program.history


def test_on_is_done_whatever_it_does(uneven):
    packed = kbitc.compile(uneven, spec="int8:32", equalize="on", rotate="on")
    assert (
        packed.get_parameter("model.norm.weight").tolist()
        != uneven.get_parameter("model.norm.weight").tolist()
    )
    ids = torch.arange(12)[None]
    with torch.no_grad():
        wanted = uneven(ids).logits
        assert (packed(ids).logits - wanted).norm() < 0.03 * wanted.norm()


def test_divergence_is_that_of_the_packed_model(uneven):
    """Against the plain definition: both models run dense in float32, their distributions compared in float64."""
    request = Request(spec=SPEC, equalize="on", calibrate="self")
    with open_checkpoint(uneven) as checkpoint:
        source = Calibrator(checkpoint, "self")
        feeds = held_out(source)
    program = plan_module(uneven, request)
    packed = kbitc.compile(uneven, spec=SPEC, equalize="on", calibrate="self")
    assert program.context.calibration is not None
    total = []
    with torch.no_grad():
        for feed in feeds:
            one = uneven(**feed).logits.double().log_softmax(-1)
            other = packed(**feed).logits.double().log_softmax(-1)
            total.append(float((one.exp() * (one - other)).sum(-1).mean()))
    assert math.isclose(divergence(program, feeds), sum(total) / len(total), rel_tol=0.02)


def test_other_models_are_judged_by_their_outputs(tiny_model):
    model = tiny_model("roberta")
    with open_checkpoint(model) as checkpoint:
        feeds = held_out(Calibrator(checkpoint, "random"))
    coarse, fine = (
        divergence(plan_module(model, Request(spec=spec, equalize="on", calibrate="random")), feeds)
        for spec in (SPEC, "int8:32")
    )
    assert 0 < fine < 0.01 * coarse < 0.01


def test_what_is_held_out_was_not_measured_on(tiny_model):
    with open_checkpoint(tiny_model("llama")) as checkpoint:
        source = Calibrator(checkpoint, "self")
        fitted = [feed["input_ids"].tolist() for feed in source.feeds()]
        held = [feed["input_ids"].tolist() for feed in held_out(source)]
        assert len(held) == transform_trials.HELD_OUT
        assert not any(window in fitted for window in held)
        given = Calibrator(checkpoint, torch.randint(101, (2, 16)))
        with pytest.raises(UsageError, match="nothing beside to hold out"):
            held_out(given)
