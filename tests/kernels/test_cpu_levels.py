"""What the levels of a codebook become as integers, and what products of several rows of x lose by it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kbitc.formats import bit_planes
from kbitc.formats.dequantize import dequantize_operands
from kbitc.kernels import ops  # noqa: F401
from kbitc.quantizers import quantize


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def lost(packed, x):
    """The largest error of an output, relative to |x| |row of W|."""
    dense = dequantize_operands(packed.operands(), torch.float32).double()
    error = torch.ops.kbit.linear(x, *packed.operands(), None).double() - x.double() @ dense.mT
    return float((error.abs() / (x.double().norm(dim=-1, keepdim=True) * dense.norm(dim=-1))).max())


@pytest.mark.parametrize(
    "spec", ["int3:64", "int4:32", "int6:64", "int8:64", "int8:32+zp", "fp4:64", "nf2:64"]
)
def test_levels_that_are_multiples_of_one_are_not_rounded(kernel_set, spec):
    """What is lost is what rounding x to 15 bits loses."""
    assert lost(quantize(normal(40, 576), spec).packed, normal(9, 576)) <= 8e-6


@pytest.mark.parametrize("ends", [(-0.7, 1.0), (-1.0, 1.0), (0.9, 1.0), (-1.0, 0.984375)])
@pytest.mark.parametrize("rows", [1, 3])
def test_evenly_spaced_levels_wherever_zero_lies(kernel_set, ends, rows):
    """As a data type of another package may have them."""
    codes = torch.randint(64, (37, 712), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
    packed = quantize(normal(37, 712), "int6:64").packed
    moved = replace(packed, planes=bit_planes.pack(codes, 6), codebook=torch.linspace(*ends, 64))
    assert lost(moved, normal(rows, 712)) <= 1e-4
