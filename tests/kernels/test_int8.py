"""kbit::linear_int8 against its definition in float64 and whole numbers, for every kernel set."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from kbitc.errors import UsageError
from kbitc.kernels import ops, reference  # noqa: F401
from kbitc.kernels.cpu.build import load
from kbitc.quantizers import quantize
from kbitc.tensor.activations import use_activations

SETS = ["reference", "portable", "avx2", "avx512"]


@pytest.fixture(params=SETS)
def multiply(request):
    """``(x, weight, bias) -> y`` of one implementation."""
    if request.param == "reference":
        yield lambda x, weight, bias=None: reference.linear_int8(x, weight.operands(), bias)
        return
    if not load():
        pytest.skip("there is no compiler here for the native kernels")
    try:
        torch.ops.kbit.use_cpu_kernels(request.param)
    except RuntimeError:
        pytest.skip(f"this machine does not run {request.param}")
    yield lambda x, weight, bias=None: torch.ops.kbit.linear_int8(x, *weight.operands(), bias)
    torch.ops.kbit.use_cpu_kernels(os.environ.get("KBITC_CPU", "auto"))


def definition(x, weight, bias=None):
    """LLM.int8() in float64, from the dequantized weight alone."""
    dense = weight.dequantize(torch.float32).double()
    index = weight.packed.outlier_index
    columns = [] if index is None else index.tolist()
    rest = x.double().clone()
    rest[..., columns] = 0.0
    absmax = rest.abs().amax(-1, keepdim=True)
    # In float32, where the kernels round: a tie must fall to the same side.
    inverse = torch.full_like(absmax, 127, dtype=torch.float32) / absmax.float()
    whole = (rest.float() * inverse).round().nan_to_num(0.0).double()
    y = whole @ dense.mT * (absmax / 127) + x.double()[..., columns] @ dense[:, columns].mT
    return y if bias is None else y + bias.double()


@given(
    rows=st.integers(1, 70),
    features=st.integers(1, 700),
    tokens=st.integers(0, 30),
    flags=st.sampled_from(["", "+dq", "+out1%", "+dq+out30%"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equals_the_definition(multiply, rows, features, tokens, flags, dtype, with_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = quantize(torch.randn(rows, features, generator=generator), f"int8:{features}{flags}")
    x = (4 * torch.randn(tokens, features, generator=generator)).to(dtype)
    bias = torch.randn(rows, generator=generator) if with_bias else None
    y = multiply(x, weight, bias)
    assert y.dtype == dtype
    expected = definition(x, weight, bias)
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(dtype, 0.0)
    size = x.double().norm(dim=-1, keepdim=True) * weight.dequantize(torch.float32).double().norm(dim=-1) + 1
    assert bool(((y.double() - expected).abs() <= 2e-6 * size + rounding * expected.abs()).all())


@pytest.mark.parametrize("tokens", [3, 21])
def test_whole_numbers_are_exact(multiply, tokens):
    """Extreme codes and values over many features: no sum saturates or is rounded."""
    generator = torch.Generator().manual_seed(0)
    features = 1000
    whole = torch.randint(0, 2, (39, features), generator=generator) * 254.0 - 127
    x = torch.randint(0, 2, (tokens, features), generator=generator) * 254.0 - 127
    weight = quantize(whole, f"int8:{features}")
    expected = (x.double() @ whole.double().mT).float()
    assert_close(multiply(x, weight), expected, rtol=1e-6, atol=0.0)


def test_outliers_do_not_coarsen_the_rest(multiply):
    torch.manual_seed(0)
    dense = torch.randn(40, 130)
    x = torch.randn(6, 130)
    x[:, [7, 99]] *= 1000
    exact = x.double() @ dense.double().mT
    plain = multiply(x, quantize(dense, "int8:130")).double()
    kept = quantize(dense, "int8:130+out1.5%", outliers=torch.tensor([7, 99]))
    rest = (x.double() @ kept.dequantize(torch.float32).double().mT - exact).norm()
    assert (plain - exact).norm() > 20 * (multiply(x, kept).double() - exact).norm()
    assert (multiply(x, kept).double() - exact).norm() < rest + 0.02 * 40


@pytest.mark.parametrize("tokens", [5, 13])
def test_zero_tiny_and_broken_rows(multiply, tokens):
    weight = quantize(torch.randn(5, 33), "int8:33")
    x = torch.randn(tokens, 33)
    x[0] = 0.0
    x[1] = 1e-42
    x[2, 4] = float("nan")
    x[3, 4] = float("inf")
    y = multiply(x, weight)
    assert bool((y[0] == 0).all())
    assert bool((y[1].abs() < 1e-35).all())
    assert bool(y[2:4].isnan().all())
    assert_close(y[4:].double(), definition(x[4:], weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", ["int8:32", "int4:64", "nf8:64", "int8:64+zp", "fp8:64"])
def test_other_formats_are_refused(multiply, spec):
    with pytest.raises(RuntimeError, match="linear_int8"):
        multiply(torch.ones(1, 64), quantize(torch.randn(3, 64), spec))


def test_gradient_is_that_of_the_dequantized_product():
    weight = quantize(torch.randn(7, 40), "int8:40+out5%")
    x = torch.randn(3, 40, requires_grad=True)
    torch.ops.kbit.linear_int8(x, *weight.operands(), None).sum().backward()
    expected = weight.dequantize(torch.float32).sum(0).expand(3, -1)
    assert_close(x.grad, expected, rtol=1e-3, atol=1e-3)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(48, 48), nn.Linear(48, 48), nn.Linear(48, 9)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.third(self.second(self.first(x).relu()))


def packed_model(spec="int8:48+out5%", last="nf4:16"):
    torch.manual_seed(0)
    model = Two()
    shared = nn.Parameter(quantize(model.first.weight.detach(), spec), requires_grad=False)
    model.first.weight = model.second.weight = shared
    model.third.weight = nn.Parameter(quantize(model.third.weight.detach(), last), requires_grad=False)
    return model.requires_grad_(False)


def test_chosen_on_a_model():
    model = packed_model()
    x = torch.randn(4, 48)
    as_floats = model(x)
    left = use_activations(model, "int8")
    assert set(left) == {"third.weight"}
    assert "nf4" in left["third.weight"]
    assert model.first.weight is model.second.weight
    as_int8 = model(x)
    assert not torch.equal(as_int8, as_floats)
    assert_close(as_int8, as_floats, rtol=0.1, atol=0.05)
    h = definition(x, model.first.weight, model.first.bias).relu().float()
    h = definition(h, model.second.weight, model.second.bias).float()
    assert_close(as_int8, model.third(h), rtol=1e-2, atol=1e-2)
    assert torch.equal(copy.deepcopy(model)(x), as_int8)
    exported = torch.export.export(model, (x,)).graph
    assert sum(node.target is torch.ops.kbit.linear_int8.default for node in exported.nodes) == 2
    use_activations(model, "float")
    assert torch.equal(model(x), as_floats)


def test_no_break_in_a_compiled_graph():
    model = packed_model()
    use_activations(model, "int8")
    x = torch.randn(4, 48)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(x), model(x))


def test_refusals():
    with pytest.raises(UsageError, match="int7"):
        use_activations(packed_model(), "int7")
    with pytest.raises(UsageError, match="one scale a row"):
        use_activations(packed_model(spec="int8:16"), "int8")
