"""What training does to whole tensors, in plain torch: optimizer steps on block-wise states, weights to int8.

The one thing to know: every operation is element-wise in float32 and rounds once, so native kernels give the
same bits. A state is codes of `kbitc.formats.state_levels` times one scale a block, or plain float32.

    adam      m = a m + a' g;  v = b v + b' g^2;  p = decay p - rate m / (root sqrt(v) + eps)
    momentum  m = a m + a' g;                     p = decay p - rate m          (b: Nesterov, g + a m)
    lion      s = sign(a m + a' g);               p = decay p - rate s;  m = b m + b' g

with g = sign * gradient + l2 * p throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from kbitc.formats.state_levels import StateLevels

WHOLE = 32
"""Bits of a state that is plain float32."""

INT8_MOST = 127  # and the code of 0


class Rule(IntEnum):
    """How a step follows from a gradient, as ``kbit::optimizer_step`` numbers them."""

    ADAM = 0
    MOMENTUM = 1
    LION = 2

    @property
    def states(self) -> int:
        """Moments that are kept."""
        return 2 if self is Rule.ADAM else 1


class StepNumbers(NamedTuple):
    """What a step computes with, in the order in which the op takes it; the letters are those above."""

    sign: float = 1.0
    l2: float = 0.0
    decay: float = 1.0
    rate: float = 0.0
    a: float = 0.0
    a_rest: float = 0.0
    b: float = 0.0
    b_rest: float = 0.0
    root: float = 1.0
    eps: float = 0.0


def optimizer_step(
    maps: StateLevels,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    numbers: Sequence[float],
    rule: Rule,
    bits: int,
    block: int,
) -> None:
    """One step of parameters and states, in place.

    Args:
        maps: of the states' codes.
        params: contiguous, of any shape; float32, bfloat16 or float16.
        grads: of as many numbers each.
        states: for each parameter codes and scales of each moment: uint8 of its size, half of that (rounded
            up; the lower half of a byte is the earlier code) at 4 bits, and float32 ``(blocks,)``; at 32 bits
            float32 of its size, and an empty tensor.
        numbers: `StepNumbers` of each, flat.
        rule: what to do.
        bits: 4, 8 or 32.
        block: numbers a scale; even.
    """
    fields, width = 2 * rule.states, len(StepNumbers._fields)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        own = list(states[fields * i : fields * (i + 1)])
        moments = [
            read_state(maps, at, codes, scales, param.numel(), bits, block)
            for at, (codes, scales) in enumerate(zip(own[::2], own[1::2], strict=True))
        ]
        n = StepNumbers(*numbers[width * i : width * (i + 1)])
        before = param.flatten().float()
        after, moments = _moved(rule, n, before, grad.flatten().float() * n.sign + before * n.l2, moments)
        for at, moment in enumerate(moments):
            write_state(maps, at, moment, own[2 * at], own[2 * at + 1], bits, block)
        param.copy_(after.view(param.shape))


def _moved(
    rule: Rule, n: StepNumbers, param: Tensor, grad: Tensor, moments: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    mean = moments[0] * n.a + grad * n.a_rest
    kept = param * n.decay
    if rule is Rule.ADAM:
        square = moments[1] * n.b + grad * grad * n.b_rest
        width = square.double().sqrt().float()  # torch's float32 roots are not always the nearest
        return kept - mean / (width * n.root + n.eps) * n.rate, [mean, square]
    if rule is Rule.MOMENTUM:
        return kept - (grad + mean * n.a if n.b else mean) * n.rate, [mean]
    sign = torch.where(mean.isnan(), mean, mean.sign())
    return kept - sign * n.rate, [moments[0] * n.b + grad * n.b_rest]


def update_squares(
    maps: StateLevels,
    grad: Tensor,
    codes: Tensor,
    scales: Tensor,
    numbers: Sequence[float],
    bits: int,
    block: int,
) -> Tensor:
    """The sum of g^2 / max(v, eps^2), v the bias-corrected second moment after a step: ``()`` float64.

    Its mean is the squared size of an update of Adam without momentum, by which StableAdamW clips.
    """
    n = StepNumbers(*numbers)
    square = grad.flatten().float().square()
    moment = read_state(maps, 1, codes, scales, grad.numel(), bits, block)
    corrected = (moment * n.b + square * n.b_rest) * _single(n.root) ** 2
    return (square / corrected.clamp_min(_single(n.eps) ** 2)).double().sum()


def _single(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def read_state(
    maps: StateLevels, at: int, codes: Tensor, scales: Tensor, count: int, bits: int, block: int
) -> Tensor:
    """The values of a state, ``(count,)`` float32.

    Args:
        maps: of codes.
        at: which of them: 0 of first moments, 1 of second ones.
        codes: as `optimizer_step` takes them.
        scales: likewise.
        count: numbers.
        bits: 4, 8 or 32.
        block: numbers a scale.
    """
    if bits == WHOLE:
        return codes.flatten()
    whole = codes if bits == 8 else torch.stack([codes & 15, codes >> 4], dim=-1).flatten()[:count]
    return maps.levels[at][whole.long()] * scales.repeat_interleave(block)[:count]


def write_state(
    maps: StateLevels, at: int, values: Tensor, codes: Tensor, scales: Tensor, bits: int, block: int
) -> None:
    """Values as codes and scales, which are overwritten; what they are is in `read_state`."""
    if bits == WHOLE:
        codes.copy_(values.view(codes.shape))
        return
    count = values.numel()
    rows = torch.nn.functional.pad(values, (0, -count % block)).view(-1, block)
    largest = rows.abs().amax(1)
    inverse = torch.ones_like(largest) / largest
    is_finite = largest.isfinite()
    factor = torch.where(is_finite & inverse.isfinite(), inverse, 0.0)
    scales.copy_(torch.where(is_finite, largest, math.nan))
    scaled = (rows * factor.unsqueeze(1)).flatten()[:count]
    found = maps.codes(at, scaled.nan_to_num(0.0))
    if bits == 4:
        pairs = torch.nn.functional.pad(found, (0, count % 2)).view(-1, 2)
        found = pairs[:, 0] | pairs[:, 1] << 4
    codes.copy_(found)


def round_tensor(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix as int8 under one scale, as ``kbit::linear_int8`` takes weights of 8 bits.

    Args:
        weight: ``(rows, cols)`` float32, bfloat16 or float16.

    Returns:
        Codes ``(rows, cols up to a multiple of 8)`` uint8, weight / scale * 127 + 127; those of the matrix
        turned; and the scale, ``(1,)`` float32: the largest absolute value, NaN if there is no such.
    """
    if weight.dim() != 2:
        raise RuntimeError(f"kbit::round_tensor: a weight of shape {list(weight.shape)}; expected a matrix")
    values = weight.float()
    largest = values.abs().max() if values.numel() else values.new_zeros(())
    inverse = torch.full_like(largest, INT8_MOST) / largest
    is_usable = bool(largest.isfinite() and inverse.isfinite())
    codes = torch.zeros_like(values, dtype=torch.uint8)
    if is_usable:
        codes = ((values * inverse).round() + INT8_MOST).to(torch.uint8)
    scale = largest if is_usable else torch.where(largest.isfinite(), 0.0, math.nan)
    return _whole_groups(codes), _whole_groups(codes.mT), scale.view(1)


def _whole_groups(codes: Tensor) -> Tensor:
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8)).contiguous()
