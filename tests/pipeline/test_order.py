"""Which passes run and in which order: stages, facts, names, the default orders."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import kbitc
from kbitc.compiler.request import Request, pipeline_of
from kbitc.errors import PassError, UsageError
from kbitc.graph.capture import capture
from kbitc.graph.context import Context
from kbitc.graph.facts import Fact
from kbitc.graph.program import Stage
from kbitc.passes.apply_plan import ApplyPlan
from kbitc.passes.canonicalize import Canonicalize
from kbitc.passes.merge_linears import FACT as MERGED
from kbitc.pipeline.defaults import COMPILING, default_pipeline, planning_pipeline
from kbitc.pipeline.manager import PassManager
from kbitc.pipeline.order import edit_pipeline
from kbitc.pipeline.registry import describe, load_pass, name_of, pass_names
from kbitc.planning.allocation import DEFAULT_BUDGET

ROW_SUMS = Fact("row_sums")
NF4 = ApplyPlan({"weights": {"*": "nf4:64"}})


@dataclass(frozen=True)
class FindMoments:
    """Provides a fact."""

    is_done: bool = True

    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL
    provides: ClassVar[tuple[Fact, ...]] = (ROW_SUMS,)

    def run(self, program):
        return program.with_fact(ROW_SUMS, {}) if self.is_done else program


@dataclass(frozen=True)
class UseMoments:
    """Requires it."""

    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL
    requires: ClassVar[tuple[Fact, ...]] = (ROW_SUMS,)

    def run(self, program):
        assert ROW_SUMS in program.facts
        return program


def test_passes_out_of_order_are_refused(captured, Broken):
    with pytest.raises(PassError, match=r"pass 'broken', as the first pass: needs stage CANONICAL.*CAPTURED"):
        PassManager([Broken(lambda p: p)]).run(captured)
    with pytest.raises(
        PassError, match=r"'canonicalize', after the passes \['canonicalize'\]: .*already been run"
    ):
        PassManager(["canonicalize", "canonicalize"]).run(captured)


def test_required_facts_are_provided_before_anything_runs(captured, Broken):
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
        requires: ClassVar[tuple[Fact, ...]] = (MERGED,)

    with pytest.raises(PassError, match="which the pass 'merge_linears' provides: add that one before it"):
        PassManager(["canonicalize", Late()]).run(captured)


def test_a_promised_fact_must_come(captured):
    with pytest.raises(PassError, match="provides the fact 'row_sums', but did not add it"):
        PassManager(["canonicalize", FindMoments(is_done=False)]).run(captured)


def test_facts_are_declared_as_tuples(captured):
    @dataclass(frozen=True)
    class OneName(UseMoments):
        requires: ClassVar[Fact] = ROW_SUMS

    with pytest.raises(PassError, match=r"requires is Fact\(name='row_sums'\); write a tuple of facts"):
        PassManager(["canonicalize", OneName()]).run(captured)


def test_advice_names_the_passes_that_give_a_stage(captured, BrokenPlan):
    with pytest.raises(
        PassError, match=r"first run a pass that gives PLANNED \(allocate_bits or apply_plan\)"
    ):
        PassManager(["canonicalize", BrokenPlan(lambda p: p)]).run(captured)


def test_a_pipeline_is_edited(BrokenPlan):
    usual = planning_pipeline(is_measured=False, options={"allocate_bits": {"budget": 3.5}})
    assert edit_pipeline(usual) == usual
    keep = BrokenPlan(lambda p: p)
    edited = edit_pipeline(usual, ["canonicalize", FindMoments(), "score_sensitivity", "allocate_bits", keep])
    assert edited == [usual[0], FindMoments(), *usual[1:], keep]  # the configured planner
    assert edit_pipeline(edited, None, ["find_moments", "broken_plan"]) == usual
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
    assert tuple(name_of(p) for p in passes) == COMPILING
    assert passes[0].needs is Stage.CAPTURED
    assert passes[-1].gives is Stage.PLANNED
    assert passes[-1].budget == 3.5


def test_the_default_pipeline_is_what_compiling_runs_where_nothing_else_is_asked_for():
    assert default_pipeline(3.5) == pipeline_of(Request(bits=3.5))
    assert default_pipeline() == pipeline_of(Request.of())
    assert {"measure_moments", "find_outliers"} < set(map(name_of, default_pipeline()))


def test_what_is_measured_is_left_out_where_there_is_nothing_to_measure_on():
    def names(**options):
        return [name_of(pass_) for pass_ in planning_pipeline(**options)]

    assert names() == list(COMPILING)
    assert names(is_measured=False) == ["canonicalize", "score_sensitivity", "allocate_bits"]
    assert names(with_budget=False) == ["canonicalize", "measure_moments", "find_outliers", "apply_plan"]
    assert names(with_budget=False, is_measured=False) == ["canonicalize", "apply_plan"]
    asked = names(with_budget=False, is_measured=False, finds_outliers=True)
    assert asked == ["canonicalize", "find_outliers", "apply_plan"]


def test_the_default_budget_is_written_once():
    budgets = {default_pipeline()[-1].budget, load_pass("allocate_bits")().budget, Request.of().bits}
    assert budgets == {DEFAULT_BUDGET}
    # A number that a file writes itself would not follow this one.
    root = Path(kbitc.__file__).parent
    literal = re.compile(r"(?:bits|budget)\w*(?:: float(?: \| None)?)? = 4(?:\.0)?\b", re.IGNORECASE)
    files = (path for folder in (root, root / "passes") for path in folder.rglob("*.py"))
    written = {path.name: literal.findall(path.read_text(encoding="utf-8")) for path in files}
    assert {name: texts for name, texts in written.items() if texts} == {
        "allocation.py": ["BUDGET = 4.0"],
    }


def test_a_budgets_pipeline_keeps_every_invariant():
    model = nn.Sequential(nn.Linear(70, 50), nn.ReLU(), nn.Linear(50, 30)).requires_grad_(False)
    context = Context(model.state_dict().__getitem__)
    program = capture(model, (torch.zeros(2, 70),), context=context)
    passes = planning_pipeline(is_measured=False, options={"allocate_bits": {"budget": 6}})
    planned = PassManager(passes, is_checked=True).run(program)
    assert set(planned.plan.weights) == {"0.weight", "2.weight"}
