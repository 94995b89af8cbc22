from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from kbitc.errors import BudgetError, PassError, UsageError
from kbitc.formats.spec import parse
from kbitc.graph.capture import capture
from kbitc.graph.plan import Choice, Plan
from kbitc.graph.program import Stage
from kbitc.passes.apply_plan import ApplyPlan
from kbitc.passes.canonicalize import Canonicalize
from kbitc.pipeline import describe, edit_pipeline, load_pass, name_of, pass_names
from kbitc.pipeline.defaults import default_pipeline
from kbitc.pipeline.manager import STEPS, PassManager, Step


@pytest.fixture
def captured():
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)).requires_grad_(False)
    return capture(model, (torch.zeros(2, 7),))


@dataclass(frozen=True)
class Broken:
    """``change(program)``, at the canonical stage."""

    change: object

    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL

    def run(self, program):
        return self.change(program)


@dataclass(frozen=True)
class Broken2(Broken):
    """The same on a planned program."""

    needs: ClassVar[Stage] = Stage.PLANNED
    gives: ClassVar[Stage] = Stage.PLANNED


@dataclass(frozen=True)
class FindMoments:
    """Provides a fact."""

    is_done: bool = True

    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL
    provides: ClassVar[tuple[str, ...]] = ("row_sums",)

    def run(self, program):
        return program.with_fact("row_sums", {}) if self.is_done else program


@dataclass(frozen=True)
class UseMoments:
    """Requires it."""

    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL
    requires: ClassVar[tuple[str, ...]] = ("row_sums",)

    def run(self, program):
        assert "row_sums" in program.facts
        return program


NF4 = ApplyPlan({"weights": {"*": "nf4:64"}})


def test_history_and_measurements_are_the_managers(captured):
    program = PassManager(["canonicalize", Broken(lambda p: p)]).run(captured)
    assert program.history == ("canonicalize", "broken")
    first, second = program.facts[STEPS]
    assert isinstance(first, Step)
    assert (first.name, second.name) == ("canonicalize", "broken")
    assert first.seconds > 0
    assert first.nodes_after == len(program.graph.graph.nodes) == second.nodes_before


def test_a_step_says_what_changed(captured):
    program = PassManager(["canonicalize", NF4, Broken2(lambda p: p)]).run(captured)
    found, planned, nothing = program.facts[STEPS]
    # The two linears keep their names and become canonical calls; FX renames the input in a copy,
    # because `input` is a builtin.
    assert (found.added, found.removed, found.changed, found.planned) == (1, 1, 2, 0)
    assert str(found) == "1 nodes added, 1 nodes removed, 2 nodes changed"
    assert (planned.changed, planned.planned, str(planned)) == (0, 2, "2 weights planned")
    assert str(nothing) == "nothing changed"


def test_a_step_counts_nodes_and_facts(captured):
    def double(program):
        graph = torch.fx.Graph()
        out = graph.graph_copy(program.graph.graph, {})
        graph.output((graph.call_function(torch.neg, (out[0],)),))
        return replace(program, graph=torch.fx.GraphModule(program.graph, graph)).with_fact("negated", True)

    program = PassManager(["canonicalize", Broken(double)]).run(captured)
    step = program.facts[STEPS][-1]
    assert (step.added, step.removed, step.changed, step.facts) == (1, 0, 1, ("negated",))
    assert str(step) == "1 nodes added, 1 nodes changed, new facts: negated"


def test_later_managers_add_to_what_is_known(captured):
    program = PassManager([Canonicalize()]).run(captured)
    program = PassManager([Broken(lambda p: p.with_fact("x", 1))]).run(program)
    assert [step.name for step in program.facts[STEPS]] == ["canonicalize", "broken"]
    assert program.facts["x"] == 1


def test_passes_out_of_order_are_refused(captured):
    with pytest.raises(PassError, match=r"pass 'broken', as the first pass: needs stage CANONICAL.*CAPTURED"):
        PassManager([Broken(lambda p: p)]).run(captured)
    with pytest.raises(
        PassError, match=r"'canonicalize', after the passes \['canonicalize'\]: .*already been run"
    ):
        PassManager(["canonicalize", "canonicalize"]).run(captured)


def test_an_exception_names_the_pass_and_what_had_run(captured):
    def fail(program):
        raise KeyError("thing")

    with pytest.raises(
        PassError, match=r"pass 'broken', after the passes \['canonicalize'\]: KeyError: 'thing'"
    ) as e:
        PassManager(["canonicalize", Broken(fail)]).run(captured)
    assert isinstance(e.value.__cause__, KeyError)


