"""Merging: same numbers, fewer calls, and a reason for every call that stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kbitc
from kbitc.formats.packed import TENSOR_FIELDS
from kbitc.graph.program import Program, Stage
from kbitc.passes.merge_linears import FACT, MergeLinears
from kbitc.pipeline.manager import PassManager
from kbitc.pipeline.registry import load_pass
from kbitc.quantizers import quantize

linear = torch.ops.kbit.linear.default
linears = torch.ops.kbit.linears.default


def packed(spec, rows, features, seed):
    generator = torch.Generator().manual_seed(seed)
    return quantize(torch.randn(rows, features, generator=generator), spec).packed


class Block(nn.Module):
    """Weights as plain buffers; calls as a subclass says."""

    specs = ("nf4:64", "int3:32+zp", "fp16-bias")

    def __init__(self):
        super().__init__()
        self.weights = []
        for i, (spec, rows) in enumerate((("nf4:64", 24), ("int3:32+zp", 7), ("int8:64+dq", 9))):
            weight = packed(spec, rows, 70, i)
            for name, value in weight.tensors().items():
                self.register_buffer(f"w{i}_{name}", value)
            self.weights.append(weight)
        self.register_buffer("bias", torch.arange(7.0))

    def operands(self, i):
        names = self.weights[i].tensors()
        values = [getattr(self, f"w{i}_{n}") if n in names else None for n in TENSOR_FIELDS]
        return (*values, *self.weights[i].operands().numbers)


def program_of(module, *inputs):
    with torch.no_grad():
        exported = torch.export.export(module, inputs, strict=False)
    graph = exported.module(check_guards=False)
    return Program(graph, {}, stage=Stage.PACKED), graph(*inputs)


def run(module, *inputs):
    program, wanted = program_of(module, *inputs)
    after = PassManager([MergeLinears()], is_checked=True).run(program)
    return after, after.graph(*inputs), wanted


def count(program, target):
    return sum(node.target is target for node in program.graph.graph.nodes)


@pytest.mark.parametrize("shape", [(1, 1, 70), (2, 5, 70), (3, 70)])
def test_mixed_formats_and_biases_give_the_same_numbers(shape):
    class Three(Block):
        def forward(self, x):
            q = linear(x, *self.operands(0))
            k = linear(x, *self.operands(1), self.bias)
            v = linear(x, *self.operands(2), None)
            return q.view(*q.shape[:-1], 4, 6), k, v.view(-1)

    after, got, wanted = run(Three(), torch.randn(shape))
    assert count(after, linears) == 1
    assert count(after, linear) == 0
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b)
    (group,) = after.facts[FACT].groups
    assert len(group) == 3
    assert after.facts[FACT].left == {}


def test_lone_calls_stay_with_a_reason():
    class Chain(Block):
        def forward(self, x):
            return linear(x, *self.operands(0)), linear(x + 1, *self.operands(1))

    after, got, wanted = run(Chain(), torch.randn(2, 70))
    assert count(after, linear) == 2
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert set(after.facts[FACT].left.values()) == {
        "no other packed linear reads its input, or none that could be merged"
    }


def test_an_operand_that_comes_later():
    class Late(Block):
        def forward(self, x):
            first = linear(x, *self.operands(0))
            return linear(x, *self.operands(1), first[0, :7].clone())

    after, got, wanted = run(Late(), torch.randn(2, 70))
    assert count(after, linears) == 0
    assert torch.equal(got, wanted)
    assert any("is computed after" in reason for reason in after.facts[FACT].left.values())


def test_an_input_that_changes_in_between():
    class Changed(Block):
        def forward(self, x):
            y = x * 2
            first = linear(y, *self.operands(0))
            y.view(-1).add_(1)
            return first, linear(y, *self.operands(1))

    after, got, wanted = run(Changed(), torch.randn(2, 70))
    assert count(after, linears) == 0
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert any("changes the input in place" in reason for reason in after.facts[FACT].left.values())


def test_a_limit_of_weights_in_one_call():
    class Three(Block):
        def forward(self, x):
            return tuple(linear(x, *self.operands(i)) for i in range(3))

    program, wanted = program_of(Three(), torch.ones(70))
    after = MergeLinears(most=2).run(program)
    assert count(after, linears) == count(after, linear) == 1
    assert all(torch.equal(a, b) for a, b in zip(after.graph(torch.ones(70)), wanted, strict=True))


def test_a_whole_model(tiny_model):
    model = kbitc.compile(tiny_model("llama"), spec="nf4:32")
    ids = torch.arange(6).view(2, 3)
    with torch.no_grad():
        exported = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
        wanted = model(input_ids=ids, use_cache=False).logits
        program = Program(exported.module(check_guards=False), {}, stage=Stage.PACKED)
        before = count(program, linear)
        after = load_pass("merge_linears")().run(program)
        got = after.graph(input_ids=ids, use_cache=False).logits
    assert torch.equal(got, wanted)
    assert count(after, linears) == 4  # two layers: queries, keys and values; gate and up
    assert count(after, linear) == before - 2 * 5
