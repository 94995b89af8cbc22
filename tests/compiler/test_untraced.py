"""Models that torch.export cannot trace, and weights that no graph reads: packed by the class of their module."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn

import kbitc
from kbitc.compiler.driver import compile_to
from kbitc.compiler.request import Request
from kbitc.errors import SourceError, UntracedWarning, UsageError
from kbitc.tensor.kbit_tensor import KbitTensor

EXAMPLE = (torch.zeros(2, 5, dtype=torch.int64),)


class Experts(nn.Module):
    """Routed in a loop of Python's, as Switch and DBRX do; one of three experts is never routed to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 64)
        self.router = nn.Linear(64, 3)
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.head = nn.Linear(64, 30, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        choice = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if (choice == i).any():
                out[choice == i] = expert(x[choice == i])
        return self.head(out)


class Tower(nn.Module):
    """A language model whose second tower, of modules and of a bare parameter, is for other inputs."""

    def __init__(self, *, is_bare=False):
        super().__init__()
        torch.manual_seed(0)
        self.language = nn.Linear(64, 32)
        self.vision = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 64))
        self.bare = nn.Parameter(torch.randn(64, 64)) if is_bare else None

    def forward(self, x, pixels=None):
        if pixels is not None:
            x = x + self.vision(pixels)
            x = x if self.bare is None else x @ self.bare
        return self.language(x)


def dequantized(model):
    """The same model with dense weights of the packed ones' values."""
    dense = type(model)()
    state = {
        name: value.dequantize() if isinstance(value, KbitTensor) else value
        for name, value in model.state_dict().items()
    }
    dense.load_state_dict(state)
    return dense


@pytest.mark.parametrize("options", [{"spec": "int4:64"}, {"bits": 5}, {"spec": "nf4:64+out2%"}])
def test_a_model_that_cannot_be_traced_is_packed_by_class(options):
    with pytest.warns(UntracedWarning, match=r"has no graph, since torch.export .*classes of its modules"):
        model = kbitc.compile(Experts(), strict=True, example_inputs=EXAMPLE, **options)
    packed = {name for name, value in model.state_dict().items() if isinstance(value, KbitTensor)}
    assert packed == {name for name, value in model.state_dict().items() if value.dim() == 2}
    ids = torch.arange(30).view(2, 15)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), dequantized(model)(ids), rtol=2e-3, atol=4e-4)


def test_its_artifact_says_so_and_loads(tmp_path):
    out = tmp_path / "out"
    result = compile_to(Experts(), out, Request.of(spec="int4:64"), example_inputs=EXAMPLE)
    assert {"fuse_dequantize", "merge_linears"} <= set(result.skipped)
    assert "data-dependent" in result.to_json()["untraced"]
    assert result.to_json()["by_class"] == list(result.program.weights)
    plan = json.loads((out / "kbit_plan.json").read_text())
    assert plan["untraced"] == result.program.untraced
    assert "weights were found by module class" in (out / "report.html").read_text()
    loaded, ids = kbitc.load_into(Experts(), out), torch.arange(30).view(2, 15)
    with pytest.warns(UntracedWarning):
        model = kbitc.compile(Experts(), spec="int4:64", example_inputs=EXAMPLE)
    assert all(
        torch.equal(loaded.state_dict()[name].dequantize(), value.dequantize())
        for name, value in model.state_dict().items()
        if isinstance(value, KbitTensor)
    )
    torch.testing.assert_close(loaded(ids), model(ids), rtol=1e-3, atol=1e-3)


def test_a_group_that_only_a_graph_knows_is_an_error():
    with pytest.raises(UsageError, match=r"--agree input: .* use --agree role"):
        kbitc.compile(Experts(), bits=5, agree="input", example_inputs=EXAMPLE)


def test_without_a_known_class_nothing_can_be_packed():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(7, 7))

        def forward(self, x):
            return x @ self.weight if x.sum() > 0 else -x

    with pytest.raises(SourceError, match=r"cannot trace it .*no module of it is of a class that says"):
        kbitc.compile(Branching(), spec="int4:64", example_inputs=(torch.zeros(2, 7),))


def test_what_the_graph_does_not_reach_is_packed_by_class():
    x = torch.randn(2, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = kbitc.compile(Tower(), spec="int4:64", strict=True, example_inputs=(x,))
    assert isinstance(model.vision[0].weight, KbitTensor)
    assert isinstance(model.vision[2].weight, KbitTensor)
    with torch.no_grad():
        torch.testing.assert_close(model(x, x), dequantized(model)(x, x), rtol=2e-3, atol=4e-4)


def test_strict_names_what_may_be_the_weight_of_a_matmul_for_all_that_is_known():
    x = torch.randn(2, 64)
    with pytest.raises(UsageError, match=r"--strict: 1 matmul .* bare \(never read by the captured graph\)"):
        kbitc.compile(Tower(is_bare=True), spec="int4:64", strict=True, example_inputs=(x,))


def test_strict_names_a_linear_that_the_graph_reads_otherwise():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.a(x) + x * self.b.weight.sum()

    with pytest.raises(UsageError, match=r"--strict: 1 matmul .* b.weight \(read by aten.sum\)"):
        kbitc.compile(Scaled(), spec="int4:64", strict=True, example_inputs=(torch.zeros(2, 64),))


class Dead(nn.Module):
    """Computes what nobody reads: with a module, and with bare parameters in every other form."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 48)
        self.left = nn.Parameter(torch.randn(48, 64))
        self.stacked = nn.Parameter(torch.randn(3, 64, 48))
        self.rows = nn.Parameter(torch.randn(5, 64))

    def forward(self, x):
        self.b(x)
        self.left @ x.mT
        torch.bmm(x.expand(3, -1, -1), self.stacked)
        nn.functional.embedding(torch.tensor([1]), self.rows)
        return self.a(x)


@pytest.mark.parametrize("options", [{"spec": "int4:64"}, {"bits": 6}])
def test_weights_whose_product_nobody_reads_are_packed(options):
    x = torch.randn(2, 64)
    model = kbitc.compile(Dead(), strict=True, example_inputs=(x,), **options)
    assert all(isinstance(p, KbitTensor) for p in model.parameters() if p.dim() > 1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), dequantized(model)(x), rtol=2e-3, atol=4e-4)


def test_a_budget_of_a_model_that_cannot_be_traced_is_spent_by_moments(tmp_path, monkeypatch):
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    monkeypatch.setattr("kbitc.compiler.calibrator.cache_folder", lambda: tmp_path)
    sizes = {"vocab_size": 101, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_heads": 2, "num_experts": 3}
    layers = {"num_layers": 2, "num_sparse_encoder_layers": 1, "num_decoder_layers": 1}
    config = SwitchTransformersConfig(**sizes, **layers, num_sparse_decoder_layers=0)
    torch.manual_seed(0)
    model = SwitchTransformersForConditionalGeneration(config).eval()
    result = compile_to(model, tmp_path / "out", Request.of(bits=7))
    assert not any(rest.is_matmul for rest in result.program.rest.values())
    plan = json.loads((tmp_path / "out" / "kbit_plan.json").read_text())
    assert plan["untraced"]
    assert plan["calibration"].startswith("2 random inputs")
    assert plan["predicted"]["unit"] == "nats per token"
    assert result.bits_per_param <= 7
    assert {weight.get("quantizer") for weight in plan["weights"].values()} <= {"weighted", "absmax", None}
