"""Without kernels a packed weight computes what the dense model computes, to the bit: the same calls, laid out alike."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kbitc.formats.packed import Operands
from kbitc.kernels import reference
from kbitc.kernels.cpu import build
from kbitc.quantizers import quantize
from kbitc.tensor import KbitTensor
from tests.tensor.test_reads import CALLS

X, EXPERTS = torch.randn(37, 96), torch.randn(4, 96, 80)
OFFSETS = torch.tensor([9, 9, 30, 37], dtype=torch.int32)
BATCH = torch.randn(4, 13, 96)


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch):
    """As with KBITC_CPU=off, which is read once: another test of this process may have loaded the kernels."""
    monkeypatch.setattr(build, "load", lambda: False)
    monkeypatch.setattr(
        torch.ops.kbit, "dequantize", lambda *given: reference.dequantize(*Operands.split(given))
    )
    for name in ("linear", "grouped_linear"):
        plain = getattr(reference, name)
        monkeypatch.setattr(torch.ops.kbit, name, lambda x, *rest, call=plain: call(x, *Operands.split(rest)))


def dense_module(module):
    """The same with its packed weights dequantized, contiguous as a checkpoint has them."""
    dense = copy.deepcopy(module)
    for part in dense.modules():
        for name, weight in part._parameters.items():
            if isinstance(weight, KbitTensor):
                part._parameters[name] = nn.Parameter(weight.dequantize().contiguous(), requires_grad=False)
    return dense


def packed(data, *, is_transposed=False):
    weight = quantize(data, "nf4:16", is_transposed=is_transposed)
    return nn.Parameter(weight, requires_grad=False)


# Each in a model's own words; the parameter is stored as (..., in, out) where the name says "transposed".
TRANSPOSED = {
    "addmm": lambda w: torch.addmm(torch.ones(80), X, w[0]),
    "matmul": lambda w: X @ w[1],
    "matmul of a vector": lambda w: X[0] @ w[1],
    "matmul of a batch": lambda w: BATCH @ w[1],
    "matmul of the transpose": lambda w: X[:5, :80] @ w[1].T,
    "matmul from the left": lambda w: w[1] @ X[:5, :80].T,
    "matmul of the transpose from the left": lambda w: w[1].T @ X.T,
    "linear of the transpose": lambda w: F.linear(X, w[1].T, torch.ones(80)),
    "grouped_mm": lambda w: F.grouped_mm(X, w, offs=OFFSETS),
    "bmm": lambda w: torch.bmm(BATCH, w),
    "einsum": lambda w: torch.einsum("bi,io->bo", X, w[2]),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_what_is_stored_transposed(name):
    weight = packed(EXPERTS, is_transposed=True)
    dense = weight.dequantize().contiguous()
    assert torch.equal(TRANSPOSED[name](weight), TRANSPOSED[name](dense))


@pytest.mark.parametrize("name", ["grouped_mm", "bmm"])
def test_experts_as_they_are_packed(name):
    weight = packed(EXPERTS.mT.contiguous())
    call = TRANSPOSED[name]
    assert torch.equal(call(weight.transpose(-2, -1)), call(weight.dequantize().transpose(-2, -1)))


@pytest.mark.parametrize("name", CALLS)
def test_views(name):
    weight = quantize(torch.randn(24, 40), "nf4:16+dq")
    with torch.no_grad():
        assert torch.equal(CALLS[name](weight), CALLS[name](weight.dequantize()))


LAYERS = {
    "a patch convolution": (lambda: nn.Conv2d(3, 64, 8, stride=8), lambda: (torch.randn(2, 3, 40, 40),)),
    "a pointwise one": (lambda: nn.Conv1d(48, 64, 1), lambda: (torch.randn(2, 48, 33),)),
    "an lstm": (lambda: nn.LSTM(48, 32, batch_first=True), lambda: (torch.randn(2, 9, 48),)),
    "a cell": (lambda: nn.GRUCell(48, 32), lambda: (torch.randn(5, 48),)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    make, inputs = LAYERS[name]
    module, given = make().eval(), inputs()
    for leaf, weight in module._parameters.items():
        if leaf.startswith("weight"):
            rows = quantize(weight.detach().flatten(1), "nf4:16")
            module._parameters[leaf] = nn.Parameter(
                rows if weight.dim() == 2 else rows.view(weight.shape), requires_grad=False
            )
    with torch.no_grad():
        ours, theirs = module(*given), dense_module(module)(*given)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_gradients_pass():
    weight = packed(EXPERTS, is_transposed=True)
    x = X.clone().requires_grad_()
    for value in (weight, weight.dequantize()):
        (grad,) = torch.autograd.grad(F.grouped_mm(x, value, offs=OFFSETS).square().sum(), x)
        x.grad = grad if x.grad is None else x.grad - grad
    assert x.grad is not None
    assert x.grad.abs().max() < 1e-2
