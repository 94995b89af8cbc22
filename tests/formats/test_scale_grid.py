"""Scales that are integers times one constant: exact in 16 bits, near what was asked, and found again."""

from __future__ import annotations

import pytest
import torch

import kbitc
from kbitc.errors import UsageError
from kbitc.formats.scale_grid import (
    constants_of,
    largest_of,
    level_bits,
    scales_on_grid,
    whole_steps,
    zeros_on_grid,
)
from kbitc.formats.spec import SUPER_BLOCK, parse

SPECS = ["sint3:16+sb6", "sint6:16+sb8", "sint4:32+sb6+nl", "int4:32+zp+sb6+min", "int2:16+zp+sb4+min"]


def scales_like(spec, rows=9, width=3 * SUPER_BLOCK, seed=0):
    torch.manual_seed(seed)
    scales = torch.randn(rows, width // spec.block) * 10 ** torch.empty(rows, 1).uniform_(-3, 1)
    return scales.abs() if spec.has_zero_point else scales


@pytest.mark.parametrize("text", SPECS)
def test_scales_are_near_and_16_bits_hold_them(text):
    spec = parse(text)
    scales = scales_like(spec)
    scales[3] = 0.0
    scales[4, 1:] = 0.0
    found = scales_on_grid(scales, spec)
    assert torch.equal(found.half().float(), found)
    group = scales.unflatten(1, (3, -1))
    step = group.abs().amax(-1, keepdim=True) / largest_of(spec)
    # The first constant tried is the least there is of a few significant bits: it loses half of it at most.
    coarse = 1 + 2.0 ** -(10 - largest_of(spec).bit_length())
    lost = (found.unflatten(1, (3, -1)) - group).square().mean(-1, keepdim=True).sqrt()
    assert bool((lost <= 0.5 * coarse * step + 1e-7).all())
    assert not found[3].any()


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("seed", range(3))
def test_constants_and_integers_are_found_again(text, seed):
    spec = parse(text)
    stored = scales_on_grid(scales_like(spec, seed=seed), spec).half()
    constants, integers = constants_of(stored, spec)
    assert int(integers.abs().max()) <= largest_of(spec)
    assert torch.equal((constants.unsqueeze(-1) * integers).flatten(1).float(), stored.float())
    own = constants * 2.0 ** -level_bits(spec)  # as the other program has it
    assert torch.equal(own.half().double(), own)


def test_zero_points_are_never_above_zero():
    spec = parse("int4:32+zp+sb6+min")
    torch.manual_seed(0)
    zeros = torch.randn(5, 16)
    found = zeros_on_grid(zeros, spec)
    assert bool((found <= 0).all())
    assert torch.equal(found[zeros > 0], torch.zeros_like(found[zeros > 0]))
    assert float((found - zeros.clamp_max(0)).abs().max()) < 0.03


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_points_of_whole_steps_are_exact(bits):
    torch.manual_seed(0)
    weight = torch.randn(6, 96)
    weight[1] += 4.0
    weight[2] -= 4.0
    weight[3] = 0.0
    packed = kbitc.quantize(weight, f"int{bits}:32+zp+iz").packed
    steps = whole_steps(packed.zeros, packed.scales, packed.spec)
    assert bool(((steps >= 0) & (steps <= 2**bits - 1)).all())
    step = packed.scales.double() * 2.0**-bits
    assert torch.equal(packed.zeros.double(), -steps * step)
    back = kbitc.quantize(weight, f"int{bits}:32+zp+iz").dequantize().float()
    assert float((back - weight).abs().max()) <= 0.55 * float(step.max())
    assert not back[3].any()


@pytest.mark.parametrize("largest", [1e-9, 1e-6, 1e-4, 6e4, 3e38])
def test_extremes_stay_finite(largest):
    spec = parse("sint3:16+sb6")
    scales = scales_like(spec)
    scales *= largest / scales.abs().max()
    found = scales_on_grid(scales, spec)
    assert bool(found.isfinite().all())
    assert torch.equal(found.half().float(), found)


@pytest.mark.parametrize("text", [*SPECS, "int4:32+zp+min", "int8:64+zp+min", "sint4:32+nl"])
@pytest.mark.parametrize("width", [512, 531, 7])
def test_weights_come_back(text, width):
    """Short rows and short last blocks too; better than one bit less."""
    spec = parse(text)
    torch.manual_seed(0)
    weight = torch.randn(11, width)
    weight[2] = 0.25
    weight[3] += 4.0
    weight[5] = 0.0
    back = kbitc.quantize(weight, text).dequantize().float()
    assert not back[5].any()
    error = float((back - weight).norm() / weight.norm())
    assert error < 0.6 / 2 ** (spec.bits - 2) * 0.5 + 0.02, error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int4:32+min", "needs +zp"),
        ("sint4:32+zp+nl", "has no +zp"),
        ("sint3:32+nl", "+nl is of 4 bits"),
        ("sint3:16+sb3", "takes 4 to 8"),
        ("int8:64+zp+iz", "+iz is of 2, 3, 4 bits"),
        ("int4:64+zp+dq+iz", "leave +dq and +sb away"),
        ("sint3:16+sb6+dq", "name one of them"),
        ("sint3:24+sb6", "24 do not fit"),
        ("sint3:256+sb6", "256 do not fit"),
        ("int4:32+zp+sb6", "write +zp+sb6+min"),
        ("sint3:16+sb", "did you mean"),
    ],
)
def test_what_there_is_not_says_so(text, message):
    with pytest.raises(UsageError) as error:
        parse(text)
    assert message in str(error.value)
