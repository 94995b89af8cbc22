"""Data types: one function a family, each giving a sorted codebook of at most 2**bits values in [-1, 1].

The one thing to know: a data type is its codebook. Packing, kernels and artifacts take the codebook
as a tensor and never ask for a family's name, so a new family is one function in this file.
The papers' constructions: *The case for 4-bit precision* (int, fp, dynamic, quantile), QLoRA (nf),
BOF4 (bof); where paper and released code disagree the published variant is named ``paper``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri

from kbitc.errors import KbitcError, UsageError, did_you_mean
from kbitc.lazy import load_point

Floats: TypeAlias = npt.NDArray[np.float64]

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class Blocks:
    """What a fitted family may look at: a tensor's values, and its blocks after normalisation.

    Attributes:
        values: 1-D sample of the tensor's raw values, in row-major order.
        normalized: 1-D block-normalised values, in [-1, 1].
        weight: 1-D squared scale of the block of each normalised value.
    """

    values: Floats
    normalized: Floats
    weight: Floats


@dataclass(frozen=True)
class CodebookRequest:
    """Everything that a family may depend on.

    Attributes:
        bits: 2 to 8.
        exponent: exponent bits, for ``fp`` alone; None takes the family's default.
        block: block size, in weights.
        is_centered: True when each block is centred first (``+zp``), so that both -1 and 1 occur.
        variant: "" for the sound default, or the name of a published one.
        blocks: the tensor, for a fitted family.
    """

    bits: int
    exponent: int | None = None
    block: int = 64
    is_centered: bool = False
    variant: str = ""
    blocks: Blocks | None = None


Builder: TypeAlias = Callable[[CodebookRequest], Floats]


@dataclass(frozen=True)
class Variant:
    """A published construction of a family, and where there is one.

    Attributes:
        bits: that it exists at; () for all.
        is_centered: with ``+zp`` alone, or only without; None for both.
        is_from_minimum: the zero point is a block's minimum, not its middle: levels start at 0.
        has_integer_zeros: and that is a whole number of steps below 0 (`kbitc.formats.scale_grid`).
    """

    bits: tuple[int, ...] = ()
    is_centered: bool | None = None
    is_from_minimum: bool = False
    has_integer_zeros: bool = False


@dataclass(frozen=True)
class Family:
    """A named construction of codebooks.

    Attributes:
        build: request to codebook values, in any order, duplicates allowed.
        is_fitted: the codebook depends on the tensor and is stored with it.
        is_signed: blocks are divided by the element of largest magnitude *with its sign*.
        uses_block: the codebook depends on the block size.
        uses_center: the codebook is another one under ``+zp``.
        variants: published constructions that ``+name`` selects, by name.
        candidates: bits to the block sizes that a bit budget may spend it at; by default at none.
        centered_candidates: the same with ``+zp``.
        summary: one line for tables.
    """

    name: str
    build: Builder
    is_fitted: bool = False
    is_signed: bool = False
    uses_block: bool = False
    uses_center: bool = False
    variants: Mapping[str, Variant] = field(default_factory=dict)
    candidates: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    centered_candidates: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    summary: str = ""


FAMILIES: dict[str, Family] = {}
ENTRY_POINTS = "kbitc.datatypes"
"""The entry-point group of families in other packages; each names what :func:`family` decorates."""

# Block sizes of a budget's candidates. Where a type leads at all it does so in blocks of 32 to 256 (PAPERS
# sections 7 and 8); between 3.25 and 4.25 bits there is little else, so 2 and 3 bits also take blocks of 16.
BLOCKS = (32, 64, 128, 256)
FINE_BLOCKS = (16, *BLOCKS)


def family(name: str, **traits: Any) -> Callable[[Builder], Builder]:
    """Register the decorated function as a family; its first docstring line becomes the summary."""

    def register(build: Builder) -> Builder:
        summary = (build.__doc__ or "").strip().splitlines()[0]
        FAMILIES[name] = Family(name, build, summary=summary, **traits)
        return build

    return register


@functools.cache
def families() -> Mapping[str, Family]:
    """Every family by name: those of this file, then those that installed packages offer.

    Raises:
        KbitcError: an entry point of the group ``kbitc.datatypes`` cannot be loaded, or registers no family.
    """
    for point in entry_points(group=ENTRY_POINTS):
        load_point("data type", point, KbitcError)
        if point.name not in FAMILIES:
            raise KbitcError(
                f"the data type '{point.name}', {point.value}, registers no family of that name; "
                f'decorate its function with @family("{point.name}")'
            )
    return FAMILIES


def find_family(name: str) -> Family:
    """The family of this name.

    Raises:
        UsageError: no such family; names the nearest one.
    """
    if name not in FAMILIES and name not in families():
        raise UsageError(did_you_mean("data type", name, families()))
    return FAMILIES[name]


@family(
    "int",
    uses_center=True,
    variants={
        "min": Variant(is_centered=True, is_from_minimum=True),
        "iz": Variant(bits=(2, 3, 4), is_centered=True, is_from_minimum=True, has_integer_zeros=True),
    },
    candidates=dict.fromkeys(range(2, 9), BLOCKS),
    centered_candidates=dict.fromkeys((2, 3, 4), (32, 64, 128)),
)
def integer(request: CodebookRequest) -> Floats:
    """Evenly spaced: symmetric 2^k - 1 levels; with +zp all 2^k between minimum and maximum.

    ``min`` counts from the minimum, ``0`` to ``2^k - 1`` over ``2^k`` (llama.cpp's Q4_1, and its K-quants
    with minima), so that a power of two lies between a scale here and one there. ``iz`` does, too, and 0 is
    one of the levels: the minimum is a whole number of steps below it (compressed-tensors).

    >>> integer(CodebookRequest(bits=3)).round(3).tolist()
    [-1.0, -0.667, -0.333, 0.0, 0.333, 0.667, 1.0]
    """
    if request.variant in ("min", "iz"):
        return np.asarray(np.arange(2**request.bits) / 2**request.bits)
    levels = 2**request.bits - (0 if request.is_centered else 1)
    return np.linspace(-1.0, 1.0, levels)


NON_LINEAR = (-113, -89, -69, -53, -38, -25, -13, -1, 10, 22, 35, 49, 65, 83, 104, 127)
"""llama.cpp's IQ4_NL over 128, with the sign turned."""


