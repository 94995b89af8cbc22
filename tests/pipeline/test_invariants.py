"""What must hold after every pass: each check finds its fault right after the pass that made it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from kbitc.errors import PassError
from kbitc.formats.spec import parse
from kbitc.graph.capture import capture
from kbitc.graph.plan import Choice, Plan
from kbitc.graph.program import Stage
from kbitc.passes.apply_plan import ApplyPlan
from kbitc.pipeline.manager import PassManager

NF4 = ApplyPlan({"weights": {"*": "nf4:64"}})


def _unordered(program):
    graph = program.graph.graph
    relu = next(node for node in graph.nodes if "relu" in node.name)
    next(node for node in graph.nodes if node.op == "placeholder").append(relu)
    return program


def _renamed(program):
    weight = program.weights["0.weight"]
    use = replace(weight.uses[0], node="relu")
    return replace(program, weights={**program.weights, "0.weight": replace(weight, uses=(use,))})


FAULTS = {
    "no program": (lambda p: None, "run returned NoneType, not a Program"),
    "stage": (lambda p: replace(p, stage=Stage.PLANNED), "gives stage CANONICAL, but returned .* PLANNED"),
    "graph": (_unordered, "left a broken graph"),
    "lost": (lambda p: replace(p, weights={}), "lost the tensor '0.weight'"),
    "made up": (lambda p: replace(p, rest={**p.rest, "new": p.rest["0.bias"]}), "made up a tensor 'new'"),
    "twice": (lambda p: replace(p, rest={**p.rest, "0.weight": p.rest["0.bias"]}), "and also among the rest"),
    "input": (
        lambda p: replace(p, parameters={**p.parameters, "p_x": "0.bias"}),
        "removed the graph input 'p_x'",
    ),
    "use": (_renamed, "'0.weight' says that 'relu' is its linear, which it is not"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_program_is_found_right_after_the_pass(captured, name, Broken):
    change, message = FAULTS[name]
    with pytest.raises(PassError, match=rf"pass 'broken', after the passes \['canonicalize'\]: .*{message}"):
        PassManager(["canonicalize", Broken(change)]).run(captured)


def _second_output(nodes):
    out = nodes["output"]
    out.args = ((*out.args[0], out.args[0][0]),)


def _in_place(program):
    next(node for node in program.graph.graph.nodes if "relu" in node.name).target = torch.neg
    return program


def _copied(change):
    def run(program):
        graph = torch.fx.Graph()
        copied = {}
        out = graph.output(graph.graph_copy(program.graph.graph, copied))
        out.meta = dict(program.graph.graph.output_node().meta)
        change({node.name: node for node in graph.nodes})
        return replace(program, graph=torch.fx.GraphModule(program.graph, graph))

    return run


def _other_shape(nodes):
    last = nodes["linear_1"]
    last.meta = {**last.meta, "val": last.meta["val"].mT}


def _other_inside(nodes):
    nodes["relu"].meta = {**nodes["relu"].meta, "val": nodes["relu"].meta["val"].double()}


def _cannot_run(nodes):
    nodes["relu"].target = torch.add  # of one argument


def _with_plan(change):
    """``change`` of the choices of a good plan."""
    return lambda p: replace(p, plan=Plan(change(dict(p.plan.weights))))


CHOICE = Choice(parse("nf4:64"))


INVARIANTS = {
    "alias": (
        lambda p: replace(p, rest={**p.rest, "0.bias": replace(p.rest["0.bias"], aliases=("2.weight",))}),
        "'2.weight' names two tensors: a tied tensor is one entry",
    ),
    "key": (
        lambda p: replace(p, rest={**p.rest, "0.bias": p.rest["2.bias"]}),
        "keeps a tensor under '0.bias' that calls itself by another name",
    ),
    "outputs": (_copied(_second_output), "left the model 2 outputs, which had 1"),
    "output shape": (
        _copied(_other_shape),
        r"changed output 0 of the model from float32\[2, 3\] to float32\[3, 2\]",
    ),
    "fact": (lambda p: replace(p, facts={}), "dropped the fact 'pipeline'; use program.with_fact"),
    "in place": (_in_place, "changed the graph of the program that it was given; change a copy"),
    "no plan": (lambda p: replace(p, plan=None), "gives stage PLANNED, but left no plan"),
    "unplanned": (_with_plan(lambda w: {"0.weight": CHOICE}), "left the weight '2.weight' without a spec"),
    "unknown": (_with_plan(lambda w: {**w, "9.weight": CHOICE}), "plans '9.weight', which is no weight"),
    "rest": (_with_plan(lambda w: {**w, "0.bias": CHOICE}), "plans '0.bias', which stays at 16 bits: 1-D"),
}


@pytest.mark.parametrize("name", INVARIANTS)
def test_a_broken_invariant_is_found_right_after_the_pass(captured, name, BrokenPlan):
    change, message = INVARIANTS[name]
    ran = r"\['canonicalize', 'apply_plan'\]"
    with pytest.raises(PassError, match=rf"pass 'broken_plan', after the passes {ran}: .*{message}"):
        PassManager(["canonicalize", NF4, BrokenPlan(change)]).run(captured)


def test_a_tied_weight_is_planned_once(BrokenPlan):
    model = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)).requires_grad_(False)
    model[1].weight = model[0].weight
    change = _with_plan(lambda w: {**w, "1.weight": CHOICE})
    manager = PassManager(["canonicalize", NF4, BrokenPlan(change)])
    with pytest.raises(
        PassError, match=r"plans '1.weight', which is tied: it is planned once, as '0.weight'"
    ):
        manager.run(capture(model, (torch.zeros(2, 5),)))


CHECKED = {
    "recorded value": (
        _copied(_other_inside),
        r"recorded float64\[2, 5\] as the value of 'relu', which computes float32\[2, 5\]",
    ),
    "cannot run": (_copied(_cannot_run), "left a graph that cannot run: 'relu': TypeError"),
    "given graph": (
        lambda p: _copied(lambda nodes: None)(_in_place(p)),
        "changed the graph of the program that it was given",
    ),
}


@pytest.mark.parametrize("name", CHECKED)
def test_what_only_a_checking_manager_finds(captured, name, Broken):
    change, message = CHECKED[name]
    passes = ["canonicalize", Broken(change)]
    with pytest.raises(PassError, match=message):
        PassManager(passes, is_checked=True).run(captured)


def test_a_good_pipeline_passes_every_check(captured, BrokenPlan):
    program = PassManager(["canonicalize", NF4, BrokenPlan(lambda p: p)], is_checked=True).run(captured)
    assert program.stage is Stage.PLANNED
