"""The pass `apply_plan`."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from kbitc.errors import UsageError
from kbitc.graph.program import Program, Stage, Weight
from kbitc.passes.apply_plan import ApplyPlan


@pytest.fixture
def program():
    weights = {name: Weight(name, (4, 8), torch.float16) for name in ("a", "b")}
    graph = fx.GraphModule(nn.Module(), fx.Graph())
    return Program(graph, {}, weights, stage=Stage.CANONICAL)


def test_rules_become_choices(program):
    planned = ApplyPlan({"weights": {"*": "nf4:64", "b": {"spec": "int8:32", "reason": "mine"}}}).run(program)
    assert planned.stage == Stage.PLANNED
    assert {name: (str(c.spec), c.reason) for name, c in planned.plan.weights.items()} == {
        "a": ("nf4:64", "given by the plan"),
        "b": ("int8:32", "mine"),
    }


def test_an_unknown_weight_is_an_error(program):
    with pytest.raises(UsageError, match="no weight 'c'"):
        ApplyPlan({"weights": {"*": "nf4:64", "c": "nf4:64"}}).run(program)
