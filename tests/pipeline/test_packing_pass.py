"""A pass that packs weights itself, one after the other in the graph's order: what it packs is what is stored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

import kbitc
from kbitc.artifact.reader import Artifact
from kbitc.compiler.driver import compile_to
from kbitc.compiler.request import Request
from kbitc.errors import PassError, UsageError
from kbitc.formats.packed import Packed
from kbitc.formats.spec import parse
from kbitc.graph.capture import capture
from kbitc.graph.context import Context
from kbitc.graph.plan import Choice, Plan
from kbitc.graph.program import CANONICAL, Program, Stage
from kbitc.passes.apply_plan import ApplyPlan
from kbitc.pipeline.manager import PassManager
from kbitc.quantizers import choose_quantizer
from kbitc.sensitivity.evidence import Evidence

X = torch.zeros(1, 70)


@dataclass(frozen=True)
class PackInOrder:
    """Packs every weight when its first use is reached, with scales that no quantizer would choose."""

    factor: float = 1.25
    seen: tuple[list[str], ...] = ()

    needs: ClassVar[Stage] = Stage.PLANNED
    gives: ClassVar[Stage] = Stage.PLANNED

    def run(self, program: Program) -> Program:
        lifted = program.parameters
        for node in program.graph.graph.nodes:
            if node.op != "call_function" or node.target not in CANONICAL:
                continue
            name = lifted[node.args[1].name]
            choice = program.plan.weights[name]
            if name not in program.packed and not choice.spec.is_left_alone:
                program = program.with_packed(name, self.packed(program, name, choice))
                for names in self.seen:
                    names.append(name)
        return program

    def packed(self, program: Program, name: str, choice: Choice) -> Packed:
        data = program.read(name)
        oriented = data.mT if program.weights[name].is_transposed else data
        evidence = Evidence.of(program, name, choice.spec)
        _, quantizer = choose_quantizer(choice.quantizer, evidence)
        made = quantizer.quantize(oriented, choice.spec, evidence)
        return replace(made, scales=made.scales * self.factor)


def module():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 50), nn.ReLU(), nn.Linear(50, 30), nn.Linear(30, 11))
    return model.requires_grad_(False)


PLAN = {"weights": {"2.weight": "int5:32", "3.weight": "fp16", "*": "nf4:64"}}


def assert_scaled(state, plain, factor):
    for name in ("0.weight", "2.weight"):
        packed, usual = state[name].packed, plain[name].packed
        assert torch.equal(packed.scales, usual.scales * factor)
        assert torch.equal(packed.planes, usual.planes)
    assert torch.equal(state["3.weight"].half(), plain["3.weight"])  # a module keeps its own dtype


def test_the_artifact_holds_what_the_pass_packed_and_the_module_too(tmp_path):
    names: list[str] = []
    passes = ["canonicalize", "apply_plan", PackInOrder(seen=(names,))]
    model = module()
    compile_to(model, tmp_path / "plain", Request(plan=PLAN), example_inputs=(X,))
    compile_to(model, tmp_path / "out", Request(plan=PLAN, passes=passes), example_inputs=(X,))
    assert names == ["0.weight", "2.weight"]
    artifact, plain = Artifact.open(tmp_path / "out"), Artifact.open(tmp_path / "plain")
    assert_scaled(artifact.state(), plain.state(), 1.25)
    # The error that the plan tells is that of what is stored.
    for name in names:
        assert artifact.plan.weights[name].choice.error > plain.plan.weights[name].choice.error + 0.1
    compiled = kbitc.compile(model, plan=PLAN, passes=passes, example_inputs=(X,))
    assert_scaled(
        dict(compiled.named_parameters()),
        plain.state(),
        1.25,
    )


def test_transposed_and_tied_weights_and_experts_are_packed_once(tiny_model, tmp_path):
    for family, count in (("gpt2", 10), ("mixtral", 16)):
        names: list[str] = []
        passes = ["canonicalize", "apply_plan", PackInOrder(seen=(names,))]
        for out, chosen in (("plain", None), ("out", passes)):
            request = Request(spec="int6:16+zp", passes=chosen)
            compile_to(tiny_model(family), tmp_path / family / out, request)
        assert len(names) == len(set(names)) == count
        state, plain = (Artifact.open(tmp_path / family / out).state() for out in ("out", "plain"))
        for name in names:
            assert torch.equal(state[name].packed.scales, plain[name].packed.scales * 1.25)


def test_a_resumed_run_does_not_mix_two_packings(tmp_path):
    def request(factor):
        return Request(plan=PLAN, passes=["canonicalize", "apply_plan", PackInOrder(factor)])

    def stop(name, done, total):
        if name.startswith("packing ") and 0 < done < total:
            raise KeyboardInterrupt

    options = {"example_inputs": (X,)}
    with pytest.raises(KeyboardInterrupt):
        compile_to(module(), tmp_path / "out", request(1.25), on_progress=stop, **options)
    with pytest.raises(UsageError, match="begun with another source, plan"):
        compile_to(module(), tmp_path / "out", request(1.5), is_resumed=True, **options)
    compile_to(module(), tmp_path / "out", request(1.25), is_resumed=True, **options)
    compile_to(module(), tmp_path / "again", request(1.25), **options)
    first, second = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "again"))
    assert first == second


@dataclass(frozen=True)
class ChangePacked:
    """``change(program)`` after the packing."""

    change: object

    needs: ClassVar[Stage] = Stage.PLANNED
    gives: ClassVar[Stage] = Stage.PLANNED

    def run(self, program):
        return self.change(program)


def _other_plan(program):
    choice = Choice(parse("nf4:32"), "later")
    return replace(program, plan=Plan({**program.plan.weights, "0.weight": choice}))


def _repacked(**changes):
    return lambda p: p.with_packed("0.weight", replace(p.packed["0.weight"], **changes))


FAULTS = {
    "other spec": (_other_plan, "left '0.weight' packed as nf4:64, where the plan says nf4:32"),
    "no weight": (
        lambda p: p.with_packed("0.bias", p.packed["0.weight"]),
        "packed '0.bias', which is no weight of the model",
    ),
    "shape": (
        _repacked(in_features=65),
        r"packed '0.weight' as \(50, 65\), which is \(50, 70\)",
    ),
    "outdated": (
        lambda p: p.with_changes({"0.weight": lambda tensor, read: tensor * 2}),
        "changed '0.weight' after it was packed",
    ),
    "codebook": (
        _repacked(codebook=torch.linspace(-1, 1, 16)),
        "packed '0.weight' with a codebook of its own, which nf4:64 shares",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_packing_that_could_not_be_stored_is_found_right_after_the_pass(name):
    change, message = FAULTS[name]
    model = module()
    program = capture(model, (X,), context=Context(model.state_dict().__getitem__))
    passes = ["canonicalize", ApplyPlan(PLAN), PackInOrder(), ChangePacked(change)]
    with pytest.raises(PassError, match=f"'change_packed', after the passes .*{message}"):
        PassManager(passes).run(program)


def test_nothing_is_packed_before_it_is_planned():
    @dataclass(frozen=True)
    class PackEarly:
        needs: ClassVar[Stage] = Stage.CANONICAL
        gives: ClassVar[Stage] = Stage.CANONICAL

        def run(self, program):
            return program.with_packed("0.weight", kbitc.quantize(program.read("0.weight"), "nf4:64").packed)

    model = module()
    program = capture(model, (X,), context=Context(model.state_dict().__getitem__))
    with pytest.raises(PassError, match="packed '0.weight', which has no spec yet"):
        PassManager(["canonicalize", PackEarly()]).run(program)


def test_what_is_packed_and_changed_by_one_pass_stays():
    def change_and_pack(program):
        changed = program.with_changes({"0.weight": lambda tensor, read: tensor * 2})
        return changed.with_packed(
            "0.weight", PackInOrder().packed(changed, "0.weight", changed.plan.weights["0.weight"])
        )

    model = module()
    program = capture(model, (X,), context=Context(model.state_dict().__getitem__))
    passes = ["canonicalize", ApplyPlan(PLAN), PackInOrder(), ChangePacked(change_and_pack)]
    packed = PassManager(passes).run(program).packed
    assert list(packed) == ["0.weight", "2.weight"]
