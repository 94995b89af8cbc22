"""Error feedback: every code is chosen knowing what the codes before it did to the row's output.

The one thing to know: with the second moments H of the inputs x^ that the partly quantized model gives, and C
of the source's x with them (`kbitc.sensitivity.gram`), a row w is quantized as follows.

    target    w~ = w + a w (C - H) (H + l I)^-1        what fits x^ best; a in [0, 1] by held-out error
    scales    as `weighted` searches them for w~, with the diagonal of H
    feedback  columns by falling H_jj: q_j = nearest level to w~_j, e = (w~_j - q_j) / U_jj, and all later
              columns w~_k -= e U_jk, U the upper Cholesky factor of (H + l I)^-1
    polish    each row's scales (and zeros) by its normal equations, codes by coordinate descent on
              (q - w~) (H + l I) (q - w~)^T; a round that does not lower the held-out error is dropped

Feedback is OPTQ's (2210.17323), the target that of GPTAQ (2504.02692) and Qronos (2505.11695), coordinate
descent CDQuant's (2406.17542).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from kbitc.formats.bit_planes import pack
from kbitc.formats.encoder import Encoder
from kbitc.formats.packed import Packed
from kbitc.formats.scales import store_scales, store_zeros
from kbitc.formats.spec import Spec
from kbitc.graph.facts import Fact
from kbitc.quantizers._rounding import Damped, Grid, Rounded, descend, feed_back, refitted
from kbitc.sensitivity.evidence import Evidence
from kbitc.sensitivity.gram import GRAM, Gram, Judged, RowGroup
from kbitc.sensitivity.moments import MOMENTS
from kbitc.tensor.cores import alone, side_by_side
from kbitc.tensor.packing import Draft, draft

T = TypeVar("T")

TILE = 512  # rows that one core rounds at a time, at most; the number of cores does not count
LEAST = 64  # and at least


@dataclass(frozen=True)
class Feedback:
    """Target, scales, feedback, polish; each step can be left out.

    Attributes:
        target: fit the inputs of the partly quantized model, and not those of the source.
        search: search the scales; absmax otherwise.
        order: columns by falling second moment; as they stand otherwise.
        feedback: pass errors on; nearest codes otherwise.
        refit: scales by the normal equations in each round of the polish.
        polish: rounds of coordinate descent at most.
        damping: l over the mean of H's diagonal.
        ridge: of the normal equations, relative to their diagonal.
    """

    target: bool = True
    search: bool = True
    order: bool = True
    feedback: bool = True
    refit: bool = True
    polish: int = 3
    damping: float = 0.05
    ridge: float = 0.01

    requires: ClassVar[tuple[Fact[Any], ...]] = (MOMENTS, GRAM)

    def estimating(self) -> Feedback:
        """With one round of polish, which gives 70 % of what three do, whatever the format: for prices."""
        return replace(self, polish=min(self.polish, 1))

    def quantize(self, weight: Tensor, spec: Spec, evidence: Evidence) -> Packed:
        """See `kbitc.quantizers.Quantizer`."""
        groups = evidence.get(GRAM)
        assert groups is not None
        made = draft(weight, spec, outliers=evidence.outliers, name=evidence.name)
        against = [self._against(group.gram, made.outlier_index) for group in groups]
        parts = [
            self._target(made.rows[group.rows].float(), group, own)
            for group, own in zip(groups, against, strict=True)
        ]
        aimed = replace(made, rows=_scattered(parts, groups))
        if self.search:
            aimed = aimed.searched(_importance(groups, aimed))
        return _Work(self, made.rows, aimed, groups, against).packed()

    def _against(self, gram: Gram, kept: Tensor | None) -> Damped:
        """What rows are rounded against; the same for all weights that multiply one input."""
        key = (self.damping, self.order, None if kept is None else tuple(kept.tolist()))

        def make() -> Damped:
            return Damped.of(gram, self.damping, is_ordered=self.order, last=kept)

        return gram.once(("damped", *key), lambda: alone(make))

    def _target(self, rows: Tensor, group: RowGroup, against: Damped) -> Tensor:
        """The rows that fit x^ best, as far as held-out tokens agree."""
        gram = group.gram
        if not self.target or (gram.cross is None and group.residual is None):
            return rows
        difference = None if gram.cross is None else gram.cross - gram.inputs

        def way(tile: slice) -> Tensor:
            pulled = None if difference is None else rows[tile] @ difference
            if group.residual is not None:
                pulled = group.residual[tile] if pulled is None else pulled.add_(group.residual[tile])
            assert pulled is not None
            return against.solved(pulled)

        ways = torch.cat(side_by_side(way, _tiles(rows)))
        return ways.mul_(_part(rows, ways, group)).add_(rows)


def _scattered(parts: Sequence[Tensor], groups: Sequence[RowGroup]) -> Tensor:
    """Rows of groups at their places in the weight."""
    if len(groups) == 1:
        return parts[0]
    whole = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for group, part in zip(groups, parts, strict=True):
        whole[group.rows] = part
    return whole


def _importance(groups: Sequence[RowGroup], made: Draft) -> Tensor:
    """``(groups, in_features)`` for the scale search: of each expert, or of all rows together."""
    every = torch.stack([group.gram.inputs.diagonal() for group in groups])
    if len(groups) == 1 or made.lead.numel() != made.lead[-1]:
        return every
    counts = torch.tensor([[float(len(group.rows))] for group in groups])
    return (every / every.mean(1, keepdim=True).clamp_min(1e-30) * counts).sum(0, keepdim=True)


def _part(rows: Tensor, way: Tensor, judge: RowGroup) -> float:
    """The a in [0, 1] of ``rows + a way`` that leaves least error on the judge's tokens."""

    def sums(tile: slice) -> tuple[float, float]:
        judged, own = judge.aims(rows[tile], tile), way[tile]
        pushed = own @ judged.inputs
        falls = (own * judged.wanted).double().sum() - (pushed * rows[tile]).double().sum()
        return float(falls), float((pushed * own).double().sum())

    parts = side_by_side(sums, _tiles(rows))
    falls, bends = (sum(part[i] for part in parts) for i in (0, 1))
    return min(1.0, max(0.0, falls / bends)) if bends > 0 else 0.0


