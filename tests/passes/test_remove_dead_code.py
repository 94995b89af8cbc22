"""Dead code: what nothing reads goes, effects and inputs stay and are named."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from kbitc.graph.program import Program, Stage
from kbitc.passes.remove_dead_code import FACT
from kbitc.pipeline.manager import PassManager
from kbitc.pipeline.records import Fired


def program_of(function, *inputs, parameters=None):
    class Module(nn.Module):
        def forward(self, *given):
            return function(*given)

    exported = torch.export.export(Module(), inputs, strict=False)
    return Program(exported.graph_module, parameters or {}, stage=Stage.PACKED)


def test_chains_go_effects_and_inputs_stay():
    def function(x, y, unread):
        torch.sin(torch.cos(x))
        y.add_(1)
        return x * 2

    inputs = (torch.ones(3), torch.ones(3), torch.ones(2))
    before = program_of(function, *inputs, parameters={"given_2": "some.bias"})
    after = PassManager(["remove_dead_code"], is_checked=True).run(before)
    left = [node.name for node in after.graph.graph.nodes if node.op == "call_function"]
    assert left == ["add_", "mul"]
    record = after.facts[FACT]
    assert record.groups == (("cos",), ("sin",))
    assert record.left == {
        "given_2": "'some.bias' is stored, but nothing reads it",
        "add_": "it does something beside computing a value",
    }


def test_dropouts_of_evaluation_go_and_those_of_training_stay():
    before = program_of(lambda x: F.dropout(F.dropout(x, 0.5, training=False), 0.25) + 1, torch.ones(3))
    after = PassManager(["remove_dead_code"]).run(before)
    calls = [node for node in after.graph.graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [torch.ops.aten.dropout.default, torch.ops.aten.add.Tensor]
    assert calls[0].args[2] is True
    assert after.facts[FACT].groups == (("dropout",),)


def test_what_vmap_opens_and_closes_stays():
    def function(x):
        torch.sin(x)
        return torch.vmap(lambda row: row.sum() + row.new_ones(()))(x)

    x = torch.randn(2, 3)
    for name in ("remove_dead_code", "canonicalize"):
        stage = Stage.PACKED if name == "remove_dead_code" else Stage.CAPTURED
        after = PassManager([name]).run(replace(program_of(function, x), stage=stage))
        assert "sin" not in {node.name for node in after.graph.graph.nodes}
        assert torch.equal(torch.fx.Interpreter(after.graph).run(x)[0], function(x))


def test_nothing_to_do():
    after = PassManager(["remove_dead_code"]).run(program_of(lambda x: x + 1, torch.ones(3)))
    assert after.facts[FACT] == Fired()
