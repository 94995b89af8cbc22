"""What module classes say of weights, held against what graphs say of the same models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from kbitc.graph.capture import capture
from kbitc.graph.module_classes import ModuleUse, uses_by_class
from kbitc.passes.canonicalize import NOT_KNOWN, Canonicalize

FAMILIES = ("gpt2", "opt", "bloom", "gpt_neox", "llama", "mixtral", "roberta", "bart", "t5", "clip")
UNKNOWN = {"mixtral": {"model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"}}


def without_graph(program):
    """The same program, as if it had not been traced."""
    graph = torch.fx.Graph()
    graph.output(())
    empty = torch.fx.GraphModule(nn.Module(), graph)
    return replace(program, graph=empty, parameters={}, untraced="for a test")


@pytest.mark.parametrize("family", FAMILIES)
def test_classes_say_of_every_weight_what_the_graph_says(tiny_model, family):
    captured = capture(tiny_model(family, is_meta=True))
    traced, known = Canonicalize().run(captured), Canonicalize().run(without_graph(captured))
    unknown = UNKNOWN.get(family, set())
    read_by_code = {name for name, rest in known.rest.items() if "itself" in rest.reason}
    assert len(read_by_code) == (family == "clip")  # its images' positions may be interpolated
    assert set(known.weights) == set(traced.weights) - unknown - read_by_code
    for name, weight in known.weights.items():
        of_graph = traced.weights[name]
        assert (weight.kinds, weight.is_transposed) == (of_graph.kinds, of_graph.is_transposed)
        assert (weight.shape, weight.aliases) == (of_graph.shape, of_graph.aliases)
        if family != "clip":  # its projections are outputs, but no head of transformers'
            assert weight.is_head == of_graph.is_head
    left = {name: rest.reason for name, rest in known.rest.items() if rest.is_matmul}
    assert left == dict.fromkeys(unknown, NOT_KNOWN)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OtherLinear(nn.Linear):
    def forward(self, x):
        return x @ (self.weight.t() * 2)


class OtherEmbedding(nn.Embedding):
    def forward(self, ids):
        return self.weight[ids]


class OtherLstm(nn.LSTM):
    def forward(self, x):
        return x @ self.weight_ih_l0.T


CLASSES = {
    "a linear": (nn.Linear(3, 5), {"weight": "linear"}),
    "one that calls it": (Doubled(3, 5), {"weight": "linear"}),
    "one that does not": (OtherLinear(3, 5), {"weight": True}),
    "an embedding": (nn.Embedding(3, 5), {"weight": "embedding"}),
    "one with max_norm": (nn.Embedding(3, 5, max_norm=1.0), {"weight": False}),
    "one with a forward of its own": (OtherEmbedding(3, 5), {"weight": False}),
    "bags": (nn.EmbeddingBag(3, 5), {"weight": False}),
    "bilinear": (nn.Bilinear(2, 3, 4), {"weight": True}),
    "a convolution": (nn.Conv1d(3, 5, 2), {"weight": False}),
    "a norm": (nn.LayerNorm((3, 5)), {"weight": False}),
    "a convolution over patches": (nn.Conv2d(3, 5, (2, 4), stride=(2, 4)), {"weight": "linear"}),
    "a 1 x 1 convolution": (nn.Conv2d(3, 5, 1, stride=2), {"weight": "linear"}),
    "one that meets a place twice": (nn.Conv2d(3, 5, 2, stride=1), {"weight": False}),
    "one with a border": (nn.Conv2d(3, 5, 2, stride=2, padding=1), {"weight": False}),
    "one in groups": (nn.Conv2d(4, 6, 1, groups=2), {"weight": False}),
    "a transposed one": (nn.ConvTranspose2d(3, 5, 2, stride=2), {"weight": False}),
    "an lstm": (nn.LSTM(3, 5), {"weight_ih_l0": "linear", "weight_hh_l0": "linear"}),
    "an lstm of another forward": (OtherLstm(3, 5), {"weight_ih_l0": True, "weight_hh_l0": True}),
    "attention": (nn.MultiheadAttention(4, 2), {"in_proj_weight": "linear", "out_proj.weight": "linear"}),
    "attention of three widths": (
        nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
        dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"), "linear"),
    ),
    "what nobody knows": (nn.ParameterList([torch.zeros(3, 5)]), {}),
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_says_how_its_parameters_are_used(name):
    module, expected = CLASSES[name]
    for model, prefix in ((module, ""), (nn.Sequential(module), "0.")):
        uses = uses_by_class(model)
        said = {
            key: outcome.kind if isinstance(outcome, ModuleUse) else outcome.is_matmul
            for key, (outcome,) in uses.items()
        }
        assert said == {prefix + key: value for key, value in expected.items()}


def test_modules_that_share_a_weight_all_say_what_they_do():
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False), Conv1D(3, 5), nn.Conv1d(3, 5, 1))
    model[1].weight = model[0].weight
    model[2].weight = model[0].weight
    assert uses_by_class(model)["0.weight"] == (
        ModuleUse("embedding", module="0"),
        ModuleUse("linear", module="1"),
        ModuleUse("linear", is_transposed=True, module="2"),
    )
    assert uses_by_class(model)["3.weight"] == (ModuleUse("linear", view_of=(5, 3), module="3"),)


def test_an_embedding_whose_weight_code_above_it_reads_is_no_table_of_rows():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.added, self.asked, self.looked_up, self.made = (nn.Embedding(5, 4) for _ in range(4))
            self.made.weight.data.zero_()

        def forward(self, x):
            x = x.to(self.asked.weight.dtype) + self.asked(x.long())
            return x + self.looked_up(x.long()) + self.added.weight[: len(x)] + self.made(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.ModuleDict({"positions": Positions()})

        def forward(self, x):
            return self.embed["positions"](x)

    found = {name.split(".")[2]: uses for name, uses in uses_by_class(Model()).items()}
    assert {name for name, (use,) in found.items() if isinstance(use, ModuleUse)} == {
        "asked",
        "looked_up",
        "made",
    }
    assert not found["added"][0].is_matmul


def test_a_parameter_that_code_only_adds_is_no_weight_and_any_other_may_be():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias, self.both, self.factor = (nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
            nn.init.zeros_(self.bias)

        def forward(self, x):
            y = (x.to(self.bias.dtype) + self.bias) @ self.factor.T
            return y, x + self.both, x @ self.both.T

    (use,) = uses_by_class(Attention()).pop("bias")
    assert not use.is_matmul
    assert set(uses_by_class(Attention())) == {"bias"}
