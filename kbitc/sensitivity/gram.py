"""Full second moments of a weight's inputs: what error feedback needs beside `kbitc.sensitivity.moments`.

The one thing to know: x is the input that the source model gives a weight, x^ the one that it gets in the
partly quantized model. With H = E[x^ x^T] and C = E[x x^T-hat], the squared error of a row's output

    E (w x - q x^)²  =  q H q^T - 2 w C q^T + w E[x x^T] w^T

(and with what the output is added to, r in the source model and r^ in the other, w C + E[(r - r^) x^T] in the
place of w C) says all that there is to say of codes q for w; its last term depends on no choice.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from kbitc.graph.facts import Fact
from kbitc.sensitivity.moments import Moments
from kbitc.system.memo import Memo

T = TypeVar("T")

SUMMED = 1024
"""Tokens of one float32 product, at least: a float64 sum costs as much as the products of 128 tokens."""

BUCKETS = 8
"""Mixtures of a look-up's and the logits' moments that the rows of a tied embedding are sorted into."""


@dataclass(frozen=True, eq=False)
class Gram:
    """Of the inputs of one weight ``(rows, in_features)``, or of one expert's.

    Attributes:
        inputs: ``(in_features, in_features)`` float32: H, the mean of x^ x^T over tokens.
        cross: the same of x x^T, rows the source's; None where both inputs are one.
        tokens: how many tokens the means are of.
        held_out: the same of tokens that nothing is fitted to; None without.
    """

    inputs: Tensor
    cross: Tensor | None = None
    tokens: int = 0
    held_out: Gram | None = None
    _memo: Memo = field(default_factory=Memo, init=False, repr=False)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is made of the moments, kept for the next weight that has the same."""
        return self._memo.once(key, make)


@dataclass(frozen=True)
class RowGroup:
    """Rows of a weight whose inputs have the same moments.

    Attributes:
        rows: ``(count,)`` int64 indices, experts' rows one after another.
        gram: the moments.
        residual: ``(count, in_features)`` float32: mean of (r - r^) x^T, where the rows' outputs are added to
            r in the source model and to r^ in the packed one, and, where the moments have no cross part, of
            w (x - x^) x^T; None where there is neither.
        held_out: the same of tokens that nothing is fitted to.
    """

    rows: Tensor
    gram: Gram
    residual: Tensor | None = None
    held_out: Tensor | None = None

    def aims(self, weight: Tensor, part: slice = slice(None)) -> Judged:
        """What held-out tokens say of rows.

        Args:
            weight: ``(count, in_features)`` float32, the rows as the source has them.
            part: which of the group's rows they are.
        """
        gram, residual = self.gram, self.residual
        if gram.held_out is not None:
            gram, residual = gram.held_out, self.held_out
        wanted = weight @ (gram.inputs if gram.cross is None else gram.cross)
        return Judged(gram.inputs, wanted if residual is None else wanted + residual[part])


@dataclass(frozen=True)
class Judged:
    """Moments by which rows are judged.

    Attributes:
        inputs: H of the judging tokens.
        wanted: ``(rows, in_features)``: mean of (w x + r - r^) x^T.
    """

    inputs: Tensor
    wanted: Tensor

    def error(self, back: Tensor) -> float:
        """Squared error of the rows' outputs, summed, up to what no choice changes.

        Args:
            back: ``(rows, in_features)``, as they are dequantized.
        """
        return float((((back @ self.inputs) - 2 * self.wanted) * back).double().sum())


GRAM: Fact[Mapping[str, tuple[RowGroup, ...]]] = Fact("gram")
"""Of a weight, by name, groups that have every row once. Known only while the weight is quantized."""


def equal_groups(grams: Sequence[Gram], rows: int) -> tuple[RowGroup, ...]:
    """Each expert's rows, or all rows of a weight without experts."""
    parts = torch.arange(rows).chunk(len(grams))
    return tuple(RowGroup(part, gram) for part, gram in zip(parts, grams, strict=True))


def groups_of_moments(moments: Moments, rows: int) -> tuple[RowGroup, ...] | None:
    """Of a weight that is read as rows, and perhaps gives the logits too; None where no full moments are.

    An error of row v costs ``sum over uses of rows_v * gram``: a few mixtures of two uses serve all rows.
    """
    uses = [(factor.rows.double(), factor.gram) for factor in moments.factors if factor.gram is not None]
    if len(uses) != len(moments.factors) or len(uses) > 2:
        return None
    first, gram = uses[0]
    if len(uses) == 1:
        return (RowGroup(torch.arange(rows), Gram(gram)),)
    second, other = uses[1]
    least = 1e-12 * max(float(first.max()), float(second.max()))
    ratio = ((second + least) / (first + least)).log()
    bucket = ((ratio - ratio.min()) / (ratio.max() - ratio.min()).clamp_min(1e-9) * BUCKETS).long()
    groups = []
    for i in range(BUCKETS):
        own = (bucket.clamp_max(BUCKETS - 1) == i).nonzero()[:, 0]
        if len(own):
            groups.append(RowGroup(own, Gram(gram + other * ratio[own].mean().exp().float())))
    return tuple(groups)


def gram_of(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """``sum of a^T b`` over windows, float64 sums of float32 products of some tokens each.

    Args:
        pairs: ``(tokens, m)`` and ``(tokens, n)`` float32 of each window.
    """
    total: Tensor | None = None
    product: Tensor | None = None
    tokens = 0
    for a, b in pairs:
        product = a.mT @ b if product is None else product.addmm_(a.mT, b)
        tokens += len(a)
        if tokens >= SUMMED:
            total = _added(total, product)
            product, tokens = None, 0
    if product is not None:
        total = _added(total, product)
    assert total is not None
    return total


def _added(total: Tensor | None, product: Tensor) -> Tensor:
    return product.double() if total is None else total.add_(product)