def _tiles(rows: Tensor) -> list[slice]:
    """An even number of them, of nearly one size, so that cores end together; of few rows one."""
    pairs = -(-len(rows) // (2 * TILE))
    size = max(LEAST, -(-len(rows) // (2 * pairs) // LEAST) * LEAST)
    return [slice(start, start + size) for start in range(0, len(rows), size)]


@dataclass(frozen=True)
class _Tile:
    """Rows of one group, from its ``first`` on."""

    rows: Tensor
    group: int
    first: int


class _Work:
    """One weight on its way to codes; scales are stored, and so rounded, for the weight as a whole."""

    def __init__(
        self,
        options: Feedback,
        source: Tensor,
        aimed: Draft,
        groups: Sequence[RowGroup],
        against: Sequence[Damped],
    ) -> None:
        self.options, self.source, self.aimed = options, source, aimed
        self.groups, self.against = groups, against
        self.bounds = Encoder(aimed.codebook).bounds
        self.tiles = [
            _Tile(group.rows[tile], i, tile.start)
            for i, group in enumerate(groups)
            for tile in _tiles(group.rows)
        ]
        self.targets = [aimed.rows[tile.rows].float().mT.contiguous() for tile in self.tiles]
        self.judged = self._each(lambda i: self._judged(self.tiles[i]))
        refits = options.refit and options.polish > 0
        self.drawn = self._each(lambda i: self._against(i).times(self.targets[i])) if refits else []

    def _judged(self, tile: _Tile) -> Judged:
        part = slice(tile.first, tile.first + len(tile.rows))
        return self.groups[tile.group].aims(self.source[tile.rows].float(), part)

    def packed(self) -> Packed:
        """The best that was found."""
        stored = _Stored.of(self.aimed)
        best = self._rounded(stored, None)
        error = self._error(best)
        found = stored, best
        for _ in range(self.options.polish):
            stored = self._refitted(stored, best) if self.options.refit else stored
            best = self._rounded(stored, best)
            now = self._error(best)
            if now >= error:
                break
            found, error = (stored, best), now
        return self._finished(*found)

    def _each(self, function: Callable[[int], T]) -> list[T]:
        """Of each tile, by its index; one core works on one tile."""
        return side_by_side(function, range(len(self.tiles)))

    def _against(self, index: int) -> Damped:
        return self.against[self.tiles[index].group]

    def _grid(self, stored: _Stored, tile: _Tile) -> Grid:
        kept = self.aimed.outlier_index
        values = self.aimed.outlier_values
        return Grid(
            self.aimed.codebook,
            self.bounds,
            self.aimed.spec.block,
            stored.effective[tile.rows].mT.contiguous(),
            None if stored.zeros is None else stored.zeros[tile.rows].float().mT.contiguous(),
            None if kept is None else kept.long(),
            torch.float16 if values is None else values.dtype,
        )

    def _rounded(self, stored: _Stored, before: list[Rounded] | None) -> list[Rounded]:
        def one(index: int) -> Rounded:
            target, against = self.targets[index], self._against(index)
            grid = self._grid(stored, self.tiles[index])
            if before is not None:
                return descend(target, against, grid, _revalued(before[index], grid))
            if self.options.feedback:
                return feed_back(target, against, grid)
            return nearest(target, grid)

        return self._each(one)

    def _refitted(self, stored: _Stored, rounded: list[Rounded]) -> _Stored:
        def one(index: int) -> Grid:
            grid, ridge = self._grid(stored, self.tiles[index]), self.options.ridge
            target, drawn = self.targets[index], self.drawn[index]
            return refitted(target, self._against(index), grid, rounded[index], ridge, drawn)

        grids = self._each(one)
        scales = self._whole([grid.scales for grid in grids])
        zeros = self._whole([grid.zeros for grid in grids if grid.zeros is not None])
        return _Stored.of(replace(self.aimed, scales=scales, zeros=zeros))

    def _whole(self, parts: Sequence[Tensor]) -> Any:
        """What tiles have, ``(n, rows)`` each, as ``(rows, n)`` of the weight; None of nothing."""
        if not parts:
            return None
        whole = parts[0].new_empty(len(self.source), len(parts[0]))
        for tile, part in zip(self.tiles, parts, strict=True):
            whole[tile.rows] = part.mT
        return whole

    def _error(self, rounded: list[Rounded]) -> float:
        def one(index: int) -> float:
            return self.judged[index].error(rounded[index].values.mT)

        return sum(self._each(one))

    def _finished(self, stored: _Stored, rounded: list[Rounded]) -> Packed:
        made, spec = self.aimed, self.aimed.spec
        codes = self._whole([each.codes for each in rounded])
        values = made.outlier_values
        if made.outlier_index is not None and values is not None:
            kept = self._whole([each.values[made.outlier_index.long()] for each in rounded])
            values = kept.to(values.dtype).view(values.shape)
        constants = stored.constants
        return Packed(
            planes=pack(codes, spec.bits).view(*made.lead, -1),
            scales=stored.scales.view(*made.lead, -1),
            codebook=made.codebook,
            zeros=None if stored.zeros is None else stored.zeros.view(*made.lead, -1),
            scale_codebook=constants[0] if constants else None,
            scale_absmax=constants[1] if constants else None,
            scale_mean=constants[2] if constants else None,
            outlier_values=values,
            outlier_index=made.outlier_index,
            spec=spec,
            in_features=made.rows.shape[1],
        )


@dataclass(frozen=True)
class _Stored:
    """Scales and zeros as they are stored, and the scales that reading them gives."""

    scales: Tensor
    constants: tuple[Tensor, Tensor, Tensor] | None
    effective: Tensor
    zeros: Tensor | None

    @staticmethod
    def of(made: Draft) -> _Stored:
        stored, constants, effective = store_scales(made.scales, made.spec, made.codebook)
        zeros = None if made.zeros is None else store_zeros(made.zeros, effective, made.spec)
        return _Stored(stored, constants, effective, zeros)


def _revalued(rounded: Rounded, grid: Grid) -> Rounded:
    """The same codes under other scales."""
    values = grid.levels(rounded.codes) * grid.spread(grid.scales, len(rounded.codes))
    if grid.zeros is not None:
        values += grid.spread(grid.zeros, len(values))
    if grid.kept is not None:
        values[grid.kept] = rounded.values[grid.kept]
    return Rounded(rounded.codes, values)


def nearest(target: Tensor, grid: Grid) -> Rounded:
    """Codes without feedback."""
    width = len(target)
    centred = target if grid.zeros is None else target - grid.spread(grid.zeros, width)
    centred = centred * grid.spread(grid.inverse, width)
    codes = torch.bucketize(centred, grid.bounds, out_int32=True).to(torch.uint8)
    if grid.kept is not None:
        codes[grid.kept] = 0
    return _revalued(Rounded(codes, target.to(grid.kept_dtype).float()), grid)


QUANTIZER = Feedback
