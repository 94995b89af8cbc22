"""What may be tuned of one packed weight, and the gradients of it.

The one thing to know: everything is tuned as a change relative to what was packed, all zero at the start, so
that one step size serves all. ``s = s0 * exp(rows + blocks + scales)`` with one ``rows`` value a row and one
``blocks`` value a block of the input features; ``zero = zero0 + |s0| * zeros``;
``level = level0 + codebook``; ``outlier = outlier0 + size * outliers``, ``size`` their root mean square.
The forward pass reads what would be stored (16-bit or double-quantized scales), and gradients pass through
that rounding as if it were none (straight-through, 1308.3432).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kbitc.formats import bit_planes
from kbitc.formats.packed import Operands, Packed
from kbitc.formats.scales import effective_scales, store_scales, store_zeros, to_16_bits

ROWS, BLOCKS, SCALES = "rows", "blocks", "scales"
ZEROS, CODEBOOK, OUTLIERS, VALUE = "zeros", "codebook", "outliers", "value"
TILE = 2**19
"""Values of a gradient that are made at once, 2 MB: they stay in a core's cache."""


@dataclass(frozen=True)
class TunableWeight:
    """One packed weight whose codes stay as they are.

    Attributes:
        packed: as it was packed, ``(*lead, rows, in_features)``.
        scales: ``(*lead, rows, blocks)`` float32, as reading them gives.
    """

    packed: Packed
    scales: Tensor = field(init=False)

    def __post_init__(self) -> None:
        own = self.packed.operands()
        read = effective_scales(
            own.scales.flatten(0, -2), own.scale_codebook, own.scale_absmax, own.scale_mean
        )
        object.__setattr__(self, "scales", read.view(own.scales.shape))

    def start(self) -> dict[str, Tensor]:
        """Zeros for everything that may be tuned, float32, by name."""
        packed, (*lead, rows, blocks) = self.packed, self.scales.shape
        shapes: dict[str, tuple[int, ...]] = {
            ROWS: (*lead, rows, 1),
            BLOCKS: (*lead, 1, blocks),
            SCALES: (*lead, rows, blocks),
        }
        if packed.zeros is not None:
            shapes[ZEROS] = tuple(packed.zeros.shape)
        if packed.spec.is_fitted:
            shapes[CODEBOOK] = tuple(packed.codebook.shape)
        if packed.outlier_values is not None:
            shapes[OUTLIERS] = tuple(packed.outlier_values.shape)
        return {name: torch.zeros(shape) for name, shape in shapes.items()}

    def tuned(self, values: Mapping[str, Tensor]) -> Packed:
        """The weight as it would be stored; what was packed itself where nothing is changed.

        Args:
            values: some or all of what :meth:`start` names.
        """
        packed, changed = self.packed, {name: value for name, value in values.items() if bool(value.any())}
        new, read = packed, self.scales.flatten(0, -2)
        if CODEBOOK in changed:  # sorted, whatever a step did to it
            new = replace(new, codebook=torch.cummax(packed.codebook + changed[CODEBOOK], 0).values)
        is_scaled = any(name in changed for name in (ROWS, BLOCKS, SCALES))
        if is_scaled:
            scales = self.tuned_scales(changed)
            stored, constants, read = store_scales(scales.flatten(0, -2), packed.spec, new.codebook)
            new = replace(new, scales=stored.view(scales.shape))
            if constants is not None:
                new = replace(new, scale_absmax=constants[1], scale_mean=constants[2])
        has_moved = ZEROS in changed or (is_scaled and packed.spec.has_integer_zeros)
        if packed.zeros is not None and has_moved:
            zeros = packed.zeros.float() + self.scales.abs() * changed.get(ZEROS, torch.zeros(()))
            stored = store_zeros(zeros.flatten(0, -2), read, packed.spec)
            new = replace(new, zeros=stored.view(zeros.shape))
        if OUTLIERS in changed and packed.outlier_values is not None:
            values_ = packed.outlier_values.float()
            new = replace(new, outlier_values=to_16_bits(values_ + _size(values_) * changed[OUTLIERS]))
        return new

    def tuned_scales(self, values: Mapping[str, Tensor]) -> Tensor:
        """``(*lead, rows, blocks)`` float32 scales before they are rounded for storing."""
        logs = [values[name] for name in (ROWS, BLOCKS, SCALES) if name in values]
        return self.scales * sum(logs, torch.zeros(())).exp() if logs else self.scales

    def gradients(self, sums: BlockSums, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the loss by everything in ``values``, from the sums of one or more backward passes."""
        by_log = sums.scales.view(self.scales.shape) * self.tuned_scales(values)
        found = {ROWS: by_log.sum(-1, keepdim=True), BLOCKS: by_log.sum(-2, keepdim=True), SCALES: by_log}
        if sums.zeros is not None:
            found[ZEROS] = sums.zeros.view(self.scales.shape) * self.scales.abs()
        if sums.codebook is not None:
            found[CODEBOOK] = sums.codebook.float()
        if sums.outliers is not None and self.packed.outlier_values is not None:
            size = _size(self.packed.outlier_values.float())
            found[OUTLIERS] = sums.outliers.view(self.packed.outlier_values.shape) * size
        return {name: found[name] for name in values}


def _size(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


class BlockSums:
    """What a backward pass leaves of the gradient of a dense weight: sums over its blocks.

    Args:
        packed: the weight that the pass read.

    Attributes:
        scales: ``(rows, blocks)`` float32: the gradient of each scale; rows of all experts.
        zeros: the same of zero points; None without.
        codebook: ``(levels,)`` float64; None for one that other weights share.
        outliers: ``(rows, outliers)`` float32; None without.
    """

    def __init__(self, packed: Packed) -> None:
        own = packed.operands()
        shape = own.scales.flatten(0, -2).shape
        self.operands = _flat(own)
        self.scales = torch.zeros(shape)
        self.zeros = None if own.zeros is None else torch.zeros(shape)
        self.codebook = (
            torch.zeros(len(packed.codebook), dtype=torch.float64) if packed.spec.is_fitted else None
        )
        index = own.outlier_index
        self.outliers = None if index is None else torch.zeros(shape[0], len(index))
        self._read: Tensor | None = None

    def add_product(self, left: Tensor, right: Tensor, first: int = 0) -> None:
        """Add the gradient ``left.T @ right``, a tile at a time.

        Args:
            left: ``(tokens, rows)``.
            right: ``(tokens, in_features)``.
            first: row of the weight that the product begins with.
        """
        step = max(1, TILE // right.shape[1])
        for start in range(0, left.shape[1], step):
            tile = left[:, start : start + step].mT @ right
            self.add(slice(first + start, first + start + len(tile)), tile)

    def add_rows(self, ids: Tensor, grad: Tensor) -> None:
        """Add the gradient of rows that were looked up.

        Args:
            ids: ``(tokens,)`` rows.
            grad: ``(tokens, in_features)``.
        """
        rows, at = torch.unique(ids, return_inverse=True)
        self.add(rows, torch.zeros(len(rows), grad.shape[1]).index_add_(0, at, grad))

    def add(self, rows: slice | Tensor, grad: Tensor) -> None:
        """Add the gradient of some rows, ``(rows, in_features)`` float32, which is overwritten."""
        own = self.operands
        if self.outliers is not None and own.outlier_index is not None:
            columns = own.outlier_index.long()
            self.outliers[rows] += grad[:, columns]
            grad[:, columns] = 0.0
        planes = own.planes[rows]
        if self.zeros is not None:
            self.zeros[rows] += _block_sums(grad, own.block)
        if self.codebook is not None:
            codes = bit_planes.unpack(planes, own.in_features, own.bits).flatten().long()
            by_value = grad * self._of_blocks(self._scales()[rows])
            self.codebook += torch.bincount(codes, by_value.flatten().double(), minlength=len(self.codebook))
        plain = own._replace(planes=planes, scales=torch.ones(len(planes), self.scales.shape[1]), **_BARE)
        levels = torch.ops.kbit.dequantize(*plain, torch.float32)
        self.scales[rows] += _block_sums(levels.mul_(grad), own.block)

    def _scales(self) -> Tensor:
        own = self.operands
        if self._read is None:
            self._read = effective_scales(own.scales, own.scale_codebook, own.scale_absmax, own.scale_mean)
        return self._read

    def _of_blocks(self, values: Tensor) -> Tensor:
        """One value a block to one a weight."""
        return values.repeat_interleave(self.operands.block, dim=1)[:, : self.operands.in_features]


_BARE: dict[str, Any] = dict.fromkeys(
    ("zeros", "scale_codebook", "scale_absmax", "scale_mean", "outlier_values", "outlier_index")
)


def _flat(operands: Operands) -> Operands:
    """The rows of all experts as rows of one matrix."""
    if operands.planes.dim() == 2:
        return operands
    fields = ("planes", "scales", "zeros", "outlier_values")
    there: dict[str, Any] = {name: t for name in fields if (t := getattr(operands, name)) is not None}
    return operands._replace(**{name: value.flatten(0, -2) for name, value in there.items()})


def _block_sums(values: Tensor, block: int) -> Tensor:
    short = -values.shape[1] % block
    if short:
        values = torch.nn.functional.pad(values, (0, short))
    sums: Tensor = values.unflatten(1, (-1, block)).sum(-1)
    return sums


@dataclass(frozen=True)
class TunablePlain:
    """A parameter of one dimension that is not packed: a norm's gain, a bias.

    Attributes:
        stored: as it is stored.
    """

    stored: Tensor

    def start(self) -> dict[str, Tensor]:
        """Zeros, float32."""
        return {VALUE: torch.zeros(self.stored.shape)}

    def tuned(self, values: Mapping[str, Tensor]) -> Tensor:
        """As it would be stored."""
        if VALUE not in values or not bool(values[VALUE].any()):
            return self.stored
        return (self.stored.float() + self.size * values[VALUE]).to(self.stored.dtype)

    def gradients(self, grad: Tensor, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the loss by ``values``, from that of the parameter."""
        return dict.fromkeys(values, grad * self.size)

    @property
    def size(self) -> float:
        """What a change is relative to: the root mean square, or 1 % of 1 for zeros."""
        return float(_size(self.stored.float())) or 0.01
