"""Strips of columns: the native kernels give the bits of plain torch, for every set that this machine runs."""

from __future__ import annotations

import math

import pytest
import torch

from kbitc.formats.codebooks import shared_codebook
from kbitc.formats.encoder import Encoder
from kbitc.formats.spec import parse
from kbitc.kernels import ops  # noqa: F401  # registers torch.ops.kbit
from kbitc.kernels.cpu.build import find_compiler
from kbitc.kernels.rounding import KEPT, Levels, descend_strip, feed_back_strip

try:
    find_compiler()
except Exception as error:  # noqa: BLE001
    pytest.skip(f"the native kernels cannot be built: {error}", allow_module_level=True)

BLOCKS = 4
SPECS = ["int2", "nf2", "int3", "nf3", "fp4", "nf4", "int5", "fp6e4", "dynamic7", "nf8", "int8", "dynamic8"]


def levels_of(spec, columns, rows, *, has_zeros=False, kept=torch.float16, is_kept=0.2, seed=0):
    """Blocks in any order, scales of both signs, one of 0, one whose inverse is infinite."""
    generator = torch.Generator().manual_seed(seed)
    codebook = shared_codebook(parse(spec))
    scales = torch.randn(BLOCKS, rows, generator=generator)
    scales[1, ::3], scales[2, ::5] = 0.0, 1e-39
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    inverse = torch.where(inverse.isfinite(), inverse, 0.0)
    zeros = torch.randn(BLOCKS, rows, generator=generator) if has_zeros else None
    blocks = torch.randint(BLOCKS, (columns,), generator=generator)
    blocks = torch.where(torch.rand(columns, generator=generator) < is_kept, KEPT, blocks)
    return Levels(blocks, scales, inverse, zeros, codebook, Encoder(codebook).bounds, kept)


def problem(columns, rows, seed=0):
    """What is wanted, values so far, an upper factor and moments."""
    generator = torch.Generator().manual_seed(seed)
    wanted, start = torch.randn(2, columns, rows, generator=generator)
    root = torch.randn(columns, columns, generator=generator) / columns**0.5
    moments = root @ root.mT + torch.eye(columns)
    return wanted, start, torch.linalg.cholesky(moments).mT.contiguous(), moments


def same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(
            a.isnan() if a.is_floating_point() else a, b.isnan() if b.is_floating_point() else b
        )
        bits = torch.int32 if a.is_floating_point() else torch.uint8  # -0 is not 0
        assert torch.equal(a[a == a].view(bits), b[b == b].view(bits))


def check(columns, rows, levels, seed=0):
    wanted, start, factor, moments = problem(columns, rows, seed)
    found = torch.ops.kbit.feed_back_strip(wanted, factor, *levels)
    same(found, feed_back_strip(wanted, factor, levels))
    found = torch.ops.kbit.descend_strip(wanted, start, moments, *levels)
    same(found, descend_strip(wanted, start, moments, levels))


@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_the_bits_of_plain_torch(kernel_set, spec, has_zeros):
    check(29, 131, levels_of(f"{spec}:8", 29, 131, has_zeros=has_zeros))


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (2, 63), (128, 64), (5, 129), (7, 3), (0, 4), (3, 0)])
@pytest.mark.parametrize("kept", [torch.float16, torch.bfloat16, torch.float32])
def test_shapes_and_kept_columns(kernel_set, columns, rows, kept):
    for is_kept in (0.0, 0.5, 1.0):
        check(columns, rows, levels_of("nf3:8", columns, rows, kept=kept, is_kept=is_kept), seed=3)


@pytest.mark.parametrize("kept", [torch.float16, torch.bfloat16])
def test_every_kind_of_16_bit_number(kernel_set, kept):
    """Bits at random, ties, sub-normal and largest numbers: errors are what rounding to 16 bits leaves."""
    bits = torch.randint(-(2**31), 2**31, (1, 20_000), generator=torch.Generator().manual_seed(0))
    whole = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(kept).float()
    ties = (whole[1:].double() + whole[:-1].double()) / 2
    edges = torch.tensor([65519.99, 65520.0, 3.4e38, 2**-25, 2**-24 * 1.5, math.inf, math.nan, 0.0])
    wanted = torch.cat(
        [bits.int().view(torch.float32), whole[None], ties.float()[None], edges[None], -edges[None]], 1
    )
    levels = levels_of("nf3:8", 1, wanted.shape[1], kept=kept, is_kept=1.0)
    factor = torch.ones(1, 1)
    same(torch.ops.kbit.feed_back_strip(wanted, factor, *levels), feed_back_strip(wanted, factor, levels))


