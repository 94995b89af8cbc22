"""Codes of a few rows that lose least in a row's output: error feedback, and coordinate descent after it.

The one thing to know: everything here is of one tile of rows, as ``(in_features, rows)``, so that one input
feature of all rows lies together. Rows know nothing of each other: a tile runs on one core.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kbitc.formats.encoder import Encoder
from kbitc.sensitivity.gram import Gram

STRIP = 128  # columns whose errors are passed on one by one; later ones get them together


@dataclass(frozen=True)
class Damped:
    """What rows that multiply one input are rounded against.

    Attributes:
        moments: ``(in_features, in_features)`` float32: H + l I, l a part of the mean of H's diagonal.
        order: ``(in_features,)`` the columns as feedback takes them.
        factor: upper Cholesky factor of the inverse of ``moments``, both sides in that order, float32.
    """

    moments: Tensor
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
        moments = damped(gram.inputs, damping)
        diagonal = moments.diagonal().clone()
        if last is not None:
            diagonal[last.long()] = -1.0
        if not is_ordered:
            diagonal = torch.where(diagonal < 0, diagonal, 1.0)
        order = torch.sort(diagonal, descending=True, stable=True).indices
        return Damped(moments.float(), order, _inverse_factor(moments[order][:, order]).float())


def damped(inputs: Tensor, damping: float) -> Tensor:
    """H + l I in float64, l at least what keeps it invertible."""
    moments = inputs.double()
    mean = float(moments.diagonal().mean())
    moments = moments.clone()
    moments.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return moments


def _inverse_factor(moments: Tensor) -> Tensor:
    """Upper U with ``U^T U = moments^-1``: the inverse of R where ``moments = R R^T``, R upper."""
    backwards = torch.linalg.cholesky(moments.flip(0, 1))
    upper = backwards.flip(0, 1)
    eye = torch.eye(len(upper), dtype=upper.dtype)
    inverse: Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
    return inverse


@dataclass(frozen=True)
class Grid:
    """The values that codes can give in one tile.

    Attributes:
        codebook: ``(levels,)`` float32, sorted.
        block: weights a scale.
        scales: ``(blocks, rows)`` float32, as reading gives them.
        zeros: the same; None without.
        kept: columns that are kept at 16 bits, int64; None for none.
        kept_dtype: of those.
    """

    codebook: Tensor
    block: int
    scales: Tensor
    zeros: Tensor | None = None
    kept: Tensor | None = None
    kept_dtype: torch.dtype = torch.float16

    @cached_property
    def bounds(self) -> Tensor:
        """Between the codes."""
        return Encoder(self.codebook).bounds

    @cached_property
    def inverse(self) -> Tensor:
        """``(blocks, rows)``: of the scales; 0 of 0."""
        inverse = torch.where(self.scales == 0, 0.0, 1.0 / self.scales)
        return torch.where(inverse.isfinite(), inverse, 0.0)

    def nearest(self, column: int, values: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (int32) and values of what is nearest to ``values``, ``(rows,)``, in an unkept column."""
        at = column // self.block
        centred = values if self.zeros is None else values - self.zeros[at]
        codes = torch.bucketize(centred * self.inverse[at], self.bounds, out_int32=True)
        back = self.codebook.index_select(0, codes).mul_(self.scales[at])
        return codes, back if self.zeros is None else back.add_(self.zeros[at])

    def levels(self, codes: Tensor) -> Tensor:
        """``(in_features, rows)``: of the codes, before scale and zero; 0 in kept columns."""
        levels = self.codebook.index_select(0, codes.flatten().int()).view(codes.shape)
        if self.kept is not None:
            levels[self.kept] = 0.0
        return levels

    def spread(self, of_blocks: Tensor, width: int) -> Tensor:
        """``(blocks, rows)`` as ``(in_features, rows)``."""
        return of_blocks.repeat_interleave(self.block, dim=0)[:width]

    @cached_property
    def kept_columns(self) -> frozenset[int]:
        """The kept ones, to be asked for one by one."""
        return frozenset(() if self.kept is None else self.kept.tolist())


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
    order, factor = against.order.tolist(), against.factor
    rest = target[against.order]
    codes = torch.zeros(target.shape, dtype=torch.uint8)
    values = torch.empty_like(target)
    for start in range(0, len(order), STRIP):
        stop = min(start + STRIP, len(order))
        errors = torch.empty(stop - start, target.shape[1])
        for i in range(start, stop):
            column, wanted = order[i], rest[i]
            if column in grid.kept_columns:
                back = wanted.to(grid.kept_dtype).float()
            else:
                chosen, back = grid.nearest(column, wanted)
                codes[column] = chosen
            values[column] = back
            error = torch.sub(wanted, back, out=errors[i - start]).div_(factor[i, i])
            rest[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1.0)
        rest[stop:].addmm_(factor[start:stop, stop:].mT, errors, alpha=-1.0)
    return Rounded(codes, values)


def descend(target: Tensor, against: Damped, grid: Grid, start: Rounded) -> Rounded:
    """One round of coordinate descent: every code in turn takes the best value for all others as they are.

    The loss ``(q - target) H (q - target)^T`` of a row never rises but by rounding.
    """
    moments = against.moments
    codes, values = start.codes.clone(), start.values.clone()
    slope = moments @ (values - target)
    curve = moments.diagonal()
    for first in range(0, len(target), STRIP):
        stop = min(first + STRIP, len(target))
        local = slope[first:stop].clone()
        steps = torch.empty(stop - first, target.shape[1])
        for column in range(first, stop):
            i = column - first
            wanted = values[column] - local[i] / curve[column]
            if column in grid.kept_columns:
                back = wanted.to(grid.kept_dtype).float()
            else:
                chosen, back = grid.nearest(column, wanted)
                codes[column] = chosen
            torch.sub(back, values[column], out=steps[i])
            values[column] = back
            local[i + 1 :].addr_(moments[column, column + 1 : stop], steps[i])
        slope.addmm_(moments[:, first:stop], steps)
    return Rounded(codes, values)


def refitted(target: Tensor, against: Damped, grid: Grid, rounded: Rounded, ridge: float) -> Grid:
    """Scales and zeros that lose least for the codes as they are: each row's normal equations.

    Args:
        target: ``(in_features, rows)``.
        against: the moments.
        grid: with the scales that a ridge draws to.
        rounded: the codes.
        ridge: how much, relative to the equations' diagonal.
    """
    levels, block = grid.levels(rounded.codes), grid.block
    width, rows = target.shape
    blocks = grid.scales.shape[0]
    parts = [levels]
    if grid.zeros is not None:
        ones = torch.ones_like(levels)
        if grid.kept is not None:
            ones[grid.kept] = 0.0
        parts.append(ones)
    wanted = target
    if grid.kept is not None:
        wanted = target.clone()
        wanted[grid.kept] -= rounded.values[grid.kept]
    drawn = against.moments @ wanted
    right = torch.cat([_by_block(part * drawn, block) for part in parts]).double()
    matrix = torch.empty(rows, len(right), len(right), dtype=torch.float64)
    for i, part in enumerate(parts):
        for b in range(blocks):
            here = slice(b * block, min((b + 1) * block, width))
            pushed = against.moments[:, here] @ part[here]
            rising = torch.cat([_by_block(other * pushed, block) for other in parts])
            matrix[:, :, i * blocks + b] = rising.mT.double()
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
