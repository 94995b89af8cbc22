"""Codes of a few rows that lose least in a row's output: error feedback, and coordinate descent after it.

The one thing to know: everything here is of one tile of rows, as ``(in_features, rows)``, so that one input
feature of all rows lies together. Rows know nothing of each other: a tile runs on one core.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kbitc.formats.blocks import inverse_scales
from kbitc.kernels import ops as _ops  # noqa: F401  # registers torch.ops.kbit
from kbitc.kernels.rounding import KEPT, Levels
from kbitc.sensitivity.gram import Gram

STRIP = 128  # columns whose errors are passed on one by one; later ones get them together
PART = 512  # rows of an inverse that are multiplied at a time
EQUATIONS = 1 << 24  # bytes of normal equations that one core has at a time,
LEAST_ROWS = 32  # but of so many rows: fewer are multiplied slowly


@dataclass(frozen=True)
class Damped:
    """What rows that multiply one input are rounded against.

    Attributes:
        inputs: ``(in_features, in_features)`` float32: H. H + l I is nowhere: of wide inputs it is large.
        added: l, a part of the mean of H's diagonal.
        order: ``(in_features,)`` the columns as feedback takes them.
        factor: upper Cholesky factor of (H + l I)^-1, both sides in that order, float32.
    """

    inputs: Tensor
    added: float
    order: Tensor
    factor: Tensor

    @staticmethod
    def of(gram: Gram, damping: float, *, is_ordered: bool = True, last: Tensor | None = None) -> Damped:
        """Of the inputs' moments.

        Args:
            gram: the moments.
            damping: l over the mean of the diagonal.
            is_ordered: columns by falling diagonal; else as they stand.
            last: columns that come after all others.
        """
        added = _added(gram.inputs, damping)
        diagonal = gram.inputs.diagonal().double()
        if last is not None:
            diagonal[last.long()] = -1.0
        if not is_ordered:
            diagonal = torch.where(diagonal < 0, diagonal, 1.0)
        order = torch.sort(diagonal, descending=True, stable=True).indices
        return Damped(gram.inputs, added, order, _inverse_factor(gram.inputs, order, added))

    def times(self, columns: Tensor) -> Tensor:
        """``(H + l I) columns``, of ``(in_features, count)`` float32."""
        return (self.inputs @ columns).add_(columns, alpha=self.added)

    def below(self, columns: Tensor, here: slice) -> Tensor:
        """Rows from ``here.start`` on of ``(H + l I)[:, here] columns[here]``; ``columns`` as in `times`."""
        found = self.inputs[here.start :, here] @ columns[here]
        found[: here.stop - here.start].add_(columns[here], alpha=self.added)
        return found

    def corner(self, here: slice) -> Tensor:
        """``(H + l I)[here, here]``."""
        return _plus(self.inputs[here, here].clone(), self.added)

    def solved(self, rows: Tensor) -> Tensor:
        """``rows (H + l I)^-1``, to what the factor's float32 leaves of it.

        Args:
            rows: ``(count, in_features)`` float32.
        """
        found = torch.empty_like(rows)
        found[:, self.order] = rows[:, self.order] @ self.factor.mT @ self.factor
        return found


def _added(inputs: Tensor, damping: float) -> float:
    """l: at least what keeps H + l I invertible."""
    mean = float(inputs.diagonal().double().mean())
    return damping * mean if mean > 0 else 1.0


def _plus(moments: Tensor, added: float) -> Tensor:
    """In place: rounded once, after the sum."""
    moments.diagonal().copy_(moments.diagonal().double() + added)
    return moments


def _cholesky(symmetric: Tensor) -> Tensor:
    """Lower R with ``R R^T = symmetric``, in its memory: of wide inputs one such matrix is large."""
    by_columns = symmetric.mT  # the same matrix, as LAPACK wants it, which spares a copy
    info = torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(by_columns, check_errors=True, out=(by_columns, info))
    return by_columns


def _inverse_factor(inputs: Tensor, order: Tensor, added: float) -> Tensor:
    """Upper U, float32, with ``U^T U = (H + added I)^-1``, both sides in an order.

    With both sides turned around as well, H + added I is R R^T for a lower R, and U is R^-1 turned around.
    """
    backwards = order.flip(0)
    lower = _cholesky(_plus(inputs[backwards[:, None], backwards].double(), added))
    _invert(lower)
    width = len(lower)
    factor = torch.empty(width, width)
    for top in range(0, width, PART):
        part = lower[top : top + PART].flip(0, 1)
        factor[width - top - len(part) : width - top] = part
    return factor


def _invert(lower: Tensor) -> None:
    """The inverse of a lower matrix, in place, from its last strip of columns to its first."""
    width = len(lower)
    for start in reversed(range(0, width, STRIP)):
        stop = min(start + STRIP, width)
        unit = torch.eye(stop - start, dtype=lower.dtype)
        own = torch.linalg.solve_triangular(lower[start:stop, start:stop], unit, upper=False)
        below = lower[stop:, start:stop] @ -own
        lower[start:stop, start:stop] = own
        for top in range(stop, width, PART):  # right of its diagonal an inverted part is zero
            bottom = min(top + PART, width)
            lower[top:bottom, start:stop] = lower[top:bottom, stop:bottom] @ below[: bottom - stop]


@dataclass(frozen=True)
class Grid:
    """The values that codes can give in one tile.

    Attributes:
        codebook: ``(levels,)`` float32, sorted.
        bounds: between its levels, see `kbitc.formats.encoder`.
        block: weights a scale.
        scales: ``(blocks, rows)`` float32, as reading gives them.
        zeros: the same; None without.
        kept: columns that are kept at 16 bits, int64; None for none.
        kept_dtype: of those.
    """

    codebook: Tensor
    bounds: Tensor
    block: int
    scales: Tensor
    zeros: Tensor | None = None
    kept: Tensor | None = None
    kept_dtype: torch.dtype = torch.float16

    @cached_property
    def inverse(self) -> Tensor:
        """``(blocks, rows)``: of the scales; 0 of 0."""
        return inverse_scales(self.scales)

    def of_columns(self, columns: Tensor) -> Levels:
        """What codes can mean in some columns, int64."""
        blocks = columns // self.block
        if self.kept is not None:
            blocks = torch.where(torch.isin(columns, self.kept), KEPT, blocks)
        return Levels(
            blocks, self.scales, self.inverse, self.zeros, self.codebook, self.bounds, self.kept_dtype
        )

    def levels(self, codes: Tensor) -> Tensor:
        """``(in_features, rows)``: of the codes, before scale and zero; 0 in kept columns."""
        levels = self.codebook.index_select(0, codes.flatten().int()).view(codes.shape)
        if self.kept is not None:
            levels[self.kept] = 0.0
        return levels

    def spread(self, of_blocks: Tensor, width: int) -> Tensor:
        """``(blocks, rows)`` as ``(in_features, rows)``."""
        return of_blocks.repeat_interleave(self.block, dim=0)[:width]


@dataclass(frozen=True)
class Rounded:
    """A tile that has codes.

    Attributes:
        codes: ``(in_features, rows)`` uint8; 0 in kept columns.
        values: the same in float32, as reading gives them.
    """

    codes: Tensor
    values: Tensor


def feed_back(target: Tensor, against: Damped, grid: Grid) -> Rounded:
    """Codes column by column, each column's error passed on to later ones.

    Args:
        target: ``(in_features, rows)`` float32.
        against: the moments.
        grid: of the tile.
    """
    factor, rest = against.factor, target[against.order]
    codes, values = torch.empty(target.shape, dtype=torch.uint8), torch.empty_like(target)
    for start in range(0, len(target), STRIP):
        stop = min(start + STRIP, len(target))
        columns = against.order[start:stop]
        codes[columns], values[columns], errors = torch.ops.kbit.feed_back_strip(
            rest[start:stop], factor[start:stop, start:stop], *grid.of_columns(columns)
        )
        rest[stop:].addmm_(factor[start:stop, stop:].mT, errors, alpha=-1.0)
    return Rounded(codes, values)


def descend(target: Tensor, against: Damped, grid: Grid, start: Rounded) -> Rounded:
    """One round of coordinate descent: every code in turn takes the best value for all others as they are.

    The loss ``(q - target) H (q - target)^T`` of a row never rises but by rounding.
    """
    codes, values = torch.empty_like(start.codes), torch.empty_like(start.values)
    slope = against.times(start.values - target)
    for first in range(0, len(target), STRIP):
        stop = min(first + STRIP, len(target))
        here, levels = slice(first, stop), grid.of_columns(torch.arange(first, stop))
        codes[here], values[here], steps = torch.ops.kbit.descend_strip(
            slope[here], start.values[here], against.corner(here), *levels
        )
        slope[stop:].addmm_(against.inputs[stop:, here], steps)
    return Rounded(codes, values)


def refitted(
    target: Tensor,
    against: Damped,
    grid: Grid,
    rounded: Rounded,
    ridge: float,
    drawn: Tensor | None = None,
) -> Grid:
    """Scales and zeros that lose least for the codes as they are: each row's normal equations.

    Args:
        target: ``(in_features, rows)``.
        against: the moments.
        grid: with the scales that a ridge draws to.
        rounded: the codes.
        ridge: how much, relative to the equations' diagonal.
        drawn: the moments times the target, where that is known already.
    """
    drawn = against.times(target) if drawn is None else drawn
    unknowns = len(grid.scales) * (1 if grid.zeros is None else 2)
    most = max(LEAST_ROWS, EQUATIONS // (8 * unknowns * unknowns))
    parts = []
    for first in range(0, target.shape[1], most):
        own = slice(first, first + most)
        of_rows = None if grid.zeros is None else grid.zeros[:, own]
        some = replace(grid, scales=grid.scales[:, own], zeros=of_rows)
        codes = Rounded(rounded.codes[:, own], rounded.values[:, own])
        parts.append(_refitted(against, some, codes, ridge, drawn[:, own]))
    scales = torch.cat([part.scales for part in parts], dim=1)
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return replace(grid, scales=scales, zeros=torch.cat(zeros, dim=1) if zeros else None)


def _refitted(against: Damped, grid: Grid, rounded: Rounded, ridge: float, drawn: Tensor) -> Grid:
    """Of a few rows, whose equations are in memory together."""
    levels, block = grid.levels(rounded.codes), grid.block
    width, rows = levels.shape
    blocks = grid.scales.shape[0]
    parts = [levels]
    if grid.zeros is not None:
        ones = torch.ones_like(levels)
        if grid.kept is not None:
            ones[grid.kept] = 0.0
        parts.append(ones)
    if grid.kept is not None:
        own = rounded.values[grid.kept]
        drawn = drawn - against.inputs[:, grid.kept] @ own
        drawn[grid.kept] -= against.added * own
    right = torch.cat([_by_block(part * drawn, block) for part in parts]).double()
    matrix = torch.empty(rows, len(parts), blocks, len(parts), blocks, dtype=torch.float64)
    for b in range(blocks):  # the blocks from b on, and the others by symmetry
        later, here = slice(b * block, width), slice(b * block, min((b + 1) * block, width))
        for i, part in enumerate(parts):
            pushed = against.below(part, here)
            for j, other in enumerate(parts):
                rising = _by_block(other[later] * pushed, block).mT.double()
                matrix[:, j, b:, i, b] = rising
                matrix[:, i, b, j, b:] = rising
    matrix = matrix.view(rows, len(right), len(right))
    old = grid.scales if grid.zeros is None else torch.cat([grid.scales, grid.zeros])
    weight = matrix.diagonal(dim1=1, dim2=2) * ridge + 1e-12
    matrix.diagonal(dim1=1, dim2=2).add_(weight)
    solved, _ = torch.linalg.solve_ex(matrix, right.mT + weight * old.mT.double())
    new = solved.mT.float()
    new[:blocks].masked_fill_(grid.scales == 0, 0.0)
    keeps_sign = (new[:blocks] * grid.scales > 0) | (grid.scales == 0)
    new = torch.where(keeps_sign.all(0) & new.isfinite().all(0), new, old)
    return replace(grid, scales=new[:blocks], zeros=None if grid.zeros is None else new[blocks:])


def _by_block(values: Tensor, block: int) -> Tensor:
    """Sums over each block of ``(in_features, rows)``."""
    short = -len(values) % block
    padded = torch.nn.functional.pad(values, (0, 0, 0, short)) if short else values
    sums: Tensor = padded.unflatten(0, (-1, block)).sum(1)
    return sums
