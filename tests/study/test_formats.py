"""What a study does to a weight, against plain references in float64."""

from __future__ import annotations

import pytest
import torch

from kbitc.errors import UsageError
from kbitc.formats.codebooks import shared_codebook
from kbitc.formats.layout import weight_bytes
from kbitc.formats.spec import parse
from kbitc.quantizers import quantize_weight
from kbitc.study.formats import Format, parse_format, round_trip
from kbitc.tensor.kbit_tensor import KbitTensor

SHAPES = [(5, 7), (3, 129), (2, 4, 33), (1, 64)]


def reference(weight, codebook, block):
    """One-dimensional blocks: flatten, cut, divide by the absmax at 16 bits, nearest level; float64."""
    flat = weight.double().flatten()
    out = torch.empty_like(flat)
    for start in range(0, len(flat), block):
        part = flat[start : start + block]
        scale = part.abs().max().half().double()
        normalized = part / scale if scale else part
        out[start : start + block] = codebook[(normalized[:, None] - codebook).abs().argmin(1)] * scale
    return out.view(weight.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", ["int4:16", "nf3:50", "dynamic5:1000"])
def test_flat_blocks_are_those_of_the_flattened_tensor(shape, spec):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    own = parse(spec)
    wanted = reference(weight, shared_codebook(own).double(), own.block)
    torch.testing.assert_close(
        round_trip(weight, Format(own, is_flat=True)).double(), wanted, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("is_flat", [False, True])
def test_the_mean_is_subtracted_and_added(is_flat):
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(2)) + 3.0
    mean = weight.mean()
    plain, centred = (
        Format(parse("nf4:8"), is_flat=is_flat),
        Format(parse("nf4:8"), has_mean=True, is_flat=is_flat),
    )
    torch.testing.assert_close(round_trip(weight, centred), round_trip(weight - mean, plain) + mean)
    error = [float((round_trip(weight, form) - weight).square().mean()) for form in (plain, centred)]
    assert error[1] < error[0] / 5, "a mean far from zero is what centring is for"


def test_a_plain_format_is_what_is_packed():
    weight = torch.randn(4, 70)
    packed = KbitTensor(quantize_weight(weight, "nf3:32+out5%"), weight.dtype).dequantize()
    assert torch.equal(round_trip(weight, parse_format("nf3:32+out5%")), packed)


@pytest.mark.parametrize("has_mean", [False, True])
def test_outliers_of_flat_blocks_are_kept_and_raise_no_scale(has_mean):
    weight = torch.randn(8, 50, generator=torch.Generator().manual_seed(3))
    weight[:, 17] *= 50
    form = Format(parse("int4:64+out2%"), has_mean, is_flat=True)
    back = round_trip(weight, form)
    assert torch.equal(back[:, 17], weight[:, 17].half().float())
    rest = [i for i in range(50) if i != 17]
    assert float((back - weight)[:, rest].abs().max()) < 0.5
    given = round_trip(weight, form, torch.tensor([3]))
    assert torch.equal(given[:, 3], weight[:, 3].half().float())


def test_names_give_formats_back():
    for text in ("nf4:64", "int3:128+zp+mean", "quantile4:64+out2%+flat", "fp5:64+paper+mean+flat", "fp16"):
        assert str(parse_format(text)) == text
    with pytest.raises(UsageError, match="neither blocks nor a mean"):
        parse_format("fp16+mean")


@pytest.mark.parametrize("flag", ["mean", "flat"])
def test_compiling_refuses_what_is_of_studies(flag):
    with pytest.raises(UsageError, match=rf"\+{flag} is of studies alone"):
        parse(f"nf4:64+{flag}")


def test_bits_are_counted():
    shape = (96, 100)
    assert Format(parse("int4:64")).paper_bits((96, 128)) == 96 * 128 * 4.25
    kept = Format(parse("int4:64+out2%"))
    assert kept.paper_bits(shape) == pytest.approx(
        9600 * (4 + 16 / 64 + 0.02 * 12)
    )  # section 5.2: p (16 - k)
    assert Format(parse("fp16")).paper_bits(shape) == 16 * 9600
    flat = Format(parse("int4:64"), is_flat=True)
    assert flat.stored_bytes(shape) == 9600 // 2 + 2 * 150  # 150 blocks, and not 2 in each of 96 rows
    assert Format(parse("int4:64")).stored_bytes(shape) == weight_bytes(parse("int4:64"), (96,), 100)
    assert Format(parse("int4:64"), has_mean=True).stored_bytes(shape) == 4 + weight_bytes(
        parse("int4:64"), (96,), 100
    )
    assert Format(parse("int4:64+out2%"), is_flat=True).stored_bytes(shape) == 9600 // 2 + 300 + 2 * (
        2 * 96 + 4
    )
