"""Compiling with a quantizer that goes through the graph: from the request to the bytes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import kbitc
from kbitc.artifact.writer import Writer
from kbitc.compiler.driver import compile_to
from kbitc.compiler.request import Request
from kbitc.errors import UsageError

SPEC = "int3:32+zp"


def made(source, out, quantizer="feedback", calibrate="random", spec=SPEC, **options):
    request = Request.of(None, spec, None, calibrate=calibrate, quantizer=quantizer)
    compile_to(source, out, request, **options)
    return load_file(out / "model.safetensors")


def quantizers(out):
    weights = json.loads((out / "kbit_plan.json").read_text())["weights"]
    return {name: entry["quantizer"] for name, entry in weights.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "t5", "clip"])
def test_every_weight_that_the_graph_shows_is_packed_with_feedback(tiny_model, family, tmp_path):
    made(tiny_model(family), tmp_path / "out")
    used = quantizers(tmp_path / "out")
    assert set(used.values()) <= {"feedback", "weighted"}
    assert list(used.values()).count("feedback") > 0.7 * len(used)


def test_auto_takes_it_where_something_was_measured(tiny_model, tmp_path):
    made(tiny_model("llama"), tmp_path / "measured", quantizer="auto")
    assert set(quantizers(tmp_path / "measured").values()) == {"feedback"}
    made(tiny_model("llama"), tmp_path / "plain", quantizer="auto", calibrate="none")
    assert set(quantizers(tmp_path / "plain").values()) == {"absmax"}


def test_auto_leaves_large_models_to_the_quicker_one(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("kbitc.replay.choice.LIMIT", 10)
    made(tiny_model("llama"), tmp_path / "out", quantizer="auto")
    assert set(quantizers(tmp_path / "out").values()) == {"weighted"}


def test_what_is_named_and_cannot_be_is_an_error(tiny_model, tmp_path):
    with pytest.raises(UsageError, match="needs calibration"):
        made(tiny_model("llama"), tmp_path / "out", calibrate="none")
    assert not (tmp_path / "out").exists()


def test_cores_change_no_byte(tiny_model, tmp_path):
    threads = torch.get_num_threads()
    first = made(tiny_model("mixtral"), tmp_path / "many")
    try:
        torch.set_num_threads(1)
        again = made(tiny_model("mixtral"), tmp_path / "one")
    finally:
        torch.set_num_threads(threads)
    assert same(first, again)


@pytest.mark.parametrize("after", [1, 6, 13])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tiny_model, tmp_path, monkeypatch, after):
    whole = made(tiny_model("llama"), tmp_path / "whole")
    put, count = Writer.put, 0

    def stopped(self, *args):
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        put(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "put", stopped)
        with pytest.raises(KeyboardInterrupt):
            made(tiny_model("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = made(tiny_model("llama"), tmp_path / "out", is_resumed=True)
    assert same(whole, again)


def test_a_module_in_memory_gets_what_a_file_gets(tiny_model, tmp_path):
    model = tiny_model("llama")
    stored = made(model, tmp_path / "out")
    packed = kbitc.compile(model, spec=SPEC, calibrate="random", quantizer="feedback")
    weight = packed.get_parameter("model.layers.1.mlp.down_proj.weight")
    assert torch.equal(weight.packed.planes, stored["model.layers.1.mlp.down_proj.weight.planes"])


def test_a_budget_is_priced_for_the_quantizer_that_will_run(tiny_model, tmp_path):
    tables = {}
    for quantizer in ("weighted", "feedback"):
        request = Request.of(4.5, calibrate="random", quantizer=quantizer)
        compile_to(tiny_model("llama"), tmp_path / quantizer, request)
        tables[quantizer] = json.loads((tmp_path / quantizer / "kbit_scores.json").read_text())
    assert tables["feedback"]["quantizer"] == "feedback"
    for name, entry in tables["feedback"]["weights"].items():
        plain = {spec: cost for spec, _, cost, _ in tables["weighted"]["weights"][name]["options"]}
        own = {spec: cost for spec, _, cost, _ in entry["options"]}
        assert len(own) > 4
        assert set(own) < set(plain)
        assert all(own[spec] != plain[spec] for spec in own if spec != "fp16")


@pytest.mark.parametrize("family", ["mixtral", "t5"])
def test_outputs_are_nearer_than_with_searched_scales(tiny_model, family, tmp_path, monkeypatch):
    """On inputs that nothing was fitted to, of models of random weights."""
    monkeypatch.setattr("kbitc.replay.ordered.FITTED", 24)
    monkeypatch.setattr("kbitc.replay.ordered.HELD_OUT", 6)
    monkeypatch.setattr("kbitc.compiler.calibrator.COUNT", 8)
    model = tiny_model(family).float()
    errors = {}
    generator = torch.Generator().manual_seed(17)
    ids = torch.randint(3, 40, (12, 16), generator=generator)
    feed = {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if family == "t5" else {})
    for quantizer in ("weighted", "feedback"):
        packed = kbitc.compile(model, spec=SPEC, calibrate="random", quantizer=quantizer)
        with torch.no_grad():
            wanted, got = model(**feed).logits.log_softmax(-1), packed(**feed).logits.log_softmax(-1)
        errors[quantizer] = float((wanted.exp() * (wanted - got)).sum(-1).mean())
    assert errors["feedback"] < errors["weighted"]
