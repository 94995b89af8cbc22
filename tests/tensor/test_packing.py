"""Block-wise quantization against an independent float64 implementation, and its properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import kbitc
from kbitc.errors import UsageError
from kbitc.formats import bit_planes, blocks
from kbitc.formats import dequantize as dequantizing
from kbitc.formats.codebooks import dynamic_map, shared_codebook
from kbitc.formats.datatypes import FAMILIES, CodebookRequest, codebook
from kbitc.formats.dequantize import dequantize
from kbitc.formats.encode import encode_rows
from kbitc.formats.encoder import Encoder
from kbitc.formats.layout import packed_slots, weight_bytes
from kbitc.formats.scales import effective_scales, scale_encoder
from kbitc.formats.spec import parse
from kbitc.quantizers import quantize_weight

FLAGS = ["", "+zp", "+dq", "+zp+dq", "+out3%"]


def reference_error(weight, spec):
    """Relative error in float64 numpy, blocks by hand, scales unrounded; nothing of kbitc but codebooks."""
    rows, width = weight.shape
    squared = 0.0
    for start in range(0, width, spec.block):
        block = weight[:, start : start + spec.block]
        middle = np.zeros((rows, 1))
        if spec.has_zero_point:
            middle = (block.max(1, keepdims=True) + block.min(1, keepdims=True)) / 2
        centred = block - middle
        if FAMILIES[spec.family].is_signed and not spec.has_zero_point:
            scale = np.take_along_axis(centred, np.abs(centred).argmax(1)[:, None], 1)
        else:
            scale = np.abs(centred).max(1, keepdims=True)
        levels = codebook(
            spec.family,
            CodebookRequest(
                bits=spec.bits,
                exponent=spec.exponent,
                block=spec.block,
                is_centered=spec.has_zero_point,
                blocks=fit_blocks(weight, spec) if FAMILIES[spec.family].is_fitted else None,
            ),
        )
        normalized = centred / scale
        nearest = levels[np.abs(normalized[..., None] - levels).argmin(-1)]
        squared += ((centred - nearest * scale) ** 2).sum()
    return np.sqrt(squared / (weight**2).sum())


def fit_blocks(weight, spec):
    from kbitc.formats.datatypes import Blocks

    blocks = weight.reshape(-1, spec.block)
    scale = np.abs(blocks).max(1, keepdims=True)
    return Blocks(weight.ravel(), (blocks / scale).ravel(), np.broadcast_to(scale**2, blocks.shape).ravel())


@pytest.mark.parametrize("block", [32, 64, 128, 256, 1024])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_error_on_gaussian_weights_agrees_with_float64(family, block):
    weight = np.random.default_rng(block).standard_normal((32, 1024)).astype(np.float32)
    for bits in range(2, 9):
        spec = parse(f"{family}{bits}:{block}")
        back = dequantize(quantize_weight(torch.from_numpy(weight), spec)).double().numpy()
        got = np.sqrt(((weight - back) ** 2).sum() / (weight.astype(np.float64) ** 2).sum())
        wanted = reference_error(weight.astype(np.float64), spec)
        assert got == pytest.approx(wanted, rel=0.01), str(spec)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("family", ["int", "nf", "fp"])
def test_error_with_zero_point_agrees_with_float64(family, bits):
    weight = np.random.default_rng(bits).standard_normal((64, 512)).astype(np.float32) + 0.5
    spec = parse(f"{family}{bits}:64+zp")
    back = dequantize(quantize_weight(torch.from_numpy(weight), spec)).double().numpy()
    got = np.sqrt(((weight - back) ** 2).sum() / (weight.astype(np.float64) ** 2).sum())
    assert got == pytest.approx(reference_error(weight.astype(np.float64), spec), rel=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_double_quantization_costs_little_error(bits):
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    plain = (weight - dequantize(quantize_weight(weight, f"nf{bits}:64"))).norm()
    double = (weight - dequantize(quantize_weight(weight, f"nf{bits}:64+dq"))).norm()
    assert double < 1.005 * plain


shapes = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 700)),
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 300)),
    st.sampled_from([(1, 1), (1, 257), (13, 17), (2, 1, 1), (31, 172)]),
)
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


@st.composite
def weights(draw):
    seed = draw(st.integers(0, 2**31))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    made = torch.randn(draw(shapes), generator=torch.Generator().manual_seed(seed)) * scale
    return made.to(draw(dtypes))


@settings(max_examples=120, deadline=None)
@given(
    weight=weights(),
    family=st.sampled_from(sorted(FAMILIES)),
    bits=st.integers(2, 8),
    block=st.integers(1, 300),
    flags=st.sampled_from(FLAGS),
)
def test_any_weight_packs_to_the_promised_bytes_and_back(weight, family, bits, block, flags):
    spec = parse(f"{family}{bits}:{block}{flags}")
    packed = quantize_weight(weight, spec)
    assert packed.shape == tuple(weight.shape)
    rows = weight[..., 0].numel()
    assert packed.nbytes() == weight_bytes(spec, (rows,), weight.shape[-1])
    slots = packed_slots(spec, tuple(weight.shape[:-1]), weight.shape[-1])
    assert sum(slot.nbytes for slot in slots.values()) == packed.nbytes()
    assert {name: tuple(t.shape) for name, t in packed.tensors().items() if name in slots} == {
        name: slot.shape for name, slot in slots.items()
    }
    back = dequantize(packed)
    assert back.shape == weight.shape
    assert back.isfinite().all()
    # No weight moves by more than its row's range: a block holds nothing larger.
    limit = 2.01 * weight.float().abs().amax(-1, keepdim=True) + 1e-6
    assert ((back - weight.float()).abs() <= limit).all()


@settings(max_examples=80, deadline=None)
@given(
    weight=weights(),
    family=st.sampled_from(["int", "fp", "nf"]),
    bits=st.integers(2, 8),
    block=st.integers(1, 300),
)
def test_quantizing_a_dequantized_weight_gives_the_same_codes(weight, family, bits, block):
    """For codebooks that hold both -1 and 1: the absmax of a block is then a code of it."""
    first = quantize_weight(weight, f"{family}{bits}:{block}")
    scales = first.scales.float()
    assume(bool(((scales == 0) | (scales >= 2**-14)).all()))  # below, float16 rounds a scale by up to a half
    again = quantize_weight(dequantize(first), first.spec)
    assert torch.equal(first.planes, again.planes)
    assert torch.equal(first.scales, again.scales)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("flags", ["", "+zp", "+dq", "+zp+dq"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_all_zero_block_is_exact(family, flags, bits):
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(bits))
    weight[2, 32:64] = 0.0
    weight[4] = 0.0
    back = dequantize(quantize_weight(weight, f"{family}{bits}:32{flags}"))
    assert (back[2, 32:64] == 0).all()
    assert (back[4] == 0).all()


def test_an_all_zero_weight_is_exact_under_every_family():
    for family in FAMILIES:
        assert (dequantize(quantize_weight(torch.zeros(3, 50), f"{family}4:16+dq")) == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spec", ["nf4:64", "int4:64+zp", "bof3:32+dq", "learned4:64", "nf4:64+out1%"])
def test_a_weight_that_is_not_finite_is_named(value, spec):
    weight = torch.randn(8, 100)
    weight[5, 99] = value
    with pytest.raises(UsageError, match=r"layers\.3\.weight: (row 5|an outlier column)"):
        quantize_weight(weight, spec, name="layers.3.weight")


@pytest.mark.parametrize(
    "weight", [torch.ones(3), torch.ones(2, 2, 2, 2), torch.ones(2, 2, dtype=torch.int32), torch.empty(0, 4)]
)
def test_only_float_matrices_are_quantized(weight):
    with pytest.raises(UsageError, match="expected a non-empty 2-D or 3-D float weight"):
        quantize_weight(weight, "nf4:64")


def test_unknown_quantizer():
    with pytest.raises(UsageError, match="no quantizer 'absmx'; did you mean 'absmax'"):
        quantize_weight(torch.ones(2, 2), "nf4:64", quantizer="absmx")


@pytest.mark.parametrize("magnitude", [1e6, 1e30, 1e-9, 1e-30])
def test_scales_beyond_float16_take_bfloat16(magnitude):
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    packed = quantize_weight(weight * magnitude, "int8:64")
    assert packed.scales.dtype == torch.bfloat16
    back = dequantize(packed) / magnitude
    assert (back - weight).norm() / weight.norm() < 0.01


def test_ties_take_the_lower_code():
    weight = torch.tensor([[1.0, 0.5, -0.5, 0.0]])  # int2: levels -1, 0, 1; +-0.5 are ties
    codes = bit_planes.unpack(quantize_weight(weight, "int2:4").planes, 4, 2)
    assert codes.tolist() == [[2, 1, 0, 1]]


@pytest.mark.parametrize("family", sorted(name for name, f in FAMILIES.items() if not f.is_fitted))
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_encoder_finds_the_nearest_level(family, bits):
    levels = codebook(family, CodebookRequest(bits=bits))
    bounds = (levels[1:] + levels[:-1]) / 2
    random = np.random.default_rng(0).uniform(-1.01, 1.01, 20000)
    near = np.concatenate(
        [bounds, np.nextafter(bounds.astype(np.float32), 2), np.nextafter(bounds.astype(np.float32), -2)]
    )
    values = np.concatenate([random, near, levels]).astype(np.float32)
    got = Encoder(torch.from_numpy(levels).float())(torch.from_numpy(values)).numpy()
    assert (got == np.searchsorted(bounds, values.astype(np.float64), side="left")).all()


def test_strides_and_dtypes_do_not_matter():
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).half()
    plain = quantize_weight(weight.T.contiguous(), "nf4:16")
    strided = quantize_weight(weight.T, "nf4:16")
    wide = quantize_weight(weight.T.double(), "nf4:16")
    assert torch.equal(plain.planes, strided.planes)
    assert torch.equal(plain.planes, wide.planes)


def test_tiling_does_not_change_the_bytes(monkeypatch):
    weight = torch.randn(50, 333, generator=torch.Generator().manual_seed(0))
    for spec in ("nf4:64+dq", "int3:50+zp", "learned4:64", "nf3:64+out2%"):
        whole = quantize_weight(weight, spec)
        back, codes = dequantize(whole), encoded(weight, whole)
        assert torch.equal(codes, whole.planes)
        monkeypatch.setattr(blocks, "TILE", 1000)
        monkeypatch.setattr(dequantizing, "TILE", 1000)
        tiled = quantize_weight(weight, spec).tensors()
        assert torch.equal(encoded(weight, whole), codes), spec
        assert torch.equal(dequantize(whole), back), spec
        monkeypatch.undo()
        assert all(torch.equal(tensor, tiled[name]) for name, tensor in whole.tensors().items()), spec


def encoded(weight, packed):
    """The codes of a packed weight by definition, under the scales that it has; no kernel does it."""
    scales = effective_scales(packed.scales, packed.scale_codebook, packed.scale_absmax, packed.scale_mean)
    given = (scales, packed.zeros, packed.codebook, packed.outlier_index, packed.spec.bits, packed.spec.block)
    return encode_rows(weight, *given)


def test_outlier_columns_are_kept_and_do_not_raise_the_scales():
    weight = torch.randn(32, 200, generator=torch.Generator().manual_seed(0))
    weight[:, [7, 150]] *= 20
    packed = quantize_weight(weight, "nf3:64+out1%")
    assert packed.outlier_index.tolist() == [7, 150]
    back = dequantize(packed)
    assert torch.equal(back[:, [7, 150]], weight[:, [7, 150]].half().float())
    assert packed.scales.max() < 5


def test_given_outliers_are_used():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    packed = quantize_weight(weight, "nf3:64+out4%", outliers=torch.tensor([0, 9, 63]))
    assert packed.outlier_index.tolist() == [0, 9, 63]
    with pytest.raises(UsageError, match="has no \\+out"):
        quantize_weight(weight, "nf3:64", outliers=torch.tensor([1]))


def test_bit_accounting_of_the_papers():
    """4.25 bits at block 64; 4.127 with double quantization (QLoRA); 0.24 bits for 1024 to 64."""
    rows, width = 4096, 4096
    bits = lambda text: 8 * weight_bytes(parse(text), (rows,), width) / (rows * width)  # noqa: E731
    assert bits("nf4:64") == 4.25
    assert bits("nf4:64+dq") == pytest.approx(4.127, abs=5e-4)
    assert bits("nf4:64") - bits("nf4:1024") == pytest.approx(0.234375)
    assert bits("int3:64") == 3.25


def test_golden_codes():
    """Format stability: every eighth code of a fixed weight, per family."""
    weight = torch.linspace(-1, 1, 64).sin().view(1, 64)
    golden = {
        "int4:64": [0, 1, 3, 5, 7, 9, 11, 13],
        "nf4:64": [0, 1, 2, 4, 7, 11, 13, 14],
        "fp4:64": [0, 1, 2, 4, 7, 11, 13, 14],
        "bof4:64": [15, 14, 13, 10, 7, 4, 2, 0],
        "dynamic4:64": [0, 0, 1, 3, 8, 11, 13, 14],
    }
    for spec, expected in golden.items():
        codes = bit_planes.unpack(quantize_weight(weight, spec).planes, 64, 4)
        assert codes[0, ::8].tolist() == expected, spec


def test_kept_codebooks_are_plain_tensors_in_inference_mode():
    dynamic_map.cache_clear()
    scale_encoder.cache_clear()
    shared_codebook.cache_clear()
    with torch.inference_mode():
        kept = quantize_weight(torch.randn(2, 64), "nf4:64+dq")
    assert not kept.codebook.is_inference()
    assert not kept.scale_codebook.is_inference()
    assert not scale_encoder().bounds.is_inference()


@pytest.mark.parametrize("size", [1e3, 1e5])
def test_double_quantization_beside_a_huge_row(size):
    """The mean of scales of many orders is far from most of them: it is not subtracted then."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    weight[7] *= size
    back = kbitc.quantize(weight, "nf4:64+dq").dequantize()
    others = torch.arange(64) != 7
    error = (back - weight)[others].norm() / weight[others].norm()
    assert error < 0.3
