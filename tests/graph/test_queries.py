"""Questions about the graph: what a node depends on through one value, and which weights go together."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from torch import nn

from kbitc.errors import UsageError
from kbitc.graph.capture import capture
from kbitc.graph.queries import agreeing_groups, dominators, same_roles, shared_inputs, to_networkx
from kbitc.pipeline.manager import PassManager


def canonical(model, inputs=None):
    return PassManager(["canonicalize"]).run(capture(model, inputs))


class Diamond(nn.Module):
    """Two linears of one input whose sum feeds a third; the second input joins there."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.end = nn.Linear(7, 5), nn.Linear(7, 5), nn.Linear(5, 3)
        self.requires_grad_(False)

    def forward(self, x, y):
        return self.end(self.left(x) + self.right(x)), self.end(y + self.left(x).relu())


@pytest.fixture(scope="module")
def diamond():
    return canonical(Diamond(), (torch.zeros(2, 7), torch.zeros(2, 5)))


@pytest.fixture(scope="module")
def llama(tiny_model):
    return canonical(tiny_model("llama", is_meta=True))


def test_the_graph_of_networkx_is_that_of_fx(diamond):
    graph = to_networkx(diamond)
    assert list(graph) == [node.name for node in diamond.graph.graph.nodes]
    assert nx.is_directed_acyclic_graph(graph)
    left = diamond.weights["left.weight"].uses[0].node
    assert graph.nodes[left] == {"op": "call_function", "call": "linear", "kind": "linear", "stored": ""}
    stored = [about["stored"] for about in graph.nodes.values() if about["stored"]]
    assert stored == list(diamond.parameters.values())
    assert set(graph.predecessors(left)) == {"x", "p_left_weight", "p_left_bias"}


def test_dominators_are_found_along_the_activations(diamond):
    above = dominators(diamond)
    left, right, end = (diamond.weights[f"{name}.weight"].uses[0].node for name in ("left", "right", "end"))
    assert above["x"] is None
    assert above[left] == above[right] == above["add"] == "x"  # both ways begin at x
    assert above[end] == "add"
    assert above[diamond.weights["end.weight"].uses[1].node] == "add_1"
    assert above["add_1"] is None  # two inputs meet
    assert above["output"] is None
    assert "p_left_weight" not in above  # does not depend on the inputs


def test_the_residual_stream_dominates_what_follows(llama):
    above = dominators(llama)
    name = llama.weights["lm_head.weight"].uses[0].node
    chain = []
    while name is not None:
        chain.append(name)
        name = above[name]
    assert chain[-1] == "input_ids"
    # embedding and the four sums of two layers: all that the head knows went through each of them
    assert len([node for node in chain if node.startswith(("embedding", "add"))]) == 5


def test_weights_of_one_input(llama):
    groups = shared_inputs(llama)
    assert groups == [
        tuple(f"model.layers.{layer}.{part}.weight" for part in parts)
        for layer in (0, 1)
        for parts in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("mlp.gate_proj", "mlp.up_proj"),
        )
    ]


def test_a_weight_used_twice_is_in_a_group_once(diamond):
    assert shared_inputs(diamond) == [("left.weight", "right.weight")]


@pytest.mark.parametrize("family", ["llama", "mixtral", "t5", "gpt2"])
@pytest.mark.parametrize("kind", ["input", "role"])
def test_groups_that_agree_are_a_partition(tiny_model, family, kind):
    program = canonical(tiny_model(family, is_meta=True))
    groups = agreeing_groups(program, kind)
    assert sorted(name for names in groups for name in names) == sorted(program.weights)
    assert [names[0] for names in groups] == [n for n in program.weights if n in {g[0] for g in groups}]
    assert any(len(names) > 1 for names in groups) or family == "gpt2"


def test_weights_of_one_role(llama):
    groups = same_roles(llama)
    assert ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight") in groups
    assert len(groups) == 7  # the embedding and the head have none


def test_weights_of_one_role_stand_at_one_place_of_one_stack(tiny_model):
    t5 = same_roles(canonical(tiny_model("t5", is_meta=True)))
    for stack, place in (("encoder", 1), ("decoder", 2)):
        for part in ("wi_0", "wi_1"):  # of one shape, gate and up
            names = tuple(
                f"{stack}.block.{block}.layer.{place}.DenseReluDense.{part}.weight" for block in (0, 1)
            )
            assert names in t5
    gpt2 = same_roles(canonical(tiny_model("gpt2", is_meta=True)))
    assert gpt2 == [
        tuple(f"transformer.h.{layer}.{part}.weight" for layer in (0, 1))
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    bart = same_roles(canonical(tiny_model("bart", is_meta=True)))
    assert len(bart) == 6 + 10
    assert all(len(names) == 2 for names in [*t5, *gpt2, *bart])  # two layers


def test_an_unknown_kind(diamond):
    with pytest.raises(UsageError, match="no kind of group 'inputs'; did you mean 'input'"):
        agreeing_groups(diamond, "inputs")
