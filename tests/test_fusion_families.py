"""Every rewrite on every family: the same numbers, and an answer for every candidate.

Numbers are those of the plain kernels in float32; what a native kernel does to them is tested there.
"""

from __future__ import annotations

import pytest
import torch
from torch import fx

from kbitc.formats.layout import operand_slots
from kbitc.formats.packed import Operands
from kbitc.graph.capture import capture
from kbitc.graph.context import Context
from kbitc.graph.example_inputs import example_inputs
from kbitc.graph.program import CANONICAL
from kbitc.graph.weight_reads import is_move, op_name
from kbitc.kernels import ops, reference
from kbitc.passes.apply_plan import ApplyPlan
from kbitc.passes.fold_norms import FoldNorms
from kbitc.pipeline.defaults import LOWERING
from kbitc.pipeline.manager import PassManager
from kbitc.pipeline.records import records
from kbitc.quantizers import quantize_weight

kbit = torch.ops.kbit
FAMILIES = ["gpt2", "opt", "bloom", "gpt_neox", "llama", "mixtral", "roberta", "bart", "t5", "clip"]
# Shared and fitted codebooks, zero points, blocks that divide nothing; the second weight is left alone.
SPECS = ("nf4:32", "int3:32+zp", "learned4:50", "bof4:32+dq", "dynamic8:64+dq", "nf4:64+out5%")
# family: times that fold_norms and merge_linears fire on two layers
FIRES = {
    "gpt2": (4, 0),  # its queries, keys and values are one weight already; the head is tied
    "opt": (4, 2),
    "bloom": (4, 0),
    "gpt_neox": (4, 0),  # the head has no bias to take that of the last norm
    "llama": (5, 4),  # queries, keys and values; gate and up; norms before both, and before the head
    "mixtral": (5, 2),
    "roberta": (1, 2),  # norms come after the residual addition, but for one
    "bart": (0, 5),  # so do these; the decoder's keys and values of the encoder are one group
    "t5": (10, 9),
    "clip": (8, 4),
}


def _linear(x, *rest):
    return reference.linear(x, *Operands.split(rest))


def _linears(x, weights, numbers, biases):
    each = ops.split_weights(weights, numbers)
    return torch.cat([reference.linear(x, o, bias) for o, bias in zip(each, biases, strict=True)], dim=-1)


PLAIN = {
    kbit.linear.default: _linear,
    kbit.linears.default: _linears,
    kbit.embedding.default: lambda ids, *rest: reference.embedding(ids, *Operands.split(rest)),
    kbit.grouped_linear.default: lambda x, *rest: reference.grouped_linear(x, *Operands.split(rest)),
    kbit.dequantize.default: lambda *rest: reference.dequantize(*Operands.split(rest)),
}


class Plain(fx.Interpreter):
    """Runs a program with plain kernels."""

    def call_function(self, target, args, kwargs):
        return super().call_function(PLAIN.get(target, target), args, kwargs)


def run(program, state, inputs):
    given = iter(inputs)
    lifted = program.parameters
    names = [node.name for node in program.graph.graph.nodes if node.op == "placeholder"]
    values = [state[lifted[name]] if name in lifted else next(given) for name in names]
    with torch.no_grad():
        out = Plain(program.graph).run(*values)
    return [value.double() for value in torch.utils._pytree.tree_leaves(out) if value.is_floating_point()]