def test_what_a_pass_says_to_its_user_goes_through(captured):
    def fail(program):
        raise BudgetError("the smallest budget is 5 bits")

    with pytest.raises(BudgetError, match=r"^the smallest budget is 5 bits"):
        PassManager(["canonicalize", Broken(fail)]).run(captured)


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
def test_a_broken_program_is_found_right_after_the_pass(captured, name):
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
def test_a_broken_invariant_is_found_right_after_the_pass(captured, name):
    change, message = INVARIANTS[name]
    ran = r"\['canonicalize', 'apply_plan'\]"
    with pytest.raises(PassError, match=rf"pass 'broken2', after the passes {ran}: .*{message}"):
        PassManager(["canonicalize", NF4, Broken2(change)]).run(captured)


def test_a_tied_weight_is_planned_once():
    model = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)).requires_grad_(False)
    model[1].weight = model[0].weight
    change = _with_plan(lambda w: {**w, "1.weight": CHOICE})
    manager = PassManager(["canonicalize", NF4, Broken2(change)])
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
def test_what_only_a_checking_manager_finds(captured, name):
    change, message = CHECKED[name]
    passes = ["canonicalize", Broken(change)]
    with pytest.raises(PassError, match=message):
        PassManager(passes, is_checked=True).run(captured)


def test_a_good_pipeline_passes_every_check(captured):
    program = PassManager(["canonicalize", NF4, Broken2(lambda p: p)], is_checked=True).run(captured)
    assert program.stage is Stage.PLANNED


def test_required_facts_are_provided_before_anything_runs(captured):
    program = PassManager(["canonicalize", FindMoments(), UseMoments()]).run(captured)
    assert program.history == ("canonicalize", "find_moments", "use_moments")
    assert PassManager([UseMoments()]).run(program).history[-1] == "use_moments"  # a fact of an earlier run

    def ran(program):
        raise AssertionError("the order is known to be wrong before this runs")

    with pytest.raises(
        PassError,
        match=r"'use_moments', after the passes \['canonicalize', 'broken'\]: needs the fact 'row_sums', "
        r"which the pass 'find_moments' provides: put that one before it",
    ):
        PassManager(["canonicalize", Broken(ran), UseMoments(), FindMoments()]).run(captured)
    with pytest.raises(PassError, match="'row_sums', which no registered pass provides"):
        PassManager(["canonicalize", UseMoments()]).run(captured)


def test_a_provider_among_the_registered_is_named(captured):
    @dataclass(frozen=True)
    class Late(UseMoments):
        requires: ClassVar[tuple[str, ...]] = ("merge_linears",)

    with pytest.raises(PassError, match="which the pass 'merge_linears' provides: add that one before it"):
        PassManager(["canonicalize", Late()]).run(captured)


def test_a_promised_fact_must_come(captured):
    with pytest.raises(PassError, match="provides the fact 'row_sums', but did not add it"):
        PassManager(["canonicalize", FindMoments(is_done=False)]).run(captured)


def test_facts_are_declared_as_tuples(captured):
    @dataclass(frozen=True)
    class OneName(UseMoments):
        requires: ClassVar[str] = "row_sums"

    with pytest.raises(PassError, match=r"requires is 'row_sums'; write a tuple of names"):
        PassManager(["canonicalize", OneName()]).run(captured)


def test_advice_names_the_passes_that_give_a_stage(captured):
    with pytest.raises(
        PassError, match=r"first run a pass that gives PLANNED \(allocate_bits or apply_plan\)"
    ):
        PassManager(["canonicalize", Broken2(lambda p: p)]).run(captured)


def test_an_observer_sees_each_pass(captured):
    seen = []
    manager = PassManager(["canonicalize", NF4], observe=lambda *args: seen.append(args))
    program = manager.run(captured)
    assert [name for name, *_ in seen] == ["canonicalize", "apply_plan"]
    (_, first, middle, seconds), (_, again, last, _) = seen
    assert (first, last) == (captured, program)
    assert middle is again
    assert seconds == middle.facts[STEPS][0].seconds > 0


