"""SwitchBack: products against float32, gradients of the weight bit for bit, and models that are changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import kbitc
from kbitc.errors import UsageError
from kbitc.nn import SwitchBackLinear
from kbitc.training import switchback


def error(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def by_definition(x, weight):
    """Rows of x and the whole weight rounded to int8, multiplied in float64."""
    rows = x.abs().amax(-1, keepdim=True)
    scale = weight.abs().max()
    left = (x * (torch.full_like(rows, 127) / rows)).round().double()
    right = (weight * (torch.tensor(127.0) / scale)).round().double()
    return left @ right.mT * (rows.double() / 127) * (scale.double() / 127)


@pytest.mark.parametrize(("out", "features"), [(7, 33), (64, 64), (300, 101)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products(out, features, has_bias):
    torch.manual_seed(0)
    dense = nn.Linear(features, out, bias=has_bias)
    layer = SwitchBackLinear.of(dense)
    x, grad = torch.randn(5, 11, features, requires_grad=True), torch.randn(5, 11, out)
    y = layer(x)
    bias = dense.bias.double() if has_bias else 0.0
    torch.testing.assert_close(y.double(), by_definition(x, dense.weight) + bias, rtol=1e-5, atol=1e-5)
    inputs = (x, *dense.parameters())
    found = torch.autograd.grad(y, inputs, grad)
    wanted = torch.autograd.grad(dense(x), inputs, grad)
    torch.testing.assert_close(found[0].double(), by_definition(grad, dense.weight.mT), rtol=1e-5, atol=1e-5)
    assert error(found[0], wanted[0]) < 0.02
    assert all(torch.equal(a, b) for a, b in zip(found[1:], wanted[1:], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_all_is_of_its_dtype_but_the_parameters(dtype):
    layer, x = SwitchBackLinear(64, 32), torch.randn(6, 64, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert layer.weight.grad.dtype == x.grad.dtype == torch.float32
    assert error(x.grad, torch.ones(6, 32) @ layer.weight) < 0.02


def test_what_is_no_number_does_not_come_out_as_one():
    layer = SwitchBackLinear(8, 4)
    x = torch.ones(3, 8)
    x[1, 2] = float("inf")
    assert layer(x).isfinite().all(1).tolist() == [True, False, True]
    layer.weight.data[0, 0] = float("nan")
    assert not layer(x).isfinite().any()


def test_frozen_parts_get_no_gradient():
    layer, x = SwitchBackLinear(8, 4), torch.randn(3, 8)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


def test_it_trains_under_compile():
    layer, x = SwitchBackLinear(16, 8), torch.randn(4, 16)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert layer.weight.grad is not None


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.again = self.body[0]
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.table.weight

    def forward(self, ids):
        return self.lm_head(self.body(self.again(self.table(ids))))


def test_a_model_is_changed_in_place_and_keeps_its_parameters():
    model = Tied()
    before = dict(model.named_parameters())
    assert switchback(model) is model
    assert type(model.lm_head) is nn.Linear
    assert type(model.body[2]) is SwitchBackLinear
    assert model.again is model.body[0]
    assert all(value is before[name] for name, value in model.named_parameters())
    model(torch.tensor([1, 2])).sum().backward()
    other = switchback(Tied(), keep=["body.0", "again", "lm_head"])
    assert [type(layer) for layer in other.body[::2]] == [nn.Linear, SwitchBackLinear]


def test_a_model_without_linear_layers_is_an_error():
    with pytest.raises(UsageError, match="the ReLU has no torch.nn.Linear"):
        switchback(nn.ReLU())
    with pytest.raises(UsageError, match="at most 133000"):
        SwitchBackLinear(133001, 1, device="meta")


def test_stable_embedding():
    layer = kbitc.nn.StableEmbedding(50, 16, padding_idx=0)
    assert layer.weight[1:].abs().max() <= (6 / 66) ** 0.5
    assert not layer.weight[0].any()
    y = layer(torch.tensor([[1, 2], [3, 0]]))
    torch.testing.assert_close(
        y, nn.functional.layer_norm(layer.weight[torch.tensor([[1, 2], [3, 0]])], (16,))
    )
    for copied in (
        copy.deepcopy(layer),
        layer.to(torch.bfloat16),
        nn.Sequential(layer).to_empty(device="cpu")[0],
    ):
        assert copied.weight.optim_bits == 32


def test_the_packages_are_names_of_kbitc():
    assert kbitc.optim.AdamW8bit.__name__ == "AdamW8bit"
    assert kbitc.training.switchback is switchback
