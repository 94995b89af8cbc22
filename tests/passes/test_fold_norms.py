"""Norms in the next weights: the same model, whose tensors are read changed, wherever they are read."""

from __future__ import annotations

import json

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
from kbitc.errors import UsageError
from kbitc.graph.capture import capture
from kbitc.graph.context import Context
from kbitc.passes.fold_norms import FACT, FoldNorms
from kbitc.passes.measure_moments import MeasureMoments
from kbitc.pipeline.manager import PassManager
from kbitc.sensitivity.moments import MOMENTS
from kbitc.tensor.kbit_tensor import KbitTensor

FOLDED = ["canonicalize", "fold_norms", "apply_plan"]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_artifact_of_a_folded_model_is_the_same_model(family, tiny_model, tmp_path):
    source = tiny_model(family)
    source.save_pretrained(tmp_path / "source")
    plans = {}
    for name, passes in (("plain", None), ("folded", FOLDED)):
        compile_to(str(tmp_path / "source"), tmp_path / name, Request(spec="int8:32", passes=passes))
        plans[name] = json.loads((tmp_path / name / PLAN_FILE).read_text())
    assert plans["plain"]["source"] == plans["folded"]["source"]  # what was read, not what was made of it
    stored = dict(Artifact.open(tmp_path / "folded").tensors())
    norms = {"llama": "model.layers.0.input_layernorm", "gpt2": "transformer.h.0.ln_1"}[family]
    assert torch.equal(stored[f"{norms}.weight"], torch.ones_like(stored[f"{norms}.weight"]))
    wanted = logits(source)
    loaded = kbitc.load(tmp_path / "folded", dtype=torch.float32)
    in_memory = kbitc.compile(source, spec="int8:32", passes=FOLDED)
    for model in (loaded, in_memory):
        assert sum(isinstance(p, KbitTensor) for p in model.parameters()) == len(plans["plain"]["weights"])
        assert (logits(model) - wanted).norm() < 0.02 * wanted.norm()
    assert source.get_parameter(f"{norms}.weight").std() > 0.01  # the caller's own
    assert torch.equal(
        in_memory.get_parameter(f"{norms}.weight"), torch.ones(stored[f"{norms}.weight"].shape)
    )


def test_a_resumed_run_does_not_mix_folded_and_plain(tiny_model, tmp_path):
    def stop(name, done, total):
        if name.startswith("packing ") and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_to(tiny_model("llama"), tmp_path / "out", Request(spec="nf4:32"), on_progress=stop)
    folded = Request(spec="nf4:32", passes=FOLDED)
    with pytest.raises(UsageError, match="another source, plan or kbitc version"):
        compile_to(tiny_model("llama"), tmp_path / "out", folded, is_resumed=True)


