"""The pass `allocate_bits`: never over budget, spends it, prefers what helps most."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from kbitc import pack
from kbitc.errors import BudgetError, UsageError
from kbitc.passes.allocate_bits import CANDIDATES, AllocateBits, Option, _hull
from kbitc.program import Program, Rest, Stage, Weight
from kbitc.spec import parse


def make_program(shapes, rest=64, scale=None):
    generator = torch.Generator().manual_seed(0)
    data = {f"w{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
    for name, factor in (scale or {}).items():
        data[name][:, ::97] *= factor
    weights = {name: Weight(name, tuple(t.shape), torch.float16) for name, t in data.items()}
    norm = {"norm": Rest("norm", (rest,), torch.float16, "1-D")}
    graph = fx.GraphModule(nn.Module(), fx.Graph())
    return Program(graph, {}, weights, norm, stage=Stage.CANONICAL, read=data.__getitem__)


SHAPES = [(300, 256), (256, 300), (512, 172), (64, 2048), (1000, 256)]


@pytest.mark.parametrize("budget", [2.5, 3, 3.5, 4, 4.5, 5, 6, 8])
def test_budget_is_never_exceeded_and_is_spent(budget):
    program = AllocateBits(budget=budget).run(make_program(SHAPES))
    room = budget * program.parameter_count / 8
    stored = pack.payload_bytes(program)
    assert stored <= room
    assert stored >= 0.985 * room
    assert program.stage == Stage.PLANNED
    assert program.plan.budget == budget


def test_more_bits_give_less_error():
    program = make_program(SHAPES)
    errors = []
    for budget in (2.5, 3, 4, 5, 6):
        plan = AllocateBits(budget=budget).run(program).plan
        errors.append(sum(c.error**2 * program.weights[n].numel for n, c in plan.weights.items()))
    assert errors == sorted(errors, reverse=True)


def test_plans_repeat():
    first = AllocateBits(budget=3.3).run(make_program(SHAPES)).plan
    assert first == AllocateBits(budget=3.3).run(make_program(SHAPES)).plan


def test_a_weight_with_outliers_gets_what_it_needs():
    """At equal bits its blocks are worse, so under a common budget it gets more of them."""
    program = make_program([(256, 512), (256, 512)], scale={"w1": 30.0})
    plan = AllocateBits(budget=4).run(program).plan
    assert plan.weights["w0"].spec != plan.weights["w1"].spec


def test_an_impossible_budget_names_the_smallest_that_works():
    program = make_program(SHAPES, rest=200_000)
    with pytest.raises(BudgetError, match=r"Ask for --bits (\d+\.\d+) or more") as caught:
        AllocateBits(budget=2.0).run(program)
    smallest = float(str(caught.value).rpartition("--bits ")[2].split()[0])
    assert AllocateBits(budget=smallest).run(program).stage == Stage.PLANNED
    with pytest.raises(BudgetError):
        AllocateBits(budget=smallest - 0.02).run(program)


def test_reasons_and_errors_are_given():
    plan = AllocateBits(budget=4).run(make_program(SHAPES)).plan
    for choice in plan.weights.values():
        assert "relative error" in choice.reason
        assert choice.error is not None


def test_without_a_source_it_says_so():
    program = make_program([(4, 4)])
    with pytest.raises(UsageError, match="no source"):
        AllocateBits().run(Program(program.graph, {}, program.weights, stage=Stage.CANONICAL))


def test_hull_keeps_only_convex_steps():
    spec = parse("nf4:64")
    points = [(10, 9.0), (11, 8.9), (20, 4.0), (21, 5.0), (30, 3.9), (40, 1.0)]
    hull = _hull([Option(spec, nbytes, cost, 0.0) for nbytes, cost in points])
    assert [(o.nbytes, o.cost) for o in hull] == [(10, 9.0), (20, 4.0), (40, 1.0)]


def test_candidates_span_all_bits():
    assert {spec.bits for spec in CANDIDATES} == set(range(2, 9))
