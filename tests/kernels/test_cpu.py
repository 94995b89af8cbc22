"""The native CPU kernels against float64, for every kernel set that this machine runs."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from kbitc.formats import bit_planes
from kbitc.formats.dequantize import dequantize_operands
from kbitc.kernels import ops, reference  # noqa: F401
from kbitc.kernels.cpu.build import find_compiler
from kbitc.quantizers import quantize
from kbitc.tensor.kbit_tensor import KbitTensor

try:
    find_compiler()
except Exception as error:  # noqa: BLE001
    pytest.skip(f"the native kernels cannot be built: {error}", allow_module_level=True)

TYPES = ["int", "fp", "nf", "dynamic", "quantile", "bof"]
BOUND = 5e-4  # relative to |x| |row of W|, per output: what 14-bit integers of both may cost


def packed(rows, features, spec, seed=0, experts=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, features) if experts is None else (experts, rows, features)
    return quantize(torch.randn(shape, generator=generator).to(dtype), spec)


def truth(weight: KbitTensor) -> torch.Tensor:
    return dequantize_operands(weight.operands(), torch.float32).double()


def assert_product(y, x, dense, bias=None, bound=BOUND):
    expected = x.double() @ dense.mT
    scale = x.double().norm(dim=-1, keepdim=True) * dense.norm(dim=-1)
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(y.dtype, 0.0)
    if bias is not None:
        expected = expected + bias.double()
    error = (y.double() - expected).abs()
    allowed = bound * scale + rounding * expected.abs() + 1e-30
    assert bool((error <= allowed).all()), float((error / allowed).max())


def linear(x, weight, bias=None):
    return torch.ops.kbit.linear(x, *weight.operands(), bias)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("family", TYPES)
@pytest.mark.parametrize("block", [64, 32])
def test_linear_every_type(kernel_set, family, bits, block):
    try:
        weight = packed(11, 584, f"{family}{bits}:{block}")
    except Exception as error:  # noqa: BLE001
        pytest.skip(str(error))
    dense = truth(weight)
    for rows in (1, 2, 5, 33):
        x = torch.randn(rows, 584)
        assert_product(linear(x, weight), x, dense)


@pytest.mark.parametrize("block", [64, 32, 128])
@pytest.mark.parametrize(
    "codebook",
    [
        pytest.param([-1.0, 0.0, 0.436, 1.0], id="nearly even steps"),
        pytest.param([-0.452, -0.1225, 0.0, 0.451], id="far from even steps"),
        pytest.param([0.3, -0.7, 1.0, 0.1], id="unsorted, no zero"),
        pytest.param([-1.0, 0.31, 1.0], id="three levels"),
        pytest.param([0.5, 0.5, 0.5, 0.5], id="all alike"),
        pytest.param([0.0, 0.0, 0.0, 0.0], id="nothing but zeros"),
    ],
)
def test_two_bits_any_codebook(kernel_set, codebook, block):
    """Kernels that read four levels as bytes where these are close enough, against the levels themselves."""
    generator = torch.Generator().manual_seed(7)
    weight = packed(37, 712, f"quantile2:{block}+zp" if block == 128 else f"quantile2:{block}").packed
    codes = torch.randint(len(codebook), (37, 712), generator=generator, dtype=torch.uint8)
    zeros = 5 if 0.0 in codebook else 0
    codes[:zeros] = codebook.index(0.0) if zeros else 0
    weight = KbitTensor(
        replace(weight, planes=bit_planes.pack(codes, 2), codebook=torch.tensor(codebook)), torch.float32
    )
    dense = truth(weight)
    for rows in (1, 3):
        x = torch.randn(rows, 712, generator=generator) + 1.0  # a mean lets errors of levels add up
        y = linear(x, weight)
        assert_product(y[:, zeros:], x, dense[zeros:])
        if block != 128:  # without zero points: nothing but what float32 rounds where sums cancel
            assert y[:, :zeros].abs().sum() <= 5 * 1e-6 * x.abs().sum() * weight.packed.scales.max()


@pytest.mark.parametrize("flags", ["+zp", "+dq", "+zp+dq", "+out2%", "+zp+dq+out2%"])
@pytest.mark.parametrize("datatype", ["nf4", "int4", "int8", "nf3", "fp6"])
@pytest.mark.parametrize("block", [64, 32, 256, 48])
def test_linear_every_flag(kernel_set, datatype, flags, block):
    weight = packed(37, 776, f"{datatype}:{block}{flags}")
    dense = truth(weight)
    bias = torch.randn(37)
    for rows in (1, 3, 18):
        x = torch.randn(rows, 776)
        assert_product(linear(x, weight, bias), x, dense, bias)


shapes = st.tuples(st.integers(1, 70), st.integers(1, 1100))


@given(
    shape=shapes,
    bits=st.integers(2, 8),
    family=st.sampled_from(["int", "nf", "fp", "dynamic"]),
    block=st.sampled_from([1, 7, 16, 32, 33, 64, 96, 128, 192, 1000, 4096]),
    flags=st.sampled_from(["", "+zp", "+dq", "+out1%", "+dq+out3%"]),
    rows=st.integers(0, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(["plain", "transposed", "strided", "offset"]),
    seed=st.integers(0, 99),
)
@settings(
    max_examples=int(os.environ.get("KBITC_FUZZ", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_fuzz_linear(kernel_set, shape, bits, family, block, flags, rows, dtype, layout, seed):
    out_rows, features = shape
    try:
        weight = packed(out_rows, features, f"{family}{bits}:{block}{flags}", seed)
    except Exception:  # noqa: BLE001
        return  # a spec that does not exist, such as fp2
    x = make_input(rows, features, dtype, layout, seed)
    y = linear(x, weight)
    assert y.dtype == dtype and y.shape == (rows, out_rows)
    assert_product(y, x, truth(weight))


def make_input(rows, features, dtype, layout, seed):
    torch.manual_seed(seed)
    if layout == "transposed":
        return torch.randn(features, rows).to(dtype).T
    if layout == "strided":
        return torch.randn(rows, 3 * features + 2).to(dtype)[:, 1 : 3 * features + 1 : 3]
    if layout == "offset":  # two bytes past any alignment
        return torch.randn(rows * features + 1).to(dtype)[1:].view(rows, features)
    return torch.randn(rows, features).to(dtype)


def test_unaligned_and_strided_weights(kernel_set):
    weight = packed(9, 300, "nf5:64+zp+out2%")
    dense = truth(weight)
    x = torch.randn(3, 300)

    def displaced(t):
        wide = torch.zeros(2 * t.numel() + 1, dtype=t.dtype)
        wide[1::2] = t.flatten()
        return wide[1::2].view(t.shape)

    moved = KbitTensor(weight.packed.map(displaced), torch.float32)
    assert_product(linear(x, moved), x, dense)

    def shifted(t):
        wide = torch.zeros(t.numel() + 1, dtype=t.dtype)
        wide[1:] = t.flatten()
        return wide[1:].view(t.shape)

    assert_product(linear(x, KbitTensor(weight.packed.map(shifted), torch.float32)), x, dense)


def test_many_dimensions_and_empty_input(kernel_set):
    weight = packed(6, 64, "nf4:64")
    x = torch.randn(2, 3, 5, 64)
    assert linear(x, weight).shape == (2, 3, 5, 6)
    assert_product(linear(x, weight).view(-1, 6), x.view(-1, 64), truth(weight))
    assert linear(torch.randn(64), weight).shape == (6,)
    assert linear(torch.randn(0, 64), weight).shape == (0, 6)


def test_double_input_is_exact(kernel_set):
    weight = packed(40, 200, "nf4:64+zp")
    x = torch.randn(3, 200, dtype=torch.float64)
    assert_close(linear(x, weight), x @ truth(weight).T, rtol=1e-12, atol=1e-12)


def test_not_a_number_reaches_the_output(kernel_set):
    weight = packed(8, 256, "nf4:64")
    for bad in (float("nan"), float("inf")):
        for rows in (1, 4):
            x = torch.randn(rows, 256)
            x[0, 130] = bad
            y = linear(x, weight)
            assert not y[0].isfinite().any()
            assert y[1:].isfinite().all()


def test_tiny_and_huge_inputs(kernel_set):
    weight = packed(8, 256, "int4:64")
    for scale in (1e-30, 1e30):
        x = torch.randn(1, 256) * scale
        assert_product(linear(x, weight) / scale, x / scale, truth(weight))
    assert linear(torch.zeros(2, 256), weight).abs().max() == 0
    assert linear(torch.full((1, 256), 1e-40), weight).isfinite().all()


def test_massive_activation_keeps_the_others(kernel_set):
    """One feature a thousand times larger than the rest disturbs its own block only."""
    weight = packed(32, 1024, "nf4:64")
    x = torch.randn(1, 1024)
    x[0, 100] = 1000.0
    assert_product(linear(x, weight), x, truth(weight), bound=2e-4)


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("spec", ["nf4:64", "int4:64+zp+out2%", "fp6:64", "int2:32", "nf3:48"])
def test_inputs_at_the_ends_of_float32(kernel_set, spec, rows):
    """Each row is scaled by a power of two: what float32 holds of the product is there."""
    weight = packed(24, 320, spec)
    dense = truth(weight)
    generator = torch.Generator().manual_seed(3)
    for scale in (1e-37, 1e-36, 1e36):
        x = torch.randn(rows, 320, generator=generator).clamp(-3, 3) * scale
        if rows > 1:
            x[1] /= scale  # beside an ordinary row
        sizes = x.abs().amax(-1, keepdim=True).double()
        assert_product(linear(x, weight).double() / sizes, x.double() / sizes, dense.double())


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("spec", ["nf4:64", "int4:64", "nf3:48"])
def test_infinities_are_those_of_the_dense_product(kernel_set, spec, rows):
    weight = packed(24, 320, spec)
    x = torch.randn(rows, 320, generator=torch.Generator().manual_seed(4))
    x[0, 17] = float("inf")
    expected = x @ weight.dequantize().T
    got = linear(x, weight)
    assert torch.equal(got[0].nan_to_num(1, 2, 3), expected[0].nan_to_num(1, 2, 3))
    assert got[1:].isfinite().all()


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("spec", ["nf4:64", "int4:64+zp", "fp6:64+out2%", "int2:32", "nf3:64+dq", "int8:128"])
@pytest.mark.parametrize("size", [1e3, 1e4])
def test_outlying_activations_leave_the_others_their_share(kernel_set, spec, rows, size):
    """A few values thousands of times the rest of their blocks: the rest's share of the product is right."""
    weight = packed(24, 1096, spec)
    dense = truth(weight)
    x = torch.randn(rows, 1096, generator=torch.Generator().manual_seed(5))
    outlying = torch.tensor([5, 100, 101, 700, 1095])
    x[:, outlying] = torch.tensor([1.0, -0.7, 1.0, 0.9, -1.0]) * size
    share = x.clone()
    share[:, outlying] = 0.0
    got = linear(x, weight).double() - (x - share).double() @ dense.double().T
    expected = share.double() @ dense.double().T
    assert (got - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("spec", ["nf4:64", "int8:64", "nf8:64", "int2:32"])
def test_sums_of_one_sign_hold(kernel_set, spec, rows):
    """The largest level times the largest x, all over: integer sums come as near to overflow as they can."""
    weight = quantize(torch.full((18, 320), 0.7), spec)
    x = torch.full((rows, 320), 3.0)
    x[-1] = -3.0
    assert_product(linear(x, weight), x, truth(weight))


def test_more_rows_than_stay_in_the_cache(kernel_set):
    weight = packed(35, 17000, "nf4:64+zp")
    x = torch.randn(70, 17000)
    assert_product(linear(x, weight), x, truth(weight))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_the_result(kernel_set, threads):
    weight = packed(515, 576, "nf4:64+dq")
    before = torch.get_num_threads()
    try:
        for rows in (1, 9, 40):
            x = torch.randn(rows, 576)
            torch.set_num_threads(1)
            one = linear(x, weight)
            torch.set_num_threads(threads)
            assert torch.equal(linear(x, weight), one)
    finally:
        torch.set_num_threads(before)


def test_linears_equals_its_parts(kernel_set):
    weights = [
        packed(64, 576, "nf4:64"),
        packed(24, 576, "int3:32+zp", 1),
        packed(7, 576, "nf4:64+out1%", 2),
        packed(9, 576, "int4:48", 3),
        packed(10, 576, "nf4:64", 4),
    ]
    tensors = [t for w in weights for t in w.operands().tensors]
    numbers = [n for w in weights for n in w.operands().numbers]
    biases = [torch.randn(64), None, None, torch.randn(9), None]
    for rows in (1, 4, 20):
        x = torch.randn(rows, 576)
        y = torch.ops.kbit.linears(x, tensors, numbers, biases)
        each = [linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
        assert torch.equal(y, torch.cat(each, -1))


def test_linears_gradient(kernel_set):
    weights = [packed(6, 70, "nf4:64"), packed(5, 70, "int8:32+zp", 1)]
    tensors = [t for w in weights for t in w.operands().tensors]
    numbers = [n for w in weights for n in w.operands().numbers]
    x = torch.randn(3, 70, requires_grad=True)
    grad = torch.randn(3, 11)
    torch.ops.kbit.linears(x, tensors, numbers, [torch.randn(6), None]).backward(grad)
    dense = torch.cat([truth(w) for w in weights])
    assert_close(x.grad.double(), grad.double() @ dense, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="no gradient for its biases"):
        torch.ops.kbit.linears(x, tensors, numbers, [torch.randn(6, requires_grad=True), None])


@pytest.mark.parametrize("spec", ["nf4:64", "int3:48+zp", "fp6:64+dq+out2%"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_the_input(kernel_set, spec, dtype):
    weight = packed(150, 300, spec)
    x = torch.randn(5, 300, dtype=dtype, requires_grad=True)
    bias = torch.randn(150, dtype=dtype, requires_grad=True)
    grad = torch.randn(5, 150, dtype=dtype)
    linear(x, weight, bias).backward(grad)
    assert x.grad.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    assert_close(x.grad.double(), grad.double() @ truth(weight), rtol=tolerance, atol=tolerance * 20)
    assert_close(bias.grad, grad.sum(0), rtol=2**-6, atol=2**-6)


def test_gradcheck(kernel_set):
    weight = packed(4, 40, "nf4:16")
    x = torch.randn(2, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: linear(t, weight), (x,))


@pytest.mark.parametrize("spec", ["nf4:64", "int5:32+zp", "nf8:48+dq", "fp3:7+out3%", "int8:64+dq", "nf2:64"])
@pytest.mark.parametrize("features", [64, 100, 256, 777])
def test_rows_are_exact(kernel_set, spec, features):
    """Dequantize and embedding give the reference's floats, bit for bit (double quantization: nearly)."""
    weight = packed(21, features, spec)
    operands = weight.operands()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        expected = reference.dequantize(operands, dtype)
        found = torch.ops.kbit.dequantize(*operands, dtype)
        loose = "+dq" in spec
        assert_close(found, expected, rtol=2**-7 if loose else 0, atol=1e-6 if loose else 0)
        ids = torch.tensor([[3, 20], [0, 3]])
        assert torch.equal(torch.ops.kbit.embedding(ids, *operands, dtype), found[ids])


def test_embedding_refuses_bad_ids(kernel_set):
    weight = packed(5, 64, "nf4:64")
    for bad in (-1, 5):
        with pytest.raises(IndexError, match="outside 0"):
            torch.ops.kbit.embedding(torch.tensor([0, bad]), *weight.operands(), torch.float32)
    with pytest.raises(RuntimeError, match="expected integers"):
        torch.ops.kbit.embedding(torch.tensor([0.5]), *weight.operands(), torch.float32)
    assert torch.ops.kbit.embedding(
        torch.empty(0, dtype=torch.long), *weight.operands(), torch.float32
    ).shape == (0, 64)


@pytest.mark.parametrize("spec", ["nf4:64", "int4:64+zp+dq", "nf3:32+out2%", "fp4:20"])
def test_experts(kernel_set, spec):
    weight = packed(30, 200, spec, experts=4)
    dense = truth(weight)
    x = torch.randn(17, 200, requires_grad=True)
    offsets = torch.tensor([1, 1, 12, 17], dtype=torch.int32)
    y = torch.ops.kbit.grouped_linear(x, *weight.operands(), offsets)
    starts = [0, 1, 1, 12]
    for expert, (start, end) in enumerate(zip(starts, offsets.tolist(), strict=True)):
        assert_product(y[start:end].detach(), x[start:end].detach(), dense[expert])
    grad = torch.randn(17, 30)
    y.backward(grad)
    for expert, (start, end) in enumerate(zip(starts, offsets.tolist(), strict=True)):
        assert_close(
            x.grad[start:end].double(), grad[start:end].double() @ dense[expert], rtol=1e-4, atol=1e-4
        )
    assert_close(
        torch.ops.kbit.dequantize(*weight.operands(), torch.float32).double(), dense, rtol=1e-5, atol=1e-6
    )