@family("sint", is_signed=True, uses_center=True, variants={"nl": Variant(bits=(4,), is_centered=False)})
def signed_integer(request: CodebookRequest) -> Floats:
    """Evenly spaced, all 2^k levels: a block's largest magnitude is exact, whatever its sign.

    What 4-bit matmuls of other programs hold (ONNX Runtime's MatMulNBits, llama.cpp's Q4_0): -8 to 7, where
    a negative scale turns the longer side to where it is needed. With +zp the same as int. ``nl`` has
    llama.cpp's 16 unevenly spaced levels (IQ4_NL).

    >>> (signed_integer(CodebookRequest(bits=3)) * 4).tolist()
    [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0]
    """
    if request.is_centered:
        return integer(request)
    if request.variant == "nl":
        return np.asarray(NON_LINEAR) / 128
    half = 2 ** (request.bits - 1)
    return np.asarray(np.arange(1 - half, half + 1) / half)


# Exponent bits: the best of the k-bit paper's appendix C.4, and those of its main results.
BEST_EXPONENT = {2: 1, 3: 2, 4: 2, 5: 3, 6: 3, 7: 4, 8: 4}
PAPER_EXPONENT = {2: 1, 3: 2, 4: 3, 5: 3, 6: 3, 7: 3, 8: 3}


