"""The bytes of a weight in each of llama.cpp's block types, from codes and scales that are packed already.

The one thing to know: nothing is quantized here. A type's values are integers times a float16, plus a
minimum; `KINDS` says which spec has the same ones. A power of two, perhaps a sign, lies between two scales.

    sint4:32             level m/8 * scale        integer -m, stored as 8 - m;  d = -scale / 8
    int4:32+zp+min       level m/16 * scale + z   integer m;                    d = scale / 16, minimum z
    ...+sbS              scale = D * s            s as an integer of S bits; D beside it, once in 256 weights
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kbitc.formats import bit_planes
from kbitc.formats.packed import Packed
from kbitc.formats.scale_grid import constants_of, level_bits
from kbitc.formats.spec import SUPER_BLOCK, Spec, parse

Bytes = npt.NDArray[np.uint8]
SMALL = 32
"""Weights a block of the types without super-blocks."""


@dataclass(frozen=True)
class Parts:
    """What a type lays out, of all its blocks (or super-blocks).

    Attributes:
        digits: ``(blocks, weights)`` uint8 codes, as the type counts them.
        scale: ``(blocks, 1)`` float16.
        minimum: the same of what minima are multiples of, or the minimum; None without.
        scales: ``(blocks, parts)`` int64 integers of scales; None without super-blocks.
        minima: the same of minima.
    """

    digits: Bytes
    scale: npt.NDArray[np.float16]
    minimum: npt.NDArray[np.float16] | None = None
    scales: npt.NDArray[np.int64] | None = None
    minima: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Kind:
    """A block type of llama.cpp.

    Attributes:
        name: as there, for example "Q4_0".
        spec: with the same values.
        lay_out: parts to ``(blocks, nbytes)``.
        nbytes: of a block of :attr:`weights`.
    """

    name: str
    spec: Spec
    lay_out: Callable[[Parts], Bytes]
    nbytes: int

    @property
    def weights(self) -> int:
        """Weights in a block, which rows are whole numbers of."""
        return SUPER_BLOCK if self.spec.scale_bits else SMALL

    def row_bytes(self, width: int) -> int:
        """Bytes of a row."""
        return width // self.weights * self.nbytes


def _raw(values: npt.NDArray[np.float16] | None) -> Bytes:
    assert values is not None
    return np.ascontiguousarray(values).view(np.uint8)


def _low(digits: Bytes, bits: int) -> Bytes:
    return digits & np.uint8(2**bits - 1)


def _high(digits: Bytes, bits: int) -> Bytes:
    """What is above the lowest bits."""
    return digits >> np.uint8(bits)


def _shifted(digits: Bytes, bits: int, run: int) -> Bytes:
    """Runs of digits, one above the other in the bits of ``run`` bytes, ``8 / bits`` runs in each."""
    per = 8 // bits
    runs = digits.reshape(len(digits), -1, per, run).astype(np.uint16)
    shifts = np.arange(0, 8, bits, dtype=np.uint16)[:, None]
    out: Bytes = np.bitwise_or.reduce(runs << shifts, axis=2).astype(np.uint8).reshape(len(digits), -1)
    return out


def _six_bits(p: Parts) -> Bytes:
    """Eight scales and eight minima of 6 bits in 12 bytes."""
    assert p.scales is not None
    assert p.minima is not None
    low_s, high_s, low_m, high_m = p.scales[:, :4], p.scales[:, 4:], p.minima[:, :4], p.minima[:, 4:]
    first, second = low_s | (high_s >> 4) << 6, low_m | (high_m >> 4) << 6
    third = (high_s & 15) | (high_m & 15) << 4
    return np.concatenate([first, second, third], axis=1).astype(np.uint8)


def _front(p: Parts) -> list[Bytes]:
    """The scale, and what minima are multiples of where there are some."""
    return [_raw(p.scale)] if p.minimum is None else [_raw(p.scale), _raw(p.minimum)]


def _four_bits(p: Parts) -> Bytes:
    return np.concatenate([*_front(p), _shifted(p.digits, 4, 16)], axis=1)


def _five_bits(p: Parts) -> Bytes:
    fifth = np.packbits(_high(p.digits, 4), axis=1, bitorder="little")
    return np.concatenate([*_front(p), fifth, _shifted(_low(p.digits, 4), 4, 16)], axis=1)


def _q8_0(p: Parts) -> Bytes:
    return np.concatenate([_raw(p.scale), p.digits ^ 128], axis=1)  # 128 less, in two's complement


def _q2_k(p: Parts) -> Bytes:
    assert p.scales is not None
    assert p.minima is not None
    scales = (p.scales | p.minima << 4).astype(np.uint8)
    parts = [scales, _shifted(p.digits, 2, 32), _raw(p.scale), _raw(p.minimum)]
    return np.concatenate(parts, axis=1)


def _q3_k(p: Parts) -> Bytes:
    assert p.scales is not None
    raised = (p.scales + 32).astype(np.uint8)
    low = (raised[:, :8] & 15) | (raised[:, 8:] & 15) << 4
    high = _shifted(_high(raised, 4), 2, 4)
    parts = [
        _shifted(_high(p.digits, 2), 1, 32),
        _shifted(_low(p.digits, 2), 2, 32),
        low,
        high,
        _raw(p.scale),
    ]
    return np.concatenate(parts, axis=1)


def _q4_k(p: Parts) -> Bytes:
    return np.concatenate([*_front(p), _six_bits(p), _shifted(p.digits, 4, 32)], axis=1)


def _q5_k(p: Parts) -> Bytes:
    codes = [_shifted(_high(p.digits, 4), 1, 32), _shifted(_low(p.digits, 4), 4, 32)]
    return np.concatenate([*_front(p), _six_bits(p), *codes], axis=1)


def _q6_k(p: Parts) -> Bytes:
    assert p.scales is not None
    codes = [_shifted(_low(p.digits, 4), 4, 64), _shifted(_high(p.digits, 4), 2, 32)]
    return np.concatenate([*codes, p.scales.astype(np.int8).view(np.uint8), _raw(p.scale)], axis=1)


def _iq4_xs(p: Parts) -> Bytes:
    assert p.scales is not None
    raised = (p.scales + 32).astype(np.uint16)
    high = np.bitwise_or.reduce((raised >> 4) << np.arange(0, 16, 2, dtype=np.uint16), axis=1)
    low = _shifted((raised & 15).astype(np.uint8), 4, 1)
    codes = _shifted(p.digits, 4, 16)
    return np.concatenate([_raw(p.scale), high.astype("<u2")[:, None].view(np.uint8), low, codes], axis=1)


KINDS: Mapping[Spec, Kind] = {
    parse(spec): Kind(name, parse(spec), lay_out, nbytes)
    for name, spec, lay_out, nbytes in (
        ("Q2_K", "int2:16+zp+sb4+min", _q2_k, 84),
        ("Q3_K", "sint3:16+sb6", _q3_k, 110),
        ("IQ4_XS", "sint4:32+sb6+nl", _iq4_xs, 136),
        ("Q4_0", "sint4:32", _four_bits, 18),
        ("IQ4_NL", "sint4:32+nl", _four_bits, 18),
        ("Q4_K", "int4:32+zp+sb6+min", _q4_k, 144),
        ("Q4_1", "int4:32+zp+min", _four_bits, 20),
        ("Q5_0", "sint5:32", _five_bits, 22),
        ("Q5_K", "int5:32+zp+sb6+min", _q5_k, 176),
        ("Q5_1", "int5:32+zp+min", _five_bits, 24),
        ("Q6_K", "sint6:16+sb8", _q6_k, 210),
        ("Q8_0", "sint8:32", _q8_0, 34),
    )
}
"""Block types by the spec that has their values."""


def kind_of(spec: Spec, width: int) -> Kind | None:
    """The type that holds rows of a spec as they are; None where there is none."""
    kind = KINDS.get(spec)
    return kind if kind is not None and width % kind.weights == 0 else None


def blocks_of(packed: Packed) -> tuple[Bytes, float]:
    """A weight as its type has it.

    Args:
        packed: ``(*lead, rows, in_features)`` of a spec in :data:`KINDS`.

    Returns:
        ``(*lead, rows, row_bytes)`` uint8, and how much of a scale is lost at most, relative to the largest
        of the weight: what a float16 below 6e-5 cannot hold.
    """
    kind = KINDS[packed.spec]
    planes = packed.planes.flatten(0, -2)
    codes = bit_planes.unpack(planes, packed.in_features, packed.spec.bits).numpy()
    spec = packed.spec
    digits = codes if spec.has_zero_point else (2**spec.bits - 1) - codes
    parts, lost = _parts(digits.astype(np.uint8).reshape(-1, kind.weights), packed)
    laid_out = kind.lay_out(parts)
    assert laid_out.shape == (len(parts.digits), kind.nbytes)
    return laid_out.reshape(*packed.planes.shape[:-1], -1), lost


def _parts(digits: Bytes, packed: Packed) -> tuple[Parts, float]:
    spec = packed.spec
    scales = packed.scales.flatten(0, -2)
    zeros = None if packed.zeros is None else packed.zeros.flatten(0, -2)
    unit = 2.0 ** -level_bits(spec)
    if not spec.scale_bits:
        scale, lost = _halves(scales.double().flatten() * (unit if zeros is not None else -unit))
        if zeros is None:
            return Parts(digits, scale), lost
        minimum, more = _halves(zeros.double().flatten())
        return Parts(digits, scale, minimum), max(lost, more)
    constants, integers = constants_of(scales, spec)
    scale, lost = _halves(constants.flatten() * unit)
    integers = integers.flatten(0, 1)
    if zeros is None:
        return Parts(digits, scale, scales=-integers.numpy()), lost
    constants, falls = constants_of(zeros, spec)
    minimum, more = _halves(constants.flatten())
    found = Parts(digits, scale, minimum, integers.numpy(), -falls.flatten(0, 1).numpy())
    return found, max(lost, more)


def _halves(values: Tensor) -> tuple[npt.NDArray[np.float16], float]:
    """``(n, 1)`` float16, and the largest error over the largest value."""
    halves = values.to(torch.float16)
    largest = float(values.abs().max())
    lost = float((halves.double() - values).abs().max()) / largest if largest else 0.0
    return halves.numpy()[:, None], lost
