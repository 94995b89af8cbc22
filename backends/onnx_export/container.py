"""Which integers stand for a codebook in ONNX Runtime's packed matmul, and how exact they are.

before:  codebook[code] * scale                                  2**k free levels
after:   sum over t of (digit[t] - zero[t]) * 2**n[t] * scale / grid    MatMulNBits, 2, 4 or 8 bits a term

The one thing to know: a level becomes the integer ``m`` nearest to ``level * grid``, written as digits of
2, 4 or 8 bits, the highest first; each digit is one packed matmul. The narrowest digits are taken that
are exact, or whose rounding costs at most ``LIMIT`` of the quantization error itself.

ONNX Runtime's 2- and 8-bit kernels dequantize the whole matrix on every call unless activations are
rounded to 8 bits too; so 32-bit activations get terms of 4 bits alone.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from kbitc.formats import bit_planes
from kbitc.formats.datatypes import Floats
from kbitc.formats.packed import Packed
from kbitc.formats.scales import effective_scales

ACTIVATIONS = ("fp32", "int8", "split")
LIMIT = 0.02  # of the quantization error as estimated here; 0.03 is promised of the real one
EXACT = 2e-7  # of the largest level: what float32 scales round away anyway
SAMPLE = 2**20  # weights that the histogram of codes looks at
GRIDS = 1024  # candidates between half of the finest grid and the finest

_WIDTHS: dict[str, tuple[tuple[int, ...], ...]] = {
    "fp32": ((4,), (4, 4), (4, 4, 4), (4, 4, 4, 4)),
    "int8": ((2,), (4,), (8,), (8, 2), (8, 4), (8, 8)),
    "split": ((2,), (4,), (8,), (8, 2), (8, 4), (8, 8)),
}


@dataclass(frozen=True)
class Container:
    """How the codes of one weight are written as digits.

    Attributes:
        widths: bits of each term, the highest digit first.
        grid: ``codebook[code]`` is about ``(levels[code] + shift) / grid``; below 0 where scales change sign.
        levels: ``(2**k,)`` integers.
        shift: 0.5 where a zero point can take up half a step, else 0.
        error: root mean square of what the grid rounds away, relative to the weight's.
        share: the same, relative to the estimated quantization error.
    """

    widths: tuple[int, ...]
    grid: float
    levels: tuple[int, ...]
    shift: float
    error: float
    share: float

    @property
    def is_exact(self) -> bool:
        """True if nothing but float32 rounding is lost."""
        return self.error == 0.0

    @property
    def name(self) -> str:
        """For reports: ``MatMulNBits 4+4``."""
        return "MatMulNBits " + "+".join(map(str, self.widths))

    def zero(self, term: int) -> int:
        """The zero point of a term: ONNX Runtime's default, but 0 for the low digits of 4-bit terms."""
        return 0 if term and set(self.widths) == {4} else 1 << (self.widths[term] - 1)

    def low_bits(self, term: int) -> int:
        """Bits of the digits below a term's."""
        return sum(self.widths[term + 1 :])

    def digits(self, term: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """``(2**k,)`` uint8: each code's digit in a term."""
        whole = np.asarray(self.levels) + _bias(self.widths)
        return ((whole >> self.low_bits(term)) & ((1 << self.widths[term]) - 1)).astype(np.uint8)


def _bias(widths: tuple[int, ...]) -> int:
    """What is added to a level so that its digits are not negative."""
    draft = Container(widths, 1.0, (), 0.0, 0.0, 0.0)
    return sum(draft.zero(t) << draft.low_bits(t) for t in range(len(widths)))


def choose_container(packed: Packed, activations: str) -> Container:
    """The narrowest container of a packed weight that is accurate enough.

    Args:
        packed: any format.
        activations: one of ``ACTIVATIONS``.
    """
    codebook, has_zeros = packed.codebook.double().numpy(), packed.zeros is not None
    return container_of(codebook, code_mass(packed), packed.spec.block, activations, has_zeros=has_zeros)


def container_of(
    codebook: Floats, mass: Floats, block: int, activations: str, *, has_zeros: bool
) -> Container:
    """The narrowest container that is accurate enough.

    Args:
        codebook: ``(2**k,)``, sorted.
        mass: the same shape: share of the weight's energy that each code scales.
        block: weights a scale.
        activations: one of ``ACTIVATIONS``.
        has_zeros: blocks have zero points, which can take up half a step.
    """
    shifts = (0.0, 0.5) if has_zeros else (0.0,)
    noise = _quantization_noise(codebook, mass, block)
    power = float(mass @ codebook**2)
    best: Container | None = None
    for widths in _WIDTHS[activations]:
        grid, shift, lost = _best_grid(codebook, mass, widths, shifts)
        levels = np.rint(codebook * grid - shift).astype(int)
        share = 0.0 if lost == 0 else math.sqrt(lost / noise) if noise else math.inf
        error = math.sqrt(lost / power) if power else 0.0
        best = Container(widths, grid, tuple(levels.tolist()), shift, error, share)
        if share <= LIMIT:
            break
    assert best is not None
    return best


def code_mass(packed: Packed) -> Floats:
    """Share of the weight's energy that each code scales: ``(2**k,)``, from evenly spaced rows."""
    rows = packed.planes.flatten(0, -2)
    scales = effective_scales(
        packed.scales.flatten(0, -2), packed.scale_codebook, packed.scale_absmax, packed.scale_mean
    )
    step = max(1, rows.shape[0] * packed.in_features // SAMPLE)
    codes = bit_planes.unpack(rows[::step], packed.in_features, packed.spec.bits)
    block = packed.spec.block
    energy = scales[::step].square().repeat_interleave(block, dim=-1)[:, : packed.in_features]
    counted = torch.bincount(
        codes.flatten().int(), weights=energy.flatten().double(), minlength=packed.codebook.numel()
    )
    mass: Floats = counted[: packed.codebook.numel()].numpy()
    total = mass.sum()
    return mass / total if total else mass


def _quantization_noise(codebook: Floats, mass: Floats, block: int) -> float:
    """Mean square of quantizing, in units of the scale: uniform in each level's cell; absmax is exact."""
    gaps = np.diff(codebook)
    gaps = gaps[gaps > 0]
    if gaps.size == 0:
        return 0.0
    distinct = codebook[: gaps.size + 1]
    low, high = np.concatenate([gaps[:1], gaps]), np.concatenate([gaps, gaps[-1:]])
    cells = (low**3 + high**3) / (12 * (low + high))
    at = np.searchsorted(distinct, codebook).clip(max=gaps.size)
    return float(mass @ cells[at]) * (1 - 1 / max(block, 2))


def _best_grid(
    codebook: Floats, mass: Floats, widths: tuple[int, ...], shifts: tuple[float, ...]
) -> tuple[float, float, float]:
    """Grid, shift and the mean square that is lost: 0 if exact."""
    bias = _bias(widths)
    most, least = (1 << sum(widths)) - 1 - bias, -bias
    high, low = float(codebook.max()), float(codebook.min())
    best: tuple[float, float, float] | None = None
    for shift, sign in itertools.product(shifts, (1, -1)):
        # One level more lies below 0 than above: for a codebook with more above, scales change their sign.
        up, down = (high, low) if sign > 0 else (-low, -high)
        finest = min(
            (most + shift) / up if up > 0 else math.inf, (least + shift) / down if down < 0 else math.inf
        )
        if not math.isfinite(finest):
            finest = 1.0
        exact = np.arange(1, 2 * min(int(finest), GRIDS) + 1) / 2
        for sizes in (exact[exact <= finest * (1 + 1e-9)], np.linspace(finest / 2, finest, GRIDS)):
            grids = sign * sizes
            steps = codebook * grids[:, None] - shift
            gap = (np.rint(steps).clip(least, most) - steps) / grids[:, None]
            is_exact = np.abs(gap).max(axis=1) <= EXACT
            if is_exact.any():
                return float(grids[is_exact.argmax()]), shift, 0.0
            lost = gap**2 @ mass
            at = int(lost.argmin()) if lost.size else -1
            if at >= 0 and (best is None or lost[at] < best[2]):
                best = float(grids[at]), shift, float(lost[at])
    assert best is not None
    return best