@family("fp", variants={"paper": Variant(), "half": Variant()}, candidates=dict.fromkeys(range(3, 8), BLOCKS))
def floating(request: CodebookRequest) -> Floats:
    """Sign, E exponent and M mantissa bits, IEEE sub-normals, no inf or nan, largest value 1.

    ``paper`` is appendix A of the k-bit paper (also bitsandbytes' FP4 table) and its main results'
    exponent widths; ``half`` is bitsandbytes' ``create_fp8_map``. They differ in sub-normals only.

    >>> (floating(CodebookRequest(bits=4, exponent=2)) * 6).tolist()[:8]
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    default = PAPER_EXPONENT if request.variant == "paper" else BEST_EXPONENT
    exponent = request.exponent or default[request.bits]
    mantissa = request.bits - 1 - exponent
    fractions = np.arange(2**mantissa) / 2**mantissa
    exponents = np.arange(1, 2**exponent)
    # All three variants share the normals up to a factor; where the sub-normals stand differs.
    normal = ((1 + fractions)[None, :] * 2.0 ** exponents[:, None]).ravel()
    subnormal_exponent = {"": 1, "half": -1, "paper": -3}[request.variant]
    positive = np.concatenate([fractions * 2.0**subnormal_exponent, normal])
    positive /= positive.max()
    return np.concatenate([positive, -positive])


@family("nf", candidates=dict.fromkeys((2, 3), FINE_BLOCKS) | dict.fromkeys((4, 5, 6), BLOCKS))
def normal_float(request: CodebookRequest) -> Floats:
    """NormalFloat of QLoRA: quantiles of N(0, 1), one exact zero, one level more above it.

    ``offset = 1 - (1/(2n) + 1/(2(n - 1)))/2`` with n = 2^k gives the published NF4 (PAPERS 2.2).
    """
    n = 2**request.bits
    offset = 1 - (1 / (2 * n) + 1 / (2 * (n - 1))) / 2
    positive = ndtri(np.linspace(offset, 0.5, n // 2 + 1)[:-1])
    negative = -ndtri(np.linspace(offset, 0.5, n // 2)[:-1])
    values = np.concatenate([negative, [0.0], positive])
    return np.asarray(values / np.abs(values).max())


@family("dynamic", candidates={4: BLOCKS})
def dynamic_exponent(request: CodebookRequest) -> Floats:
    """Dynamic tree: zero bits in front set a decimal exponent, the rest is a linear fraction.

    Decade i of k - 1 holds 2^i midpoints of equal parts of [0.1, 1], both signs; plus 0 and +1
    (block-wise 8-bit optimizers, ``create_dynamic_map``).

    >>> dynamic_exponent(CodebookRequest(bits=2)).tolist()
    [-0.55, 0.0, 0.55, 1.0]
    """
    positive = decades(request.bits - 1, 1)
    return np.sort(np.concatenate([-positive, [0.0], positive, [1.0]]))


def decades(count: int, fewest: int) -> Floats:
    """Midpoints of equal parts of [0.1, 1]: ``fewest`` in the lowest decade, twice as many in the next."""
    found = []
    for i in range(count):
        edges = np.linspace(0.1, 1.0, fewest * 2**i + 1)
        found.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - (count - 1)))
    return np.concatenate(found)


@family("quantile", is_fitted=True, variants={"paper": Variant()})
def quantile(request: CodebookRequest) -> Floats:
    """Equal-mass levels of the tensor's own block-normalised weights, one of them moved to 0.

    ``paper`` is the released estimator: quantiles of the raw tensor averaged over chunks of 4096,
    2^k - 1 of them, an appended 0, all divided by the largest.
    """
    blocks = _blocks_of(request)
    if request.variant == "paper":
        return _sram_quantiles(blocks.values, 2**request.bits - 1)
    count = 2**request.bits
    levels = np.quantile(blocks.normalized, (np.arange(count) + 0.5) / count)
    levels[np.abs(levels).argmin()] = 0.0
    return np.asarray(levels)


def _sram_quantiles(values: Floats, count: int) -> Floats:
    """Bitsandbytes' SRAM-Quantiles: 256 order statistics a chunk, averaged, ``count`` picked."""
    size = min(4096, values.size)
    chunks = np.sort(values[: values.size // size * size].reshape(-1, size), axis=1)
    position = 1 / 512 + np.arange(256) * (1 - 2 / 512) / 255
    estimate = chunks[:, np.round(position * (size - 1)).astype(int)].mean(axis=0)
    picked = estimate[np.linspace(0, 255, count).astype(int)]
    levels = np.append(picked, 0.0)
    largest = np.abs(levels).max()
    return levels / largest if largest > 0 else levels


@family(
    "bof",
    is_signed=True,
    uses_block=True,
    uses_center=True,
    candidates=dict.fromkeys((2, 3), FINE_BLOCKS) | dict.fromkeys((4, 5), BLOCKS),
)
def block_optimal_float(request: CodebookRequest) -> Floats:
    """Least squared error for Gaussian blocks after signed-absmax normalisation (BOF4-S, any k).

    Levels 0 and 1 are fixed; with +zp, where both ends of the range occur, -1 too.
    """
    return np.asarray(_block_optimal(request.bits, request.block, request.is_centered))


@functools.lru_cache(maxsize=256)
def _block_optimal(bits: int, block: int, is_centered: bool) -> tuple[float, ...]:
    """Lloyd's iteration on the exact density of a block's other values, weighted by scale squared."""
    fixed = (-1.0, 0.0, 1.0) if is_centered else (0.0, 1.0)
    # A block of one value holds only its maximum: any level but 1 is unused.
    return tuple(_lloyd(*_block_density(max(block, 2)), 2**bits, fixed))


@functools.lru_cache(maxsize=64)
def _block_density(size: int) -> tuple[Floats, Floats]:
    """``(x, density)`` of a normal block's values over its absmax, on a grid over [-1, 1]."""
    x = np.linspace(0.0, 1.0, 4097)
    # The largest magnitude m of B normals: density 2B phi(m) (2 Phi(m) - 1)^(B - 1).
    m = np.linspace(1e-3, 8.0, 801)
    inside = 2 * ndtr(m) - 1
    log_phi = -(m**2) / 2 - np.log(np.sqrt(2 * np.pi))
    log_density = np.log(size) + log_phi + (size - 2) * np.log(inside)
    weights = m**3 * np.exp(log_density)
    density = weights @ np.exp(-0.5 * np.square(np.multiply.outer(m, x)))
    return np.concatenate([-x[:0:-1], x]), np.concatenate([density[:0:-1], density])


@family("learned", is_fitted=True, candidates=dict.fromkeys((2, 3), FINE_BLOCKS) | {4: BLOCKS})
def learned(request: CodebookRequest) -> Floats:
    """Codebook fitted to the tensor: Lloyd-Max on its blocks, weighted by squared scale."""
    blocks = _blocks_of(request)
    edges = np.linspace(-1.0, 1.0, 8194)
    mass, _ = np.histogram(blocks.normalized, bins=edges, weights=blocks.weight)
    centers = (edges[:-1] + edges[1:]) / 2
    return _lloyd(centers, mass, 2**request.bits, fixed=(0.0,))


def _blocks_of(request: CodebookRequest) -> Blocks:
    if request.blocks is None:
        raise UsageError("this data type is fitted to a tensor: pass the tensor, not the type alone")
    return request.blocks


def _lloyd(x: Floats, density: Floats, count: int, fixed: tuple[float, ...]) -> Floats:
    """Codebook of ``count`` levels with least squared error; ``fixed`` levels do not move."""
    total = density.sum()
    if total <= 0:
        return np.asarray(fixed)
    mass = np.concatenate([[0.0], np.cumsum(density)]) / total
    moment = np.concatenate([[0.0], np.cumsum(density * x)]) / total
    step = x[1] - x[0]
    edges = np.concatenate([[x[0] - step / 2], x + step / 2])
    # Panter-Dite: the best levels have density proportional to the cube root of the weights'.
    cubed = np.concatenate([[0.0], np.cumsum(np.cbrt(density))])
    levels = np.interp((np.arange(count) + 0.5) / count * cubed[-1], cubed, edges)
    for value in fixed:
        # Rounded, so that of two levels equally far from 0 the lower one moves on every machine.
        levels[np.round(np.abs(levels - value), 6).argmin()] = value
    held = np.isin(levels, fixed)
    bounds = np.concatenate([edges[:1], levels[1:], edges[-1:]])
    for _ in range(4000):  # of a few microseconds a call: numpy's wrappers in Python would take half of them
        bounds[1:-1] = (levels[1:] + levels[:-1]) / 2
        below, moment_below = np.interp(bounds, edges, mass), np.interp(bounds, edges, moment)
        cell_mass, cell_moment = below[1:] - below[:-1], moment_below[1:] - moment_below[:-1]
        best = np.divide(cell_moment, cell_mass, out=levels.copy(), where=cell_mass > 1e-15)
        moved = np.where(held, levels, np.minimum(np.maximum(best, -1.0), 1.0))
        if np.abs(moved - levels).max() < 1e-9:
            break
        levels = moved
    return np.asarray(levels)


def codebook(name: str, request: CodebookRequest) -> Floats:
    """The family's codebook: sorted, distinct in float32, at most 2**bits values in [-1, 1].

    Args:
        name: a registered family.
        request: bits and whatever else the family depends on.

    Returns:
        1-D float64 array whose values are exact float32 numbers.
    """
    values = np.asarray(find_family(name).build(request), dtype=np.float32)
    # + 0.0 turns -0.0 into 0.0, so that a sign of zero never splits a level.
    distinct = np.unique(values + np.float32(0.0))
    return distinct.astype(np.float64)
