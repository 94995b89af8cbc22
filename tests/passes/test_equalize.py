"""Features with a scale of their own: the same model, whose tensors are read changed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import kbitc
from kbitc.artifact.folders import PLAN_FILE
from kbitc.artifact.reader import Artifact
from kbitc.checkpoint import open_checkpoint
from kbitc.compiler.calibrator import Calibrator
from kbitc.compiler.driver import compile_to
from kbitc.compiler.request import Request
from kbitc.errors import PassError, UsageError
from kbitc.graph.capture import capture
from kbitc.graph.context import Context
from kbitc.graph.feature_flow import flows
from kbitc.passes._proof import TOLERANCE, proven
from kbitc.passes.equalize import FACT, Equalize
from kbitc.passes.measure_moments import MeasureMoments
from kbitc.pipeline.manager import PassManager
from kbitc.sensitivity.moments import MOMENTS

TEXT = {"gpt2", "opt", "bloom", "llama", "mixtral"}
IDS = torch.randint(101, (2, 16), generator=torch.Generator().manual_seed(0))
EQUALIZED = ["canonicalize", "measure_moments", Equalize("int3:32"), "apply_plan"]


def uneven(model):
    """Features that differ by powers of two, as those of trained models do."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() < 3:
                tensor.mul_(torch.randn(tensor.shape[-1], generator=generator).exp2())
    return model


@pytest.fixture(scope="module")
def equalized(tiny_model):
    """``equalized(family)``: the model, the canonical program with moments, and the equalized one."""
    known = {}

    def make(family):
        if family not in known:
            model = uneven(tiny_model(family))
            checkpoint = open_checkpoint(model)
            source = Calibrator(checkpoint, IDS if family in TEXT else "random")
            program = capture(checkpoint.skeleton(), context=Context(checkpoint.read, source))
            measured = PassManager(["canonicalize", "measure_moments"], is_checked=True).run(program)
            after = PassManager([Equalize("int3:32")], is_checked=True).run(measured)
            known[family] = (model, measured, after)
        return known[family]

    return make


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("kbitc.compiler.calibrator.cache_folder", lambda: tmp_path)


# Pairs of a maker and a reader that are there to be found, in the first layer.
FOUND = {
    "llama": [("input_layernorm", "q_proj"), ("v_proj", "o_proj"), ("up_proj", "down_proj")],
    "gpt2": [("ln_1", "c_attn"), ("c_attn", "c_proj"), ("ln_2", "c_fc")],
    "roberta": [("value", "output.dense")],
    "t5": [("layer_norm", "q"), ("SelfAttention.v", "SelfAttention.o"), ("wi_1", "wo")],
    "mixtral": [("post_attention_layernorm", "gate_up_proj"), ("gate_up_proj", "down_proj")],
    "opt": [("fc1", "fc2")],  # through ReLU
}


@pytest.mark.parametrize("family", FOUND)
def test_another_model_of_the_same_function(family, equalized):
    model, before, after = equalized(family)
    groups = after.facts[FACT].groups
    found = [(flow.name, *(r.weight.name for r in flow.readers)) for flow in flows(before) if flow.free.any()]
    for maker, reader in FOUND[family]:
        assert any(maker in names[0] and any(reader in name for name in names[1:]) for names in found)
    assert len(groups) > 1
    assert set(groups) <= set(found)
    changed = {name for name in (*after.weights, *after.rest) if after.is_changed(name)}
    assert changed >= {name for names in groups for name in names}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in changed:
        assert not torch.equal(after.read(name), before.read(name))
    assert proven(before, after, "equalize") < TOLERANCE / 10
    named = {name for flow in flows(before) for name in (flow.name, *(r.weight.name for r in flow.readers))}
    assert set(after.facts[FACT].left) | {names[0] for names in groups} <= named
    for name, tensor in model.state_dict().items():  # the caller's own
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_moments_are_those_of_the_changed_model(family, equalized):
    _, before, after = equalized(family)
    # Measured anew, on the changed tensors.
    wanted = PassManager([MeasureMoments()]).run(replace(after, facts={})).known(MOMENTS)
    own = after.known(MOMENTS)
    assert own.keys() == wanted.keys()
    makers = {names[0] for names in after.facts[FACT].groups}
    readers = {name for names in after.facts[FACT].groups for name in names[1:]}
    for name, moments in own.items():
        for factor, measured, old in zip(
            moments.factors, wanted[name].factors, before.known(MOMENTS)[name].factors, strict=True
        ):
            torch.testing.assert_close(factor.rows, measured.rows, rtol=1e-4, atol=0)
            if name not in makers:  # theirs weigh tokens by gradients of other size now
                torch.testing.assert_close(factor.columns, measured.columns, rtol=1e-4, atol=0)
            assert torch.equal(factor.columns, old.columns) == (name not in readers)


