"""The weighted scale search: never worse than where it starts, and the same in the native kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kbitc.errors import UsageError
from kbitc.formats.dequantize import dequantize
from kbitc.formats.scale_search import SEARCH_ROUNDS, search_ratios, search_scales
from kbitc.formats.spec import parse
from kbitc.quantizers import quantize_weight
from kbitc.tensor.packing import draft

SPECS = [
    "nf4:64",
    "int3:50+zp",
    "bof4:32",
    "fp5:32+dq",
    "int8:64",
    "nf2:64",
    "learned3:64",
    "nf3:64+out3%",
    "int4:7",
]


def example(rows=23, features=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, features, generator=generator) * torch.rand(features, generator=generator)
    return weight, torch.rand(features, generator=generator) ** 4


def loss(weight, packed, importance):
    return float((((weight - dequantize(packed)) ** 2) * importance).sum())


@pytest.mark.parametrize("spec", SPECS)
def test_less_weighted_error_than_absmax(spec):
    weight, importance = example()
    plain = loss(weight, quantize_weight(weight, spec), importance)
    assert (
        loss(weight, quantize_weight(weight, spec, quantizer="weighted", importance=importance), importance)
        < plain
    )


def searched_by_definition(weight, spec, importance):
    """What "weighted" packs where the search is the definition's, and no kernel's."""
    first = draft(weight, spec)
    importance = importance.clone()
    if first.outlier_index is not None:
        importance[first.outlier_index.long()] = 0.0
    ratios = search_ratios(first.spec.bits)
    given = (importance[None], first.scales, first.zeros, first.codebook, ratios, first.spec.block)
    scales, zeros = search_scales(weight, *given, SEARCH_ROUNDS)
    return replace(first, scales=scales, zeros=zeros).packed()


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("spec", SPECS)
def test_native_search_equals_the_definition(spec, isa):
    weight, importance = example(37, 333)
    torch.ops.kbit.dequantize(
        *quantize_weight(weight, "nf4:64").operands(), torch.float32
    )  # loads the kernels
    try:
        torch.ops.kbit.use_cpu_kernels(isa)
    except (RuntimeError, AttributeError) as error:
        pytest.skip(f"no {isa} kernels here: {error}")
    try:
        native = quantize_weight(weight, spec, quantizer="weighted", importance=importance)
    finally:
        torch.ops.kbit.use_cpu_kernels("auto")
    definition = searched_by_definition(weight, spec, importance)
    # Sums are added in another order, so that of two equally good scales either may win.
    assert loss(weight, native, importance) == pytest.approx(loss(weight, definition, importance), rel=2e-3)
    if parse(spec).has_double_quant:
        return
    same = (native.scales.float() - definition.scales.float()).abs() <= 1e-3 * definition.scales.float().abs()
    assert same.float().mean() > 0.98


def test_experts_have_an_importance_each():
    weight = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    importance = torch.rand(3, 64, generator=torch.Generator().manual_seed(2))
    together = quantize_weight(weight, "nf3:32", quantizer="weighted", importance=importance)
    for expert in range(3):
        alone = quantize_weight(weight[expert], "nf3:32", quantizer="weighted", importance=importance[expert])
        assert torch.equal(together.scales[expert], alone.scales)
        assert torch.equal(together.planes[expert], alone.planes)


def test_features_that_never_occur_do_not_count():
    weight, importance = example()
    importance[::2] = 0.0
    weight[:, 1] = 5.0  # the absmax, where the search starts
    changed = weight.clone()
    changed[:, ::2] *= 0.5
    first = quantize_weight(weight, "nf3:300", quantizer="weighted", importance=importance)
    second = quantize_weight(changed, "nf3:300", quantizer="weighted", importance=importance)
    assert torch.equal(first.scales, second.scales)
    nothing = quantize_weight(weight, "nf4:64", quantizer="weighted", importance=torch.zeros(300))
    assert torch.equal(nothing.scales, quantize_weight(weight, "nf4:64").scales)


def test_zero_blocks_stay_zero():
    weight = torch.zeros(4, 64)
    weight[0, 3] = 1.0
    packed = quantize_weight(weight, "nf4:32", quantizer="weighted", importance=torch.ones(64))
    assert torch.equal(dequantize(packed)[1:], torch.zeros(3, 64))


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (None, "needs the importance"),
        (torch.ones(63), r"shape \(63,\); expected \(64,\)"),
        (-torch.ones(64), "negative"),
        (torch.full((64,), torch.nan), "NaN"),
    ],
)
def test_bad_importance(importance, message):
    with pytest.raises(UsageError, match=message):
        quantize_weight(torch.randn(4, 64), "nf4:64", quantizer="weighted", importance=importance)


def test_op_checks():
    weight, importance = example()
    packed = quantize_weight(weight, "int4:64+zp")
    ratios = torch.linspace(0.5, 1, 4)
    arguments = (
        weight,
        importance[None],
        packed.scales.float(),
        packed.zeros.float(),
        packed.codebook,
        ratios,
        64,
        1,
    )
    torch.library.opcheck(torch.ops.kbit.search_scales.default, arguments)
    with pytest.raises(RuntimeError, match="groups"):
        torch.ops.kbit.search_scales(weight, importance[:7][None], *arguments[2:])