def error(got, wanted):
    """The largest relative error of the outputs, each in the norm."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True))


def packed_state(program, state):
    """What the artifact of a planned program stores, and the same with every weight dequantized."""
    packed, dense = dict(state), dict(state)
    for name, weight in program.weights.items():
        spec = program.plan.weights[name].spec
        if spec.is_left_alone:
            continue
        found = quantize_weight(weight.oriented(state[name]), spec)
        read = reference.dequantize(found.operands(), torch.float32)
        dense[name] = (read.mT if weight.is_transposed else read).reshape(weight.shape)
        slots = operand_slots(name, spec, weight.oriented_shape[:-1], weight.in_features)
        assert slots.keys() == found.tensors().keys()
        for field, (stored, slot) in slots.items():
            tensor = getattr(found, field)
            assert (tensor.dtype, tuple(tensor.shape)) == (slot.dtype, slot.shape)
            packed[stored] = tensor
    return packed, dense


@pytest.fixture(scope="module", params=FAMILIES)
def steps(request, tiny_model):
    """``(family, [(pass, program after it)], outputs by pass)`` from the canonical program on."""
    model = tiny_model(request.param)
    state = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    state = {name: tensor.detach() for name, tensor in state.items()}
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(value.shape, generator=generator)
        if value.is_floating_point()
        else torch.randint(2, 20, value.shape, generator=generator)
        for value in example_inputs(model).values()
        if isinstance(value, torch.Tensor)
    ]
    program = PassManager(["canonicalize"]).run(capture(model, context=Context(state.__getitem__)))
    found = [("canonicalize", program, run(program, state, inputs))]
    program = PassManager([FoldNorms()], is_checked=True).run(program)
    state = {name: program.as_stored(state.__getitem__)(name) for name in state}
    found.append(("fold_norms", program, run(program, state, inputs)))
    rules = {name: SPECS[i % len(SPECS)] if i != 1 else "fp16" for i, name in enumerate(program.weights)}
    program = PassManager([ApplyPlan({"weights": rules})]).run(program)
    packed, dense = packed_state(program, state)
    found.append(("apply_plan", program, run(program, dense, inputs)))
    for name in ("insert_dequantize", *LOWERING):
        program = PassManager([name], is_checked=True).run(program)
        found.append((name, program, run(program, packed, inputs)))
    return request.param, found


def test_no_rewrite_changes_the_numbers(steps):
    _, found = steps
    for (_, _, before), (name, _, after) in zip(found, found[1:], strict=False):
        if name == "apply_plan":
            assert error(after, before) > 1e-3  # formats do: the comparison can fail
        else:
            assert error(after, before) <= 1e-5, name


def test_how_often_each_pass_fires(steps):
    family, found = steps
    record = records(found[-1][1])
    assert set(record) == {"fold_norms", *LOWERING}
    passes = ("fold_norms", "merge_linears")
    assert tuple(len(record[name].groups) for name in passes) == FIRES[family]
    end = found[-1][1]
    uses = [
        use.node
        for name, weight in end.weights.items()
        for use in weight.uses
        if not end.plan.weights[name].spec.is_left_alone
    ]
    assert {call for _, call in record["fuse_dequantize"].groups} == set(uses)
    assert record["fuse_dequantize"].left == {}


def test_every_candidate_fired_or_has_a_reason(steps):
    """Candidates are counted here by rules of this test's own."""
    _, found = steps
    programs = {name: program for name, program, _ in found}
    record = records(programs["remove_dead_code"])
    answered = {name: {n for g in r.groups for n in g} | set(r.left) for name, r in record.items()}
    assert all(len(reason) > 10 for r in record.values() for reason in r.left.values())

    def nodes(after, *targets):
        return [node for node in programs[after].graph.graph.nodes if node.target in targets]

    scales = {
        name
        for name, rest in programs["canonicalize"].rest.items()
        if len(rest.shape) == 1 and rest.is_parameter and ("norm" in name.lower() or "ln_" in name)
        if name.endswith("weight")
    }
    assert scales <= answered["fold_norms"]
    assert {n.name for n in nodes("insert_dequantize", kbit.dequantize.default)} <= answered[
        "fuse_dequantize"
    ]
    linears = nodes("fuse_epilogues", kbit.linear.default, kbit.grouped_linear.default)
    assert {n.name for n in linears} <= answered["merge_linears"]
    before = nodes("fuse_dequantize", kbit.linear.default, kbit.grouped_linear.default)
    after = {reader for linear in before for reader in readers(linear)}
    pointwise = ("add", "mul", "relu", "gelu", "silu", "tanh", "sigmoid", "pow", "sub", "div")
    epilogues = {n.name for n in after if op_name(n) in [f"aten.{name}" for name in pointwise]}
    assert epilogues <= answered["fuse_epilogues"]
    # Nothing is left that could have fired: no dequantization, no dense form of a packed weight, and no
    # two packed linears of one input.
    end = programs["remove_dead_code"]
    assert not nodes("remove_dead_code", kbit.dequantize.default)
    left_alone = {n for n, choice in end.plan.weights.items() if choice.spec.is_left_alone}
    for node in nodes("remove_dead_code", *CANONICAL):
        assert end.parameters[node.args[1].name] in left_alone
    inputs = [node.args[0] for node in nodes("remove_dead_code", kbit.linear.default, kbit.linears.default)]
    assert len(set(inputs)) == len(inputs)
    unread = {n.name for n in end.graph.graph.nodes if not n.users and n.op != "output"}
    assert unread == set(record["remove_dead_code"].left)


def readers(node):
    for user in node.users:
        if is_move(user):
            yield from readers(user)
        else:
            yield user