@pytest.mark.parametrize("spec", ["nf2", "int3", "nf4", "int5", "dynamic8"])
def test_ties_and_values_beyond_all_levels(kernel_set, spec):
    levels = levels_of(f"{spec}:8", 1, 1, is_kept=0.0)
    near = [levels.bounds, *(torch.nextafter(levels.bounds, torch.tensor(far)) for far in (-9.0, 9.0))]
    far = torch.tensor([-math.inf, -1e38, -2.0, 2.0, 1e38, math.inf, math.nan])
    wanted = torch.cat([*near, levels.codebook, far])[None]
    ones = torch.ones(1, wanted.shape[1])
    levels = levels._replace(blocks=torch.zeros(1, dtype=torch.int64), scales=ones, inverse=ones)
    found = torch.ops.kbit.feed_back_strip(wanted, torch.ones(1, 1), *levels)
    same(found, feed_back_strip(wanted, torch.ones(1, 1), levels))
    assert found[0][0, : len(levels.bounds)].tolist() == list(range(len(levels.bounds)))


def test_parts_of_larger_tensors(kernel_set):
    wanted, start, factor, moments = problem(40, 70)
    part, levels = slice(7, 31), levels_of("nf3:8", 24, 70)
    given = wanted[part], factor[part, part]
    same(torch.ops.kbit.feed_back_strip(*given, *levels), feed_back_strip(*given, levels))
    given = wanted[part], start[part], moments.mT[part, part]
    same(torch.ops.kbit.descend_strip(*given, *levels), descend_strip(*given, levels))


def test_opcheck(kernel_set):
    levels = levels_of("nf3:8", 6, 5, has_zeros=True)
    wanted, start, factor, moments = problem(6, 5)
    torch.library.opcheck(torch.ops.kbit.feed_back_strip.default, (wanted, factor, *levels))
    torch.library.opcheck(torch.ops.kbit.descend_strip.default, (wanted, start, moments, *levels))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blocks": torch.zeros(5, dtype=torch.int64)}, "blocks"),
        ({"blocks": torch.zeros(6, dtype=torch.int32)}, "blocks"),
        ({"blocks": torch.full((6,), BLOCKS)}, "outside"),
        ({"blocks": torch.full((6,), -2)}, "outside"),
        ({"scales": torch.ones(BLOCKS, 4)}, "scales"),
        ({"inverse": torch.ones(BLOCKS, 5).double()}, "inverse"),
        ({"zeros": torch.ones(3, 5)}, "zeros"),
        ({"bounds": torch.zeros(6)}, "bounds"),
        ({"codebook": torch.zeros(257)}, "codebook"),
        ({"kept": torch.float64}, "keeps columns"),
    ],
)
def test_what_does_not_fit_is_an_error(kernel_set, fields, message):
    wanted, start, factor, moments = problem(6, 5)
    levels = levels_of("nf3:8", 6, 5)._replace(**fields)
    with pytest.raises((RuntimeError, IndexError), match=message):
        torch.ops.kbit.feed_back_strip(wanted, factor, *levels)
    with pytest.raises((RuntimeError, IndexError), match=message):
        torch.ops.kbit.descend_strip(wanted, start, moments, *levels)


def test_a_factor_or_values_of_another_shape_are_errors(kernel_set):
    wanted, start, factor, moments = problem(6, 5)
    levels = levels_of("nf3:8", 6, 5)
    with pytest.raises(RuntimeError, match="moments"):
        torch.ops.kbit.feed_back_strip(wanted, factor[:5], *levels)
    with pytest.raises(RuntimeError, match="values"):
        torch.ops.kbit.descend_strip(wanted, start[:, :4], moments, *levels)
    with pytest.raises(RuntimeError, match="columns, rows"):
        torch.ops.kbit.feed_back_strip(wanted[0], factor, *levels)
