"""Biases go into the packed linear where they can; every other pointwise reader has a reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kbitc.graph.program import Program, Stage
from kbitc.passes.fuse_epilogues import FACT, GENERATED, RESIDUAL
from kbitc.pipeline.manager import PassManager
from kbitc.quantizers import quantize

linear = torch.ops.kbit.linear.default


class Block(nn.Module):
    """``read(y, bias, x)`` of ``y = kbit.linear(x, W)``; W (11, 11)."""

    def __init__(self, read, bias):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        packed = quantize(torch.randn(11, 11, generator=generator), "nf4:64").packed
        for name in ("planes", "scales", "codebook"):
            self.register_buffer(name, getattr(packed, name))
        self.register_buffer("bias", bias)
        self.numbers, self.read = packed.operands().numbers, read

    def forward(self, x):
        y = linear(x, self.planes, self.scales, self.codebook, *[None] * 6, *self.numbers)
        return self.read(y, self.bias, x)


X = torch.linspace(-1, 1, 33).view(3, 11)


def fuse(read, bias=None):
    bias = torch.linspace(-1, 1, 11) if bias is None else bias
    with torch.no_grad():
        graph = torch.export.export(Block(read, bias), (X,), strict=False).module(check_guards=False)
        passes = ["fuse_epilogues", "remove_dead_code"]
        after = PassManager(passes, is_checked=True).run(Program(graph, {}, stage=Stage.PACKED))
        torch.testing.assert_close(after.graph(X), graph(X), rtol=1e-5, atol=1e-6)
    return after


@pytest.mark.parametrize(
    "read",
    [
        lambda y, b, _: y + b,
        lambda y, b, _: b + y,
        lambda y, b, _: y.view(1, 3, 11).unsqueeze(0) + b,
        lambda y, b, _: y[:2] + b,
        lambda y, b, _: y.view(3, 1, 11).transpose(0, 1) + b,
    ],
)
def test_a_bias_is_added_by_the_linear(read):
    after = fuse(read)
    assert len(after.facts[FACT].groups) == 1
    assert after.facts[FACT].left == {}
    names = [str(node.target) for node in after.graph.graph.nodes]
    assert "aten.add.Tensor" not in names
    (call,) = after.graph.graph.find_nodes(op="call_function", target=linear)
    assert call.args[-1].op == "get_attr"


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda y, _, __: F.silu(y), GENERATED),
        (lambda y, _, __: F.gelu(y.view(33)), GENERATED),
        (lambda y, b, _: y * b, GENERATED),
        (lambda y, _, __: y + 1, GENERATED),
        (lambda y, b, _: torch.add(y, b, alpha=2), GENERATED),
        (lambda y, _, x: y + x, RESIDUAL),
        (lambda y, b, _: y[:1].T + b[:, None], RESIDUAL),
        (lambda y, b, _: y[:, torch.arange(10, -1, -1)] + b, "its product is cut, cast or turned"),
        (lambda y, b, _: (y + b, y.sum()), "also read without the bias"),
        (lambda y, b, _: y + b * y[0, 0], "its product is also read"),
        (lambda y, b, x: y + (b + x[0]), "its bias is computed after the product"),
        (lambda y, b, _: y.double() + b, "is cut, cast or turned"),
    ],
)
def test_what_stays_has_a_reason(read, reason):
    after = fuse(read)
    assert after.facts[FACT].groups == ()
    assert any(reason in found for found in after.facts[FACT].left.values()), after.facts[FACT].left


def test_a_bias_of_another_dtype_stays():
    after = fuse(lambda y, b, _: y + b, torch.ones(11, dtype=torch.float64))
    assert list(after.facts[FACT].left.values()) == ["its product and its bias differ in dtype"]


def test_the_second_of_two_biases_stays():
    after = fuse(lambda y, b, _: (y + b).view(33).view(3, 11) + b.neg())
    assert len(after.facts[FACT].groups) == 1
    again = PassManager(["fuse_epilogues"]).run(after)
    assert list(again.facts[FACT].left.values()) == ["the linear has a bias already"]


def test_what_follows_the_bias_is_a_candidate_too():
    after = fuse(lambda y, b, _: F.relu(y + b))
    assert after.facts[FACT].left == {"relu": GENERATED}


def test_a_bias_that_changes_in_place_stays():
    class InPlace(Block):
        def forward(self, x):
            bias = self.bias * 1
            y = linear(x, self.planes, self.scales, self.codebook, *[None] * 6, *self.numbers)
            bias.add_(1)
            return y + bias

    with torch.no_grad():
        module = InPlace(None, torch.ones(11))
        graph = torch.export.export(module, (X,), strict=False).module(check_guards=False)
        after = PassManager(["fuse_epilogues"]).run(Program(graph, {}, stage=Stage.PACKED))
        torch.testing.assert_close(after.graph(X), graph(X))
    assert after.facts[FACT].groups == ()
    assert len(after.facts[FACT].left) == 1
