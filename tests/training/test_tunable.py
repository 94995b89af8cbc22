"""Values that are tuned, and what they make of a packed weight."""

from __future__ import annotations

import pytest
import torch

from kbitc.formats.dequantize import dequantize
from kbitc.quantizers import quantize
from kbitc.training.tunable import BlockSums, TunablePlain, TunableWeight

SPECS = ["nf3:10", "int4:16+zp", "nf4:7+dq", "learned3:33+out6%", "bof4:64", "sint3:16+sb6"]
SPECS += ["int4:16+zp+iz", "int2:16+zp+sb4+min"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(5, 33), (3, 5, 33)])
def test_zeros_change_nothing_not_even_a_rounding(spec, shape):
    torch.manual_seed(0)
    own = TunableWeight(quantize(torch.randn(shape), spec).packed)
    assert own.tuned(own.start()) is own.packed


@pytest.mark.parametrize("spec", SPECS)
def test_a_row_and_a_block_are_scaled(spec):
    torch.manual_seed(0)
    packed = quantize(torch.randn(5, 33), spec).packed
    own = TunableWeight(packed)
    values = own.start()
    values["rows"][2] = 0.5
    values["blocks"][0, 0] = -0.25
    values["scales"][2, 0] = 0.125
    tuned = own.tuned(values)
    assert (tuned.planes is packed.planes, tuned.spec, tuned.nbytes()) == (True, packed.spec, packed.nbytes())
    before, after = (TunableWeight(each).scales for each in (packed, tuned))
    factors = (values["rows"] + values["blocks"] + values["scales"]).exp()
    rough = {"dq": 0.06, "sb6": 0.1, "iz": 0.01, "sb4": 0.1}
    rtol = max((value for flag, value in rough.items() if flag in spec), default=1e-3)
    torch.testing.assert_close(after, before * factors, rtol=rtol, atol=0.1 if "sb" in spec else 1e-3)
    if tuned.zeros is not None and "iz" in spec:
        steps = -tuned.zeros.double() / (tuned.scales.double() / 16)
        assert torch.equal(steps, steps.round())


def test_levels_stay_sorted():
    packed = quantize(torch.randn(5, 33), "learned3:33").packed
    tuned = TunableWeight(packed).tuned({"codebook": torch.tensor([3.0] + [0.0] * 7)})
    assert tuned.codebook.tolist() == sorted(tuned.codebook.tolist())


def test_columns_at_16_bits_and_zero_points_move():
    torch.manual_seed(0)
    own = TunableWeight(quantize(torch.randn(5, 33), "int4:16+zp+out6%").packed)
    values = own.start()
    values["outliers"][1, 0] = 0.5
    values["zeros"][3, 1] = 2.0
    moved = dequantize(own.tuned(values)) - dequantize(own.packed)
    rows, columns = moved.nonzero(as_tuple=True)
    column = int(own.packed.outlier_index[0])
    kept = set(own.packed.outlier_index.tolist())
    assert {(1, column)} | {(3, c) for c in range(16, 32) if c not in kept} == set(
        zip(rows.tolist(), columns.tolist(), strict=True)
    )
    size = own.packed.outlier_values.float().square().mean().sqrt()
    assert float(moved[1, column]) == pytest.approx(0.5 * float(size), rel=1e-2)


@pytest.mark.parametrize("shape", [(700, 33), (3, 5, 33)])
def test_tiles_do_not_change_the_sums(shape, monkeypatch):
    torch.manual_seed(0)
    packed = quantize(torch.randn(shape), "learned3:10+zp").packed
    left, right = torch.randn(6, shape[-2]), torch.randn(6, 33)
    whole = BlockSums(packed)
    whole.add_product(left, right)
    monkeypatch.setattr("kbitc.training.tunable.TILE", 99)
    tiled = BlockSums(packed)
    tiled.add_product(left, right)
    for field in ("scales", "zeros", "codebook"):
        torch.testing.assert_close(getattr(tiled, field), getattr(whole, field), rtol=1e-4, atol=1e-4)


def test_a_gain_keeps_its_dtype():
    own = TunablePlain(torch.tensor([1.0, 2.0, -2.0], dtype=torch.bfloat16))
    assert own.tuned(own.start()) is own.stored
    tuned = own.tuned({"value": torch.tensor([0.0, 1.0, 0.0])})
    assert tuned.dtype == torch.bfloat16
    assert tuned.tolist() == pytest.approx([1.0, 2 + 3**0.5, -2.0], rel=1e-2)
    assert float(TunablePlain(torch.zeros(3)).tuned({"value": torch.ones(3)})[0]) == pytest.approx(0.01)