def test_programs_are_printed(captured):
    written = []
    manager = PassManager(
        ["canonicalize", NF4],
        print_before=["canonicalize"],
        print_after=["canonicalize"],
        print_diff=["canonicalize", "apply_plan"],
        write=written.append,
    )
    manager.run(captured)
    before, after, changes, plan = written
    assert before.startswith("before canonicalize: stage CAPTURED")
    assert "linear: float32[2, 5] = aten.linear.default(input, p_0_weight, p_0_bias)" in before
    assert after.startswith("after canonicalize: stage CANONICAL")
    assert "+linear: float32[2, 5] = linear(input_1, p_0_weight, p_0_bias)" in changes
    assert "relu" in after
    assert "-  0.weight float32[5, 7], read by linear linear: no spec yet" in plan
    assert "+  0.weight float32[5, 7], read by linear linear: nf4:64 (given by the plan)" in plan
    with pytest.raises(
        UsageError, match=r"print after: no pass of this pipeline 'canonicalise'; did you mean"
    ):
        PassManager(["canonicalize"], print_after=["canonicalise"])


def test_a_pipeline_is_edited():
    usual = default_pipeline(budget=3.5)
    assert edit_pipeline(usual) == usual
    keep = Broken2(lambda p: p)
    edited = edit_pipeline(usual, ["canonicalize", FindMoments(), "score_sensitivity", "allocate_bits", keep])
    assert edited == [usual[0], FindMoments(), *usual[1:], keep]  # the configured planner
    assert edit_pipeline(edited, None, ["find_moments", "broken2"]) == usual
    for chosen, disabled, message in (
        (["canonicalise"], (), "no pass 'canonicalise'; did you mean 'canonicalize'"),
        (
            None,
            ["alocate_bits"],
            "disable: no pass of this pipeline 'alocate_bits'; did you mean 'allocate_bits'",
        ),
        (
            None,
            ["allocate_bits"],
            r"\['canonicalize', 'score_sensitivity'\] end at stage CANONICAL.*\(allocate_bits or apply_plan\)",
        ),
        (["allocate_bits", "canonicalize"], (), "needs stage CANONICAL, but the program is CAPTURED"),
        ([], (), r"the passes \[\] end at stage CAPTURED"),
    ):
        with pytest.raises(UsageError, match=message):
            edit_pipeline(usual, chosen, disabled)


def test_passes_are_described():
    about = describe("merge_linears")
    assert (about["needs"], about["gives"], about["provides"]) == ("PACKED", "PACKED", ["merge_linears"])
    assert all(describe(name)["summary"] for name in pass_names())


def test_every_file_of_the_folder_is_a_pass():
    assert "canonicalize" in pass_names()
    for name in pass_names():
        loaded = load_pass(name)
        assert isinstance(loaded.needs, Stage)
        assert isinstance(loaded.gives, Stage)
        assert loaded.__module__ == f"kbitc.passes.{name}"
        assert name_of(object.__new__(loaded)) == name


def test_an_unknown_pass_gets_a_hint():
    with pytest.raises(UsageError, match=r"no pass 'canonicalise'; did you mean 'canonicalize'"):
        PassManager(["canonicalise"])


def test_what_is_no_pass_is_refused():
    with pytest.raises(UsageError, match=r"Canonicalize is a class; give a pass, Canonicalize\(\)"):
        PassManager([Canonicalize])
    with pytest.raises(UsageError, match="7 is no pass: it has no 'needs'"):
        PassManager([7])


def test_the_default_pipeline_ends_in_a_plan():
    passes = default_pipeline(budget=3.5)
    assert [name_of(p) for p in passes] == ["canonicalize", "score_sensitivity", "allocate_bits"]
    assert passes[0].needs is Stage.CAPTURED
    assert passes[-1].gives is Stage.PLANNED
    assert passes[-1].budget == 3.5


def test_the_default_pipeline_keeps_every_invariant():
    model = nn.Sequential(nn.Linear(70, 50), nn.ReLU(), nn.Linear(50, 30)).requires_grad_(False)
    program = capture(model, (torch.zeros(2, 70),), read=model.state_dict().__getitem__)
    planned = PassManager(default_pipeline(budget=6), is_checked=True).run(program)
    assert set(planned.plan.weights) == {"0.weight", "2.weight"}


def test_importing_the_package_of_passes_loads_no_pass():
    code = (
        "import sys, kbitc.passes; "
        "assert not [m for m in sys.modules if m.startswith('kbitc.passes.')]; "
        "from kbitc.passes import Canonicalize, Pass, PassManager, default_pipeline; "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
