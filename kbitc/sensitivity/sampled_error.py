"""Quantization error of a weight, measured on a sample of its rows.

The one thing to know: the sample is evenly spaced rows, the same on every run; 2**15 values put the
standard error of a relative error below 1 % of it for every data type tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kbitc.formats.dequantize import dequantize_operands
from kbitc.formats.layout import stored_plain
from kbitc.formats.packed import Operands, Packed
from kbitc.formats.spec import Spec
from kbitc.graph.facts import Fact
from kbitc.kernels import ops as _ops  # noqa: F401  # registers torch.ops.kbit
from kbitc.sensitivity.evidence import Evidence
from kbitc.sensitivity.moments import MOMENTS, Moments

Quantize: TypeAlias = Callable[[Tensor, Spec, Evidence], Packed]
"""`kbitc.quantizers.Quantizer.quantize`."""

SAMPLE = 2**15
PRICED = 2**14  # of a price: a hundred options for each weight are tried on the same rows


def sample_rows(rows: int, in_features: int, values: int = SAMPLE) -> Tensor:
    """Indices of evenly spaced rows that hold about ``values`` weights; at least one."""
    count = min(rows, max(1, values // in_features))
    return torch.arange(count) * rows // count


@dataclass(frozen=True)
class Sample:
    """Sampled rows of a weight, and what an error in them costs.

    Attributes:
        values: ``(rows, in_features)`` float32.
        plain: the same as they are stored unpacked, at 16 bits.
        importance: ``(groups, in_features)`` for the scale search, where group g weighs as many rows of
            the sample as every other; None without moments.
        factors: ``(row part, column part)`` of each use: ``(rows,)`` scaled so that the sample stands for
            the whole weight, and ``(rows, in_features)`` or broadcast to it.
    """

    values: Tensor
    plain: Tensor
    importance: Tensor | None
    factors: tuple[tuple[Tensor, Tensor], ...]

    @staticmethod
    def of(weight: Tensor, moments: Moments | None) -> Sample:
        """Of a ``(*lead, rows, in_features)`` weight."""
        flat = weight.flatten(0, -2)
        picked = sample_rows(flat.shape[0], flat.shape[1], PRICED)
        values = flat[picked].float()
        plain = stored_plain(flat)[picked].float()
        if moments is None:
            return Sample(values, plain, None, ())
        per_group = flat.shape[0] // weight.shape[0] if weight.dim() == 3 else flat.shape[0]
        group = picked // per_group
        factors = []
        for factor in moments.factors:
            every = factor.rows.flatten()
            rows = every[picked]
            whole = float(every.double().sum() / rows.double().sum().clamp_min(1e-300))
            factors.append((rows * whole, factor.columns.view(-1, flat.shape[1])[group]))
        importance = moments.importance().view(-1, flat.shape[1])
        # One importance for all rows, or one a row: the search takes groups of equal size.
        return Sample(values, plain, importance if weight.dim() == 2 else importance[group], tuple(factors))

    def price(self, spec: Spec, outliers: Tensor | None, quantize: Quantize) -> tuple[float | None, float]:
        """Predicted increase of the loss in nats per token (None without moments), and relative error.

        Args:
            spec: to try.
            outliers: which input features a spec with +out keeps.
            quantize: what will pack the weight.
        """
        if spec.is_left_alone:
            back = self.plain
        else:
            packed = quantize(self._oriented(), spec, Evidence(outliers=outliers, facts=self._facts))
            back = torch.ops.kbit.dequantize(*_flat_operands(packed), torch.float32)
        error = _relative_error(*self._exact, back)
        if not self.factors:
            return None, error
        squared = (self.values - back).square()
        price = 0.0
        for rows, columns in self.factors:
            price += float(rows.double() @ (squared * columns).sum(-1).double())
        return price / 2, error

    def scaled(self, columns: Tensor) -> Sample:
        """The sample of the same function with its input features divided by ``columns``.

        Args:
            columns: ``(in_features,)``, or ``(rows, in_features)`` where the rows are of several experts.
        """
        square = columns.square()
        importance = None if self.importance is None else self.importance / square
        factors = tuple((rows, parts / square) for rows, parts in self.factors)
        return Sample(self.values * columns, self.plain * columns, importance, factors)

    @cached_property
    def _exact(self) -> tuple[Tensor, Tensor]:
        """The values in float64 and their norm: the same for a hundred options."""
        exact = self.values.double()
        return exact, exact.norm()

    def _oriented(self) -> Tensor:
        """The rows as a weight: as many experts of one row where each has an importance of its own."""
        is_one = self.importance is None or self.importance.shape[0] == 1
        return self.values if is_one else self.values.unsqueeze(1)

    @cached_property
    def _facts(self) -> Mapping[Fact[Any], object]:
        if self.importance is None:
            return {}
        importance = self.importance[0] if self.importance.shape[0] == 1 else self.importance
        return {MOMENTS: Moments.of_importance(importance)}


def packed_error(weight: Tensor, packed: Packed) -> float:
    """Relative error of what was packed, on the sampled rows of ``weight`` (oriented like it)."""
    rows = weight.flatten(0, -2)
    picked = sample_rows(*rows.shape)
    back = dequantize_operands(_flat_operands(packed), torch.float32, picked)
    return relative_error(rows[picked].float(), back)


def _flat_operands(packed: Packed) -> Operands:
    """Operands of a packed weight, the rows of all experts as rows of one matrix."""
    return packed.map(lambda t: t.flatten(0, -2) if t.dim() == 3 else t).operands()


def relative_error(weight: Tensor, back: Tensor) -> float:
    """``||weight - back|| / ||weight||`` in float64; 0 for an all-zero weight."""
    exact = weight.double()
    return _relative_error(exact, exact.norm(), back)


def _relative_error(exact: Tensor, norm: Tensor, back: Tensor) -> float:
    return float((exact - back.double()).norm() / norm) if norm > 0 else 0.0