def test_inputs_are_measured_as_they_are_after_folding(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("kbitc.compiler.calibrator.cache_folder", lambda: tmp_path)
    model = tiny_model("llama")
    tokens = torch.randint(101, (2, 16), generator=torch.Generator().manual_seed(0))
    with open_checkpoint(model) as checkpoint:
        program = PassManager(["canonicalize"]).run(
            capture(checkpoint.skeleton(), context=Context(checkpoint.read, Calibrator(checkpoint, tokens)))
        )
        measure = MeasureMoments()
        plain = PassManager([measure]).run(program)
        folded = PassManager([FoldNorms(), measure]).run(program)
        name, norm = "model.layers.1.mlp.up_proj.weight", "model.layers.1.post_attention_layernorm.weight"
        scale = model.get_parameter(norm)
        moments, wanted = folded.facts[MOMENTS][name], plain.facts[MOMENTS][name]
        (own,), (plain_factor,) = moments.factors, wanted.factors
        torch.testing.assert_close(own.columns, plain_factor.columns / scale.square(), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(own.rows, plain_factor.rows, rtol=1e-3, atol=1e-9)
        torch.testing.assert_close(folded.read(name), model.get_parameter(name) * scale)
        with pytest.raises(UsageError, match="put it before"):
            PassManager([FoldNorms()]).run(plain)


class Normed(nn.Module):
    """What a function makes of a LayerNorm's result."""

    def __init__(self, read, has_bias=True):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.first, self.second = nn.Linear(6, 5, bias=has_bias), nn.Linear(6, 4)
        self.other = nn.Parameter(torch.ones(6))
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.read = read

    def forward(self, x):
        return self.read(self, self.norm(x))


X = torch.linspace(-1, 1, 36).view(2, 3, 6) ** 3


def fold(module):
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    program = capture(module.requires_grad_(False), (X,), context=Context(state.__getitem__))
    return PassManager(["canonicalize", "fold_norms"], is_checked=True).run(program)


@pytest.mark.parametrize(
    "read",
    [
        lambda m, y: (m.first(y), m.second(y)),
        lambda m, y: m.first(y.view(6, 6)[2:]),
        lambda m, y: m.first(y[:, torch.tensor([2, 0])]),
        lambda m, y: m.first(y.transpose(0, 1).unsqueeze(1).expand(3, 2, 2, 6)),
    ],
)
def test_moves_of_tokens_are_seen_through(read):
    module = Normed(read).eval()
    program = fold(module)
    assert len(program.facts[FACT].groups) == 1
    changed = {name: program.read(name) for name, _ in module.named_parameters()}
    assert changed["norm.weight"].tolist() == [1] * 6
    assert changed["norm.bias"].tolist() == [0] * 6
    assert torch.equal(changed["other"], module.other)
    wanted = module(X)
    module.load_state_dict(changed)
    torch.testing.assert_close(module(X), wanted)


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda m, y: m.first(y) + y[..., :5], "the norm's result is read by aten.slice, not by weights"),
        (lambda m, y: (m.first(y), y), "the norm's result is returned by the model"),
        (lambda m, y: m.first(y.mT.contiguous().view(2, 3, 6)), "read by aten.mT"),
        (lambda m, y: m.first(y.flip(-1)), "read by aten.flip"),
        (lambda m, y: m.first(y * 2), "read by aten.mul"),
        (lambda m, y: m.first(y).sum() + m.first(torch.ones(6)), "'first.weight' is read in 2 places"),
        (lambda m, y: m.first(y) + m.norm.weight[:5], "read in several places"),
        (lambda m, y: m.first(y) + m.norm.bias[:5], "what the norm adds is no parameter, or read in several"),
        (
            lambda m, y: m.first(y) * m.first.bias,
            "the norm adds a bias, and that of 'first.weight' has other",
        ),
        (lambda m, y: y.sum() * 0 + m.first.weight.sum(), "read by aten.sum"),
    ],
)
def test_what_stays_has_a_reason(read, reason):
    program = fold(Normed(read))
    assert program.facts[FACT].groups == ()
    assert not program.is_changed("norm.weight")
    assert reason in program.facts[FACT].left["norm.weight"]


def test_a_bias_without_a_place_to_go_stays():
    program = fold(Normed(lambda m, y: m.first(y), has_bias=False))
    assert program.facts[FACT].left == {
        "norm.weight": "the norm adds a bias, and 'first.weight' has none to take it"
    }


def test_a_parameter_times_itself_is_no_scale():
    module = Normed(lambda m, y: m.first(m.other * m.other) + y[..., :5])
    assert "other" not in fold(module).facts[FACT].left


def test_the_norm_of_torch_without_a_bias():
    module = nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 4)).requires_grad_(False)
    nn.init.normal_(module[0].weight)
    program = fold(module)
    assert program.facts[FACT].groups == (("0.weight", "1.weight"),)
    wanted = module(X)
    module.load_state_dict({name: program.read(name) for name in ("0.weight", "1.weight", "1.bias")})
    torch.testing.assert_close(module(X), wanted)