def test_the_error_is_smaller(tiny_model):
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:  # the same function, of columns that differ by up to 2 ** 6
            sizes = torch.arange(75) % 7
            layer.mlp.up_proj.weight.mul_(sizes.exp2()[:, None])
            layer.mlp.down_proj.weight.div_(sizes.exp2())
        wanted, errors = model(IDS).logits, []
        for passes in (["canonicalize", "measure_moments", "apply_plan"], EQUALIZED):
            packed = kbitc.compile(model, spec="int3:32", passes=passes, calibrate=IDS)
            errors.append(float((packed(IDS).logits - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.9 * errors[0]


def test_an_artifact_of_an_equalized_model_is_the_same_model(equalized, tmp_path):
    source, _, after = equalized("gpt2")
    source.save_pretrained(tmp_path / "source")
    request = Request(spec="int8:32", passes=EQUALIZED, calibrate=IDS)
    for name in ("out", "again"):
        compile_to(str(tmp_path / "source"), tmp_path / name, request)
    plan = json.loads((tmp_path / "out" / PLAN_FILE).read_text())
    assert plan["checksums"] == json.loads((tmp_path / "again" / PLAN_FILE).read_text())["checksums"]
    stored = dict(Artifact.open(tmp_path / "out").tensors())
    gain = "transformer.h.0.ln_1.weight"
    torch.testing.assert_close(stored[gain].float(), after.read(gain), rtol=1e-2, atol=0)
    with torch.no_grad():
        wanted, got = source(IDS).logits, kbitc.load(tmp_path / "out", dtype=torch.float32)(IDS).logits
    assert (got - wanted).norm() < 0.05 * wanted.norm()


def test_a_resumed_run_does_not_mix_scales(tiny_model, tmp_path):
    def stop(name, done, total):
        if name.startswith("packing ") and done > total // 2:
            raise KeyboardInterrupt

    def request(trial):
        passes = ["canonicalize", "measure_moments", Equalize(trial), "apply_plan"]
        return Request(spec="nf4:32", passes=passes, calibrate=IDS)

    model = uneven(tiny_model("llama"))
    with pytest.raises(KeyboardInterrupt):
        compile_to(model, tmp_path / "out", request("int3:32"), on_progress=stop)
    with pytest.raises(UsageError, match="another source, plan or kbitc version"):
        compile_to(model, tmp_path / "out", request("int2:16"), is_resumed=True)
    compile_to(model, tmp_path / "out", request("int3:32"), is_resumed=True)
    compile_to(model, tmp_path / "whole", request("int3:32"))
    whole, resumed = (dict(Artifact.open(tmp_path / name).tensors()) for name in ("whole", "out"))
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())


def test_even_features_stay_as_they_are():
    class Even(nn.Module):
        def __init__(self):
            super().__init__()
            self.made, self.read = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.read(self.made(x))

    module = Even().requires_grad_(False)
    for layer in (module.made, module.read):  # every level of int3 is met: no scale can make it better
        layer.weight.copy_(torch.tensor([[1.0, -1.0, 0.0, 1.0]]).expand_as(layer.weight))
    with open_checkpoint(module) as checkpoint:
        x = torch.ones(1, 4)
        context = Context(checkpoint.read, Calibrator(checkpoint, "random", inputs={"x": x}))
        program = PassManager(["canonicalize", "measure_moments"]).run(
            capture(checkpoint.skeleton(), (x,), context=context)
        )
        after = PassManager([Equalize("int3:32")], is_checked=True).run(program)
    assert after.facts[FACT].left["made.weight"] == "no scale that was tried makes the error smaller"
    assert not after.is_changed("made.weight")


def test_another_function_is_refused(equalized):
    _, before, _ = equalized("llama")
    broken = before.with_changes({"model.norm.weight": lambda gain, _: gain * 1.01})
    with pytest.raises(PassError, match="pass 'equalize': the changed model is another function"):
        proven(before, broken, "equalize")


def test_there_must_be_something_to_prove_it_on(equalized):
    _, before, _ = equalized("llama")
    blind = replace(before, context=replace(before.context, calibration=None))
    with pytest.raises(UsageError, match="'equalize' proves on an input"):
        PassManager([Equalize()]).run(blind)
