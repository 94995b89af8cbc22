"""The reference kernels against dense arithmetic, and what every kernel of a ``kbit::`` op must do.

Where the native kernels load, the ops run those (test_cpu.py); the ops on reference kernels are run in a
process of their own, with ``KBITC_CPU=off`` (test_build.py).
"""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from kbitc.kernels import reference
from kbitc.quantizers import quantize

ops = torch.ops.kbit
SPECS = ["nf4:64", "int3:16+zp", "fp5:32+dq", "bof2:50+zp+dq", "int8:7", "nf3:64+out3%+dq"]


@pytest.fixture(params=SPECS)
def weight(request):
    return quantize(torch.randn(37, 101, generator=torch.Generator().manual_seed(0)), request.param)


@pytest.fixture(params=SPECS)
def experts(request):
    return quantize(torch.randn(5, 13, 41, generator=torch.Generator().manual_seed(1)), request.param)


OFFSETS = torch.tensor([2, 2, 5, 6, 9], dtype=torch.int32)
EXPERT_OF = [0, 0, 2, 2, 2, 3, 4, 4, 4]


@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_linear_equals_dense(weight, lead, dtype):
    x = torch.randn(*lead, 101, dtype=dtype)
    bias = torch.randn(37)
    got = reference.linear(x, weight.operands(), bias)
    assert got.dtype == dtype
    wanted = x.double() @ weight.dequantize(torch.float64).T + bias.double()
    # Rounding of the weights to x's dtype and accumulation over 101 products.
    tolerance = 40 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-5
    assert (got.double() - wanted).norm() <= tolerance * wanted.norm()


def test_tiles_do_not_change_the_result(weight, monkeypatch):
    x = torch.randn(3, 101)
    whole = reference.linear(x, weight.operands(), None)
    monkeypatch.setattr(reference, "TILE", 300)
    assert torch.allclose(reference.linear(x, weight.operands(), None), whole, atol=1e-5)


def test_embedding_equals_dense(weight):
    ids = torch.tensor([[0, 36, 5], [5, 5, 1]])
    got = reference.embedding(ids, weight.operands(), torch.float32)
    assert torch.equal(got, reference.dequantize(weight.operands(), torch.float32)[ids])
    none = torch.empty(0, dtype=torch.long)
    assert reference.embedding(none, weight.operands(), torch.float16).shape == (0, 101)


@pytest.mark.parametrize("bad", [-1, 37])
def test_embedding_checks_ids(weight, bad):
    with pytest.raises(IndexError, match="outside 0"):
        reference.embedding(torch.tensor([bad]), weight.operands(), torch.float32)


def test_grouped_linear_equals_dense(experts):
    x = torch.randn(9, 41)
    dense = experts.dequantize()
    wanted = torch.stack([x[i] @ dense[e].T for i, e in enumerate(EXPERT_OF)])
    assert torch.allclose(reference.grouped_linear(x, experts.operands(), OFFSETS), wanted, atol=1e-4)


def test_select_picks_experts(experts):
    picked = experts[torch.tensor([4, 0, 4])]
    # Double-quantized scales become float32: the native kernels may round them in another order.
    torch.testing.assert_close(picked.dequantize(), experts.dequantize()[[4, 0, 4]], rtol=1e-6, atol=1e-6)


def test_gradients_with_respect_to_the_input(weight, experts):
    x = torch.randn(4, 101, requires_grad=True)
    bias = torch.randn(37, requires_grad=True)
    grad = torch.randn(4, 37)
    ops.linear(x, *weight.operands(), bias).backward(grad)
    assert torch.allclose(x.grad, grad @ weight.dequantize(), atol=1e-4)
    assert torch.allclose(bias.grad, grad.sum(0), atol=1e-5)
    tokens = torch.randn(9, 41, requires_grad=True)
    grad = torch.randn(9, 13)
    ops.grouped_linear(tokens, *experts.operands(), OFFSETS).backward(grad)
    dense = experts.dequantize()
    assert torch.allclose(
        tokens.grad, torch.stack([grad[i] @ dense[e] for i, e in enumerate(EXPERT_OF)]), atol=1e-4
    )


def test_opcheck_select(experts):
    opcheck(ops.select.default, (torch.tensor([1, 2]), *experts.operands()))


def test_wrong_inputs_are_errors(weight):
    with pytest.raises(RuntimeError, match="last dimension is 101"):
        ops.linear(torch.randn(2, 100), *weight.operands(), None)
    with pytest.raises(RuntimeError, match="expected a float input"):
        ops.linear(torch.ones(2, 101, dtype=torch.long), *weight.operands(), None)


def test_a_sparse_input_is_taken_as_dense():
    weight = quantize(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), "nf4:64")
    x = torch.eye(64)[:3]
    for sparse in (x.to_sparse(), x.to_sparse_csr()):
        assert torch.equal(torch.nn.functional.linear(sparse, weight), torch.nn.functional.linear(x, weight))
