"""Scales and zero points on a grid, as other programs have them.

    +sbS   scale = D * s,  s an integer of S bits, D shared by the blocks of 256 weights of a row
           zero point = -M * m, m likewise, M its own constant                       (llama.cpp's K-quants)
    +iz    zero point = -d * m, m an integer of k bits, d the step between two levels (compressed-tensors)

The one thing to know: D, M and d have so few significant bits that every product is a float16. An artifact
stores the products as any other scale or zero point, and whoever writes the other program's file finds the
factors in them again, exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbitc.formats.spec import SUPER_BLOCK, Spec

SIGNIFICANT = 11  # bits of a float16
FINEST = -24  # the exponent of its smallest number
TRIED = 8  # constants, from the least that holds the largest scale on
FP16_MAX = torch.finfo(torch.float16).max


def scales_on_grid(scales: Tensor, spec: Spec) -> Tensor:
    """The nearest scales that the spec has.

    Args:
        scales: ``(rows, blocks)`` float32.
        spec: with ``scale_bits``.

    Returns:
        The same shape, float32; each is a float16.
    """
    # A scale of the integers themselves is to be a float16, too.
    return _on_grid(scales, largest_of(spec), FINEST + level_bits(spec), spec.block)


def zeros_on_grid(zeros: Tensor, spec: Spec) -> Tensor:
    """The nearest zero points: none is above 0."""
    return _on_grid(zeros.clamp_max(0.0), largest_of(spec), FINEST, spec.block)


def steps_on_grid(scales: Tensor, spec: Spec) -> Tensor:
    """The nearest scales whose steps, times any integer of k bits, are a float16."""
    values = scales.double().clamp(-FP16_MAX, FP16_MAX)
    exponent = torch.frexp(values).exponent - (SIGNIFICANT - spec.bits)
    unit = torch.ldexp(torch.ones_like(values), exponent.clamp_min(FINEST + spec.bits))
    return ((values / unit).round() * unit).float()


def whole_steps(zeros: Tensor, scales: Tensor, spec: Spec) -> Tensor:
    """The integers m of the nearest zero points under scales as they are stored: float64, 0 to 2**k - 1."""
    step = scales.double() * 2.0**-spec.bits
    return torch.where(step > 0, -zeros.double() / step, 0.0).round().clamp(0, 2**spec.bits - 1)


def level_bits(spec: Spec) -> int:
    """The b of levels that are integers over 2**b: of ``sint``, and of ``int`` from a minimum."""
    if spec.variant == "nl":
        return 7
    return spec.bits if spec.is_from_minimum else spec.bits - 1


def largest_of(spec: Spec) -> int:
    """The largest integer: of S bits without sign where there are zero points, else with."""
    bits = spec.scale_bits if spec.has_zero_point else spec.scale_bits - 1
    return (1 << bits) - 1


def constants_of(values: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """Constants and integers of values that lie on a grid.

    Args:
        values: ``(rows, blocks)``, scales or zero points as they are stored; the blocks fill super-blocks.
        spec: with ``scale_bits``.

    Returns:
        Float64 ``(rows, super_blocks)``, not negative, and int64 ``(rows, super_blocks, blocks)``.
    """
    grouped = values.double().unflatten(1, (-1, SUPER_BLOCK // spec.block))
    # The unit in which all of a super-block are whole: a power of two.
    steps = torch.ldexp(grouped, torch.tensor(-FINEST)).to(torch.int64)
    constants = steps[..., 0].abs()
    for block in range(1, steps.shape[-1]):
        constants = torch.gcd(constants, steps[..., block])
    integers = steps // constants.clamp_min(1).unsqueeze(-1)
    return torch.ldexp(constants.double(), torch.tensor(FINEST)), integers


def _on_grid(values: Tensor, largest: int, finest: int, block: int) -> Tensor:
    count, per = values.shape[1], SUPER_BLOCK // block
    padded = torch.nn.functional.pad(values.double().clamp(-FP16_MAX, FP16_MAX), (0, -count % per))
    grouped = padded.unflatten(1, (-1, per))
    needed = grouped.abs().amax(-1) / largest
    significant = SIGNIFICANT - largest.bit_length()
    exponent = (torch.frexp(needed).exponent - significant).clamp_min(finest)
    unit = torch.ldexp(torch.ones_like(needed), exponent)
    first = (needed / unit).ceil()
    best, least = torch.zeros_like(grouped), torch.full_like(needed, torch.inf)
    for more in range(TRIED):
        constant = (unit * _short(first + more, significant)).unsqueeze(-1)
        integers = torch.where(constant > 0, grouped / constant, 0.0).round().clamp(-largest, largest)
        tried = integers * constant
        lost = torch.where(tried.abs().amax(-1) <= FP16_MAX, (tried - grouped).square().sum(-1), torch.inf)
        best = torch.where((lost < least).unsqueeze(-1), tried, best)
        least = torch.minimum(least, lost)
    return best.flatten(1)[:, :count].float()


def _short(whole: Tensor, bits: int) -> Tensor:
    """Whole numbers of at most so many significant bits, rounded up."""
    over = (torch.frexp(whole).exponent - bits).clamp_min(0)
    unit = torch.ldexp(torch.ones_like(whole), over)
    return (whole / unit).ceil() * unit
