"""Units of a maker and the weights that read them: what is followed, and what keeps a unit as it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kbitc.graph.capture import capture
from kbitc.graph.feature_flow import flows
from kbitc.passes.canonicalize import Canonicalize

X = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """``read`` makes something of the result of ``made``; ``first`` and ``second`` are there to read it."""

    def __init__(self, read):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.made, self.gate = nn.Linear(6, 8), nn.Linear(6, 8, bias=False)
        self.first, self.second = nn.Linear(8, 5), nn.Linear(4, 8, bias=False)
        self.added = nn.Parameter(torch.randn(8))
        self.read = read

    def forward(self, x):
        return self.read(self, x, self.made(x))


def flow_of(read, name="made.weight"):
    program = Canonicalize().run(capture(Net(read).requires_grad_(False), (X,)))
    return next(flow for flow in flows(program) if flow.name == name)


def readers(flow):
    return {reader.weight.name: reader.units.tolist() for reader in flow.readers}


@pytest.mark.parametrize(
    "read",
    [
        lambda m, x, y: m.first(y),
        lambda m, x, y: m.first(F.relu(y) * -2),
        lambda m, x, y: m.first(F.silu(m.gate(x)) * y),
        lambda m, x, y: m.first(y / (1 + m.gate(x).abs())),
        lambda m, x, y: m.first(y + m.added),
        lambda m, x, y: m.first(y.transpose(0, 1).reshape(3, 2, 4, 2).flatten(2)),
        lambda m, x, y: m.first(y + F.relu(y).neg()),
        lambda m, x, y: m.first(F.relu(y[x[..., 0] > 0]) * 2),  # as many rows as the data says
    ],
)
def test_a_positive_factor_passes(read):
    flow = flow_of(read)
    assert readers(flow) == {"first.weight": list(range(8))}
    assert flow.free.all()
    assert flow.reason == ""
    assert flow.vectors.keys() >= {"made.bias"}


def test_a_parameter_that_is_added_is_divided_along():
    assert flow_of(lambda m, x, y: m.first(y + m.added)).vectors.keys() == {"made.bias", "added"}


def test_features_in_another_order_are_known_by_their_units():
    flow = flow_of(lambda m, x, y: m.first(y.view(2, 3, 4, 2).transpose(2, 3).reshape(2, 3, 8)))
    assert readers(flow) == {"first.weight": [0, 2, 4, 6, 1, 3, 5, 7]}


def test_repeated_features_are_one_unit():
    flow = flow_of(
        lambda m, x, y: m.first(y.unflatten(-1, (2, 4))[..., :1, :].expand(2, 3, 2, 4).flatten(-2))
    )
    assert readers(flow) == {"first.weight": [0, 1, 2, 3] * 2}
    assert flow.free.tolist() == [True] * 8  # nobody reads the others


def test_units_that_somebody_else_sees_keep_their_scale():
    flow = flow_of(lambda m, x, y: m.second(y[..., :4]) * F.silu(y.chunk(2, -1)[1])[..., :1])
    assert readers(flow) == {"second.weight": [0, 1, 2, 3]}
    assert flow.free.tolist() == [True] * 4 + [False] * 4
    assert flow.reason == "its result is read by aten.silu"


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda m, x, y: (m.first(y), y), "returned by the model"),
        (lambda m, x, y: m.first(F.silu(y)), "read by aten.silu"),
        (lambda m, x, y: m.first(y * y), "read by aten.mul"),
        (lambda m, x, y: m.first(y + m.gate(x)), "read by aten.add"),
        (lambda m, x, y: m.first(m.gate(x) / y), "read by aten.div"),
        (lambda m, x, y: m.first(y + 1), "read by aten.add"),
        (lambda m, x, y: m.first(y + y.flip(-1)), "read by aten.flip"),
        (lambda m, x, y: m.first(y + m.added) * m.added[:5], "read by aten.add"),
        (lambda m, x, y: m.first(y) + m.first(m.gate(x)), "read by 'first.weight', which has other readers"),
        (lambda m, x, y: m.first(y.mT.reshape(2, 3, 8)), "read by linear"),  # tokens among the features
        (lambda m, x, y: F.linear(m.first.weight[0], y.flatten(0, 1)), "read by aten.linear"),
        (lambda m, x, y: y.sum() * 0, "read by aten.sum"),
    ],
)
def test_what_sees_a_factor_keeps_it_from_changing(read, reason):
    flow = flow_of(read)
    assert not flow.free.any()
    assert reason in flow.reason


def test_values_of_attention_with_repeated_heads():
    def read(m, x, y):
        q = m.gate(x).view(2, 3, 4, 2).transpose(1, 2)
        k, v = (part.view(2, 3, 2, 2).transpose(1, 2) for part in y.chunk(2, -1))
        return m.first(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))

    flow = flow_of(read)
    assert readers(flow) == {"first.weight": [4, 5, 4, 5, 6, 7, 6, 7]}
    assert flow.free.tolist() == [False] * 4 + [True] * 4


def test_values_of_attention_written_out():
    def read(m, x, y):
        scores = (m.gate(x) @ y.mT).softmax(-1)
        return m.first(scores @ y)

    assert not flow_of(read).free.any()  # keys and values are the same
    flow = flow_of(lambda m, x, y: m.first((x @ x.mT).softmax(-1) @ y))
    assert readers(flow) == {"first.weight": list(range(8))}


def test_gain_and_shift_of_a_norm():
    flow = flow_of(lambda m, x, y: (m.made(m.norm(x)), y[..., :1] * 0), "norm.weight")
    assert not flow.free.any()  # `made` reads x as well
    flow = flow_of(lambda m, x, y: (m.gate(m.norm(x)), y), "norm.weight")
    assert readers(flow) == {"gate.weight": list(range(6))}
    assert flow.vectors.keys() == {"norm.weight", "norm.bias"}
    assert flow.weight is None


def test_experts_keep_units_of_their_own(tiny_model):
    program = Canonicalize().run(capture(tiny_model("mixtral", is_meta=True)))
    by_name = {flow.name: flow for flow in flows(program)}
    experts = by_name["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts.is_per_expert
    assert readers(experts) == {"model.layers.0.mlp.experts.down_proj": list(range(40, 80))}
    assert experts.free.tolist() == [False] * 40 + [True] * 40
    norm = by_name["model.layers.0.post_attention_layernorm.weight"]
    assert not norm.is_per_expert
    assert list(readers(norm)) == [
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
    ]
