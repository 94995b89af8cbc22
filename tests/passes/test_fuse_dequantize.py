"""Dequantize-then-multiply in the forms that people write: one packed call, or the reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kbitc.graph.program import Program, Stage
from kbitc.passes.fuse_dequantize import FACT, TURNED
from kbitc.pipeline.manager import PassManager
from kbitc.quantizers import quantize

kbit = torch.ops.kbit


class Reader(nn.Module):
    """Reads a packed weight of (rows, in) = (11, 35), or three experts of it, as a function says."""

    def __init__(self, read, shape=(11, 35), dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        packed = quantize(torch.randn(shape, generator=generator), "int3:32+zp").packed
        self.numbers, self.names = packed.operands().numbers, []
        for i, tensor in enumerate(packed.operands().tensors):
            self.names.append(None if tensor is None else f"part{i}")
            if tensor is not None:
                self.register_buffer(f"part{i}", tensor)
        self.read, self.dtype = read, dtype

    def forward(self, *inputs):
        tensors = (None if name is None else getattr(self, name) for name in self.names)
        return self.read(kbit.dequantize(*tensors, *self.numbers, self.dtype), *inputs)


def fuse(module, *inputs):
    with torch.no_grad():
        exported = torch.export.export(module, inputs, strict=False)
        graph = exported.module(check_guards=False)
        passes = ["fuse_dequantize", "remove_dead_code"]
        after = PassManager(passes, is_checked=True).run(Program(graph, {}, stage=Stage.PACKED))
        # Float64 inputs: no native kernel rounds them.
        torch.testing.assert_close(after.graph(*inputs), graph(*inputs), rtol=1e-9, atol=1e-9)
    return after, [node.target for node in after.graph.graph.nodes if "kbit" in str(node.target)]


X = torch.linspace(-1, 1, 3 * 35, dtype=torch.float64).view(3, 35)
BIAS = torch.linspace(-1, 1, 11, dtype=torch.float64)
LINEARS = {
    "linear": lambda w, x: F.linear(x, w),
    "linear with a bias": lambda w, x: F.linear(x, w, BIAS),
    "mm": lambda w, x: torch.mm(x, w.t()),
    "matmul": lambda w, x: x.view(1, 3, 35) @ w.mT,
    "matmul of a vector": lambda w, x: x[0] @ w.T,
    "the weight on the left": lambda w, x: w @ x.mT,
    "addmm": lambda w, x: torch.addmm(BIAS, x, w.transpose(0, 1)),
    "addmm of a matrix": lambda w, x: torch.addmm(x[:, :11], x, w.transpose(0, 1)),
    "einsum": lambda w, x: torch.einsum("ti,oi->to", x, w),
    "views": lambda w, x: x @ w.view(11, 35).detach().permute(1, 0).contiguous(),
}


@pytest.mark.parametrize("form", LINEARS)
def test_linear_in_every_form(form):
    after, calls = fuse(Reader(LINEARS[form]), X)
    assert calls == [kbit.linear.default]
    assert len(after.facts[FACT].groups) == 1
    assert after.facts[FACT].left == {}


def test_embedding():
    _, calls = fuse(Reader(lambda w, ids: F.embedding(ids, w)), torch.tensor([[3, 0], [10, 7]]))
    assert calls == [kbit.embedding.default]


def test_experts():
    # Three experts, two tokens each.
    _, calls = fuse(Reader(lambda w, x: torch.bmm(x, w.mT), shape=(3, 11, 35)), X.repeat(2, 1).view(3, 2, 35))
    assert calls == [kbit.grouped_linear.default]


def test_two_readers_of_one_dequantization():
    after, calls = fuse(Reader(lambda w, x: (F.linear(x, w), w.sum())), X)
    assert set(calls) == {kbit.linear.default, kbit.dequantize.default}
    assert len(after.facts[FACT].groups) == 1
    assert list(after.facts[FACT].left.values()) == ["read by aten.sum"]


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda w, x: x[:, :11] @ w, TURNED),
        (lambda w, x: F.linear(x.float(), w.float()), "cast to float32 before aten.linear"),
        (lambda w, x: F.linear(w, x), "the input of aten.linear"),
        (lambda w, x: F.linear(x, w[:7]), "read by aten.linear through aten.slice"),
        (lambda w, x: torch.addmm(BIAS, x, w.mT, alpha=2), "aten.addmm with alpha 2 and beta 1"),
        (lambda w, x: w @ w.mT + x.sum(), "aten.matmul reads it twice"),
    ],
)
def test_what_cannot_be_fused_stays_with_a_reason(read, reason):
    after, calls = fuse(Reader(read), X)
    assert calls == [kbit.dequantize.default]
    assert reason in next(iter(after.facts[FACT].left.values()))
    assert after.facts[FACT].groups == ()
