"""`PassManager`: what it runs, measures, shows and says when a pass fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from kbitc.compiler.driver import compile_to
from kbitc.compiler.request import Request
from kbitc.errors import BudgetError, PassError, UsageError
from kbitc.graph.facts import Fact
from kbitc.passes.apply_plan import ApplyPlan
from kbitc.passes.canonicalize import Canonicalize
from kbitc.pipeline.manager import STEPS, PassManager, Step
from kbitc.pipeline.registry import name_of

NF4 = ApplyPlan({"weights": {"*": "nf4:64"}})


def test_history_and_measurements_are_the_managers(captured, Broken):
    program = PassManager(["canonicalize", Broken(lambda p: p)]).run(captured)
    assert program.history == ("canonicalize", "broken")
    first, second = program.facts[STEPS]
    assert isinstance(first, Step)
    assert (first.name, second.name) == ("canonicalize", "broken")
    assert first.seconds > 0
    assert first.nodes_after == len(program.graph.graph.nodes) == second.nodes_before


def test_a_step_says_what_changed(captured, BrokenPlan):
    program = PassManager(["canonicalize", NF4, BrokenPlan(lambda p: p)]).run(captured)
    found, planned, nothing = program.facts[STEPS]
    # The two linears keep their names and become canonical calls; FX renames the input in a copy,
    # because `input` is a builtin.
    assert (found.added, found.removed, found.changed, found.planned) == (1, 1, 2, 0)
    assert str(found) == "1 nodes added, 1 nodes removed, 2 nodes changed"
    assert (planned.changed, planned.planned, str(planned)) == (0, 2, "2 weights planned")
    assert str(nothing) == "nothing changed"


def test_a_step_counts_nodes_and_facts(captured, Broken):
    def double(program):
        graph = torch.fx.Graph()
        out = graph.graph_copy(program.graph.graph, {})
        graph.output((graph.call_function(torch.neg, (out[0],)),))
        return replace(program, graph=torch.fx.GraphModule(program.graph, graph)).with_fact(
            Fact("negated"), True
        )

    program = PassManager(["canonicalize", Broken(double)]).run(captured)
    step = program.facts[STEPS][-1]
    assert (step.added, step.removed, step.changed, step.facts) == (1, 0, 1, ("negated",))
    assert str(step) == "1 nodes added, 1 nodes changed, new facts: negated"


def test_later_managers_add_to_what_is_known(captured, Broken):
    program = PassManager([Canonicalize()]).run(captured)
    program = PassManager([Broken(lambda p: p.with_fact(Fact("x"), 1))]).run(program)
    assert [step.name for step in program.facts[STEPS]] == ["canonicalize", "broken"]
    assert program.get(Fact("x")) == 1


def test_an_exception_names_the_pass_and_what_had_run(captured, Broken):
    def fail(program):
        raise KeyError("thing")

    with pytest.raises(
        PassError, match=r"pass 'broken', after the passes \['canonicalize'\]: KeyError: 'thing'"
    ) as e:
        PassManager(["canonicalize", Broken(fail)]).run(captured)
    assert isinstance(e.value.__cause__, KeyError)


def test_what_a_pass_says_to_its_user_goes_through(captured, Broken):
    def fail(program):
        raise BudgetError("the smallest budget is 5 bits")

    with pytest.raises(BudgetError, match=r"^the smallest budget is 5 bits"):
        PassManager(["canonicalize", Broken(fail)]).run(captured)


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


def test_compiling_makes_one_manager_and_runs_it_once():
    """Defect: a second one was made of the same passes once the model was open."""
    made, ran = [], []

    class Counted(PassManager):
        def run(self, program):
            ran.append(self.passes)
            return super().run(program)

    def manage(passes):
        made.append(passes)
        return Counted(passes)

    model = nn.Sequential(nn.Linear(70, 50), nn.ReLU(), nn.Linear(50, 30)).requires_grad_(False)
    options = {"example_inputs": (torch.zeros(1, 70),), "is_dry": True, "manage": manage}
    result = compile_to(model, Path("never written"), Request(bits=6.0, calibrate="none"), **options)
    assert len(made) == len(ran) == 1
    # Nothing to measure on: the same manager, of fewer passes.
    assert [name_of(pass_) for pass_ in ran[0]] == ["canonicalize", "score_sensitivity", "allocate_bits"]
    assert result.program.history == ("canonicalize", "score_sensitivity", "allocate_bits")
