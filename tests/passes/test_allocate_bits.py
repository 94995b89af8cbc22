"""The pass `allocate_bits`: never over budget, spends it, prefers what helps most."""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest
import torch
from torch import fx, nn

from kbitc.errors import BudgetError, UsageError
from kbitc.formats.spec import parse
from kbitc.graph.context import Context
from kbitc.graph.program import Program, Rest, Stage, Weight
from kbitc.graph.stored import stored_bytes
from kbitc.passes.allocate_bits import AllocateBits
from kbitc.passes.score_sensitivity import ScoreSensitivity
from kbitc.planning.allocation import ALLOCATION, allocate
from kbitc.sensitivity.moments import MOMENTS, Factor, Moments
from kbitc.sensitivity.score_table import SCORES, Option, ScoreTable, monotone


def make_program(shapes, rest=64, scale=None):
    generator = torch.Generator().manual_seed(0)
    data = {f"w{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
    for name, factor in (scale or {}).items():
        data[name][:, ::97] *= factor
    weights = {name: Weight(name, tuple(t.shape), torch.float16) for name, t in data.items()}
    norm = {"norm": Rest("norm", (rest,), torch.float16, "1-D")}
    graph = fx.GraphModule(nn.Module(), fx.Graph())
    return Program(graph, {}, weights, norm, stage=Stage.CANONICAL, context=Context(data.__getitem__))


@functools.cache
def scored(*shapes, rest=64, scale=()):
    return ScoreSensitivity().run(make_program(shapes or SHAPES, rest, dict(scale)))


SHAPES = [(300, 256), (256, 300), (512, 172), (64, 2048), (1000, 256)]


@pytest.mark.parametrize("budget", [2.5, 3, 3.5, 4, 4.5, 5, 6, 8])
def test_budget_is_never_exceeded_and_is_spent(budget):
    program = AllocateBits(budget=budget).run(scored())
    room = budget * program.parameter_count / 8
    stored = stored_bytes(program)
    assert stored <= room
    assert stored >= 0.99 * room  # five weights, so the last change is a large one
    assert program.stage == Stage.PLANNED
    assert program.plan.budget == budget


def test_more_bits_give_less_error():
    program = scored()
    errors = []
    for budget in (2.5, 3, 4, 5, 6):
        plan = AllocateBits(budget=budget).run(program).plan
        errors.append(sum(c.error**2 * program.weights[n].numel for n, c in plan.weights.items()))
    assert errors == sorted(errors, reverse=True)


def test_plans_repeat():
    first = AllocateBits(budget=3.3).run(scored()).plan
    assert first == AllocateBits(budget=3.3).run(ScoreSensitivity().run(make_program(SHAPES))).plan


def test_a_weight_with_outliers_gets_what_it_needs():
    """At equal bits its blocks are worse, so under a common budget it gets more of them."""
    program = scored((256, 512), (256, 512), scale=(("w1", 30.0),))
    plan = AllocateBits(budget=4).run(program).plan
    assert plan.weights["w0"].spec != plan.weights["w1"].spec


def test_an_impossible_budget_names_the_smallest_that_works():
    program = scored(rest=200_000)
    with pytest.raises(BudgetError, match=r"Ask for --bits (\d+\.\d+) or more") as caught:
        AllocateBits(budget=2.0).run(program)
    smallest = float(str(caught.value).rpartition("--bits ")[2].split()[0])
    assert AllocateBits(budget=smallest).run(program).stage == Stage.PLANNED
    with pytest.raises(BudgetError):
        AllocateBits(budget=smallest - 0.02).run(program)


def test_reasons_and_errors_are_given():
    plan = AllocateBits(budget=4).run(scored()).plan
    for choice in plan.weights.values():
        assert "relative error" in choice.reason
        assert choice.error is not None


def test_the_solution_is_told():
    program = AllocateBits(budget=3.5).run(scored())
    solution = program.known(ALLOCATION)
    assert solution.is_proved
    assert solution.gap < 1e-3
    assert solution.lagrangian <= solution.cost


def test_scores_give_another_budget_without_the_model():
    scores = scored().known(SCORES)
    again = ScoreTable.from_json(json.loads(json.dumps(scores.to_json())))
    assert again.unit == "relative"
    for budget in (2.7, 4, 6):
        plan, _ = allocate(again, budget)
        expected = AllocateBits(budget=budget).run(scored()).plan
        assert {n: c.spec for n, c in plan.weights.items()} == {
            n: c.spec for n, c in expected.weights.items()
        }
    for bad in ({}, {"format": 1}, {"format": 1, "weights": {"a": {}}}, []):
        with pytest.raises(UsageError, match="damaged"):
            ScoreTable.from_json(bad)
    with pytest.raises(UsageError, match="upgrade kbitc"):
        ScoreTable.from_json(scores.to_json() | {"format": 99})


def test_more_bits_never_cost_more():
    costs = {"nf2:64": 5.0, "nf3:64": 6.0, "nf4:64": 1.0, "nf3:32": 2.0, "nf4:32": 3.0}
    options = monotone(tuple(Option(parse(name), 1, cost, 0.0) for name, cost in costs.items()))
    assert [option.cost for option in options] == [5.0, 5.0, 1.0, 2.0, 2.0]


def test_moments_turn_errors_into_nats():
    """Of two equal weights the one whose outputs matter more gets more bits; a dead one the fewest."""
    program = make_program([(256, 256), (256, 256), (256, 256)])
    moments = {
        f"w{i}": Moments((Factor(torch.full((256,), gradient), torch.ones(256)),))
        for i, gradient in enumerate((1.0, 100.0, 0.0))
    }
    program = ScoreSensitivity().run(program.with_fact(MOMENTS, moments))
    scores = program.known(SCORES)
    assert (scores.source, scores.unit) == ("fisher", "nats per token")
    first, second = ({o.spec: o.cost for o in scores.options[name]} for name in ("w0", "w1"))
    for spec in first:
        # The same option on another random weight: a hundred times the price, but for sampling.
        assert second[spec] == pytest.approx(100 * first[spec], rel=0.1, abs=1e-9)
    plan = AllocateBits(budget=4).run(program).plan
    bits = [plan.weights[name].spec.bits for name in ("w0", "w1", "w2")]
    assert bits[1] > bits[0] > bits[2] == 2


def grouped(*names):
    scores = scored((64, 256), (256, 256), (64, 256), (96, 256), scale=(("w1", 30.0),)).known(SCORES)
    return dataclasses.replace(scores, groups={"input": [names]})


def test_weights_that_must_agree_do():
    free = allocate(grouped("w0", "w1"), 4)
    bound = allocate(grouped("w0", "w1"), 4, "input")
    assert free[0].weights["w0"].spec != free[0].weights["w1"].spec
    assert bound[0].weights["w0"].spec == bound[0].weights["w1"].spec
    assert free[1].cost < bound[1].cost  # a constraint costs something


def test_agreement_survives_the_score_table():
    scores = grouped("w1", "w3")
    again = ScoreTable.from_json(json.loads(json.dumps(scores.to_json())))
    plan, _ = allocate(again, 3.5, "input")
    assert plan.weights["w1"].spec == plan.weights["w3"].spec


def test_an_unknown_agreement_names_those_there_are():
    with pytest.raises(UsageError, match="did you mean 'input'"):
        allocate(grouped("w0", "w1"), 4, "inputs")
