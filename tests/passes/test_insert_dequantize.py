"""The planned graph on packed inputs: names, shapes, and what stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kbitc.artifact.reader import Artifact
from kbitc.compiler.driver import compile_to
from kbitc.compiler.request import Request
from kbitc.graph.capture import capture
from kbitc.graph.program import Stage, linear
from kbitc.passes.apply_plan import ApplyPlan
from kbitc.pipeline.manager import PassManager

dequantize = torch.ops.kbit.dequantize.default


def insert(model, rules, *inputs):
    passes = ["canonicalize", ApplyPlan({"weights": rules}), "insert_dequantize"]
    return PassManager(passes, is_checked=True).run(capture(model, inputs or None))


def test_inputs_are_what_an_artifact_stores(tiny_model, tmp_path):
    model = tiny_model("opt")
    rules = {"*fc1.weight": "int3:32+zp", "*fc2.weight": "fp16", "*": "dynamic8:32+dq"}
    program = insert(model, rules)
    compile_to(model, tmp_path / "out", Request(plan={"weights": rules}))
    stored = {name: tensor for name, tensor in Artifact.open(tmp_path / "out").tensors()}
    nodes = {node.name: node for node in program.graph.graph.nodes}
    for name, parameter in program.parameters.items():
        value = nodes[name].meta["val"]
        assert value.shape == stored[parameter].shape
        if "." in parameter and parameter.rpartition(".")[2] in ("planes", "scales", "zeros"):
            assert value.dtype == stored[parameter].dtype
    # One codebook is both the type's and that of the scales.
    names = list(program.parameters.values())
    assert len(names) == len(set(names))
    assert set(names) <= set(stored)


def test_tied_and_transposed_weights(tiny_model):
    program = insert(tiny_model("gpt2", is_meta=True), {"*": "nf4:32"})
    assert program.stage is Stage.PACKED
    found = [node for node in program.graph.graph.nodes if node.target is dequantize]
    weights = program.weights.values()
    assert len(found) == sum(len(weight.uses) for weight in weights) == len(program.weights) + 1
    shapes = {tuple(node.meta["val"].shape) for node in found}
    assert (108, 36) in shapes  # c_attn, stored as (36, 108)
    calls = [node for node in program.graph.graph.nodes if node.target is linear]
    assert all(node.args[1].target is dequantize and not node.kwargs for node in calls)


@pytest.mark.parametrize(("rules", "count"), [({"0.weight": "fp16", "*": "nf4:64"}, 1), ({"*": "fp16"}, 0)])
def test_what_the_plan_leaves_alone_stays(rules, count):
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).requires_grad_(False)
    program = insert(model, rules, torch.zeros(2, 7))
    assert sum(node.target is dequantize for node in program.graph.graph.nodes) == count
    assert "0.weight" in program.parameters.values()
    assert ("1.weight" in program.parameters.values()) == (count == 0)
