from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from kbitc.capture import capture
from kbitc.errors import BudgetError, PassError, UsageError
from kbitc.passes.canonicalize import Canonicalize
from kbitc.pipeline import FACT, PassManager, Step, default_pipeline, load_pass, name_of, pass_names
from kbitc.program import Stage


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


def test_history_and_measurements_are_the_managers(captured):
    program = PassManager(["canonicalize", Broken(lambda p: p)]).run(captured)
    assert program.history == ("canonicalize", "broken")
    first, second = program.facts[FACT]
    assert isinstance(first, Step)
    assert (first.name, second.name) == ("canonicalize", "broken")
    assert first.seconds > 0
    assert first.nodes_after == len(program.graph.graph.nodes) == second.nodes_before


def test_later_managers_add_to_what_is_known(captured):
    program = PassManager([Canonicalize()]).run(captured)
    program = PassManager([Broken(lambda p: p.with_fact("x", 1))]).run(program)
    assert [step.name for step in program.facts[FACT]] == ["canonicalize", "broken"]
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


def test_the_default_pipeline_ends_in_a_plan():
    passes = default_pipeline(budget=3.5)
    assert [name_of(p) for p in passes] == ["canonicalize", "allocate_bits"]
    assert passes[0].needs is Stage.CAPTURED
    assert passes[-1].gives is Stage.PLANNED
    assert passes[-1].budget == 3.5


def test_importing_the_package_of_passes_loads_no_pass():
    code = (
        "import sys, kbitc.passes; "
        "assert not [m for m in sys.modules if m.startswith('kbitc.passes.')]; "
        "from kbitc.passes import Canonicalize, Pass, PassManager, default_pipeline; "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
