"""Losses against bits: one curve a precision, what lies between two of them, and the best precision.

The one thing to know: between two models a curve is a straight line over the logarithm of the bits, which is
what the k-bit paper uses (section 4), and beyond them there is none. All jobs of a family score the same
windows, so a resample of windows (and of models, where each is a pair with itself) is one for all of them.
Accuracies go the same way: as the share of examples that were wrong, so that less is better there too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np

from kbitc.study.laws import Floats
from kbitc.study.ledger import Row

TOTAL, PAPER = "total", "paper"
COUNTS = {
    TOTAL: "stored bits of the whole model",
    PAPER: "bits of the quantized weights alone, as the paper counts: n (k + 16/B + p (16 - k))",
}
LOSS, ACCURACY = "loss", "accuracy"
MEASURES = {LOSS: "loss, nats per token", ACCURACY: "mean zero-shot accuracy"}
DRAWS = 500
PLACES = 65  # of the axis at which curves are compared
SEED = 0


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    @staticmethod
    def of(samples: Floats) -> Interval:
        """Of ``(1 + draws,)``: the estimate, then resamples of it."""
        low, high = np.quantile(samples[1:], (0.025, 0.975))
        return Interval(float(samples[0]), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True)
class Series:
    """What rows of one kind have in common, whatever their model and precision."""

    type: str
    block: int
    quantizer: str
    scope: str
    outliers: float = 0.0
    has_mean: bool = False
    is_flat: bool = False

    @staticmethod
    def of(row: Row) -> Series:
        """That a row is of."""
        own = (row.type, row.block, row.quantizer, row.scope, row.outliers, row.has_mean, row.is_flat)
        return Series(*own)

    @property
    def is_plain(self) -> bool:
        """Neither centred nor with outliers."""
        return not self.outliers and not self.has_mean

    def __str__(self) -> str:
        flags = f"{'+mean' if self.has_mean else ''}{'+flat' if self.is_flat else ''}"
        kept = f"+out{self.outliers:g}%" if self.outliers else ""
        return f"{self.type}, blocks of {self.block}{kept}{flags} by {self.quantizer}"


Pairs: TypeAlias = Sequence[tuple[Series, int]]
"""Series, each at a precision."""


@dataclass(frozen=True)
class Curve:
    """Losses over bits.

    Attributes:
        bits: ``(models,)``, rising.
        samples: ``(1 + draws, models)`` losses: as measured, then of resampled windows.
    """

    bits: Floats
    samples: Floats

    def at(self, places: Floats) -> Floats:
        """Losses at some bits: ``(1 + draws, places)``; NaN beyond the ends."""
        axis, where = np.log2(self.bits), np.log2(places)
        right = np.clip(np.searchsorted(axis, where), 1, len(axis) - 1)
        share = (where - axis[right - 1]) / (axis[right] - axis[right - 1])
        between = self.samples[:, right - 1] * (1 - share) + self.samples[:, right] * share
        is_there = (where >= axis[0] - 1e-9) & (where <= axis[-1] + 1e-9)
        return np.where(is_there, between, math.nan)


@dataclass(frozen=True)
class Family:
    """The rows of models whose losses can be compared, in one scope.

    Attributes:
        rows: with a finite loss.
        left_out: those without.
        count: how bits are counted, see `COUNTS`.
        measure: what samples are of, see `MEASURES`; of accuracies, all rows have the same examples.
    """

    rows: Sequence[Row]
    left_out: Sequence[Row] = ()
    count: str = TOTAL
    measure: str = LOSS

    def bits(self, row: Row) -> float:
        """Of a row."""
        return float(row.total_bits if self.count == TOTAL else row.paper_bits)

    @cached_property
    def models(self) -> list[str]:
        """Fingerprints, the smallest model first."""
        sizes = {row.fingerprint: row.parameters for row in self.rows}
        return sorted(sizes, key=lambda name: (sizes[name], name))

    @cached_property
    def index(self) -> Mapping[tuple[Series, int, str], int]:
        """The row of a series, a precision and a model."""
        return {(Series.of(row), row.bits, row.fingerprint): i for i, row in enumerate(self.rows)}

    @cached_property
    def samples(self) -> Floats:
        """``(1 + draws, rows)`` losses, or shares of wrong examples: as measured, then of resampled items."""
        if self.measure == LOSS:
            return _resampled(np.array([row.losses for row in self.rows], float))
        hits = [np.array([row.hits[task] for row in self.rows], float) for task in self.rows[0].hits]
        right = [_resampled(own, seed) for seed, own in enumerate(hits, SEED + 1)]
        return np.asarray(1 - np.mean(right, axis=0), float)

    def shown(self, samples: Floats) -> Floats:
        """Samples as they are drawn and told: of accuracies, the share that was right."""
        return samples if self.measure == LOSS else 1 - samples

    def by_accuracy(self) -> Family | None:
        """The rows that were scored on the examples that most were; None without."""
        tasks = usual_tasks(self.rows)
        own = [row for row in self.rows if row.tasks == tasks]
        return Family(own, (), self.count, ACCURACY) if tasks else None

    @cached_property
    def series(self) -> list[Series]:
        """All of them, that of 16 bits left out."""
        return list(dict.fromkeys(Series.of(row) for row in self.rows if row.bits < 16))

    def precisions(self, series: Series) -> list[int]:
        """Bits of a code that there are."""
        return sorted({row.bits for row in self.rows if Series.of(row) == series})

    def curve(self, series: Series, bits: int) -> Curve | None:
        """Of one precision; None of fewer than two models."""
        found = [self.index[series, bits, m] for m in self.models if (series, bits, m) in self.index]
        found.sort(key=lambda i: self.bits(self.rows[i]))
        axis = np.array([self.bits(self.rows[i]) for i in found])
        keep = np.flatnonzero(np.diff(axis, prepend=0.0) > 0)  # two models of one size have no line between
        if len(keep) < 2:
            return None
        return Curve(axis[keep], self.samples[:, np.asarray(found)[keep]])

    def curves(self, series: Series) -> dict[int, Curve]:
        """By precision."""
        made = {bits: self.curve(series, bits) for bits in self.precisions(series)}
        return {bits: curve for bits, curve in made.items() if curve is not None}

    def paired(self, first: Pairs, second: Pairs) -> Interval | None:
        """The mean of second minus first at the same models, over resampled windows and models.

        Args:
            first: series and precisions.
            second: as many, each to be compared with the one at its place.
        """
        by_model = []
        for model in self.models:
            pairs = [
                (self.index[(*a, model)], self.index[(*b, model)])
                for a, b in zip(first, second, strict=True)
                if (*a, model) in self.index and (*b, model) in self.index
            ]
            if pairs:
                ours, theirs = (np.asarray(side) for side in zip(*pairs, strict=True))
                by_model.append((self.samples[:, theirs] - self.samples[:, ours]).mean(1))
        if not by_model:
            return None
        table = np.stack(by_model, 1)
        chosen = np.random.default_rng(SEED).integers(0, table.shape[1], (DRAWS, table.shape[1]))
        resampled = np.take_along_axis(table[1:], chosen, 1).mean(1)
        return Interval.of(np.concatenate([table[:1].mean(1), resampled]))


def families(rows: Iterable[Row], count: str = TOTAL) -> dict[str, Family]:
    """By family and scope, that of most models and jobs first; 16 bits are in each."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.family}, {row.scope}", []).append(row)
    made = {}
    for name, own in groups.items():
        fine = _once([row for row in own if row.loss is not None])
        if fine:
            made[name] = Family(fine, [row for row in own if row.loss is None], count)
    return dict(sorted(made.items(), key=lambda item: (-len(item[1].models), -len(item[1].rows), item[0])))


def usual_tasks(rows: Iterable[Row]) -> str:
    """The `Row.tasks` of most models, then of most rows; "" where none has any."""
    sets: dict[str, list[Row]] = {}
    for row in rows:
        if row.accuracy is not None:
            sets.setdefault(row.tasks, []).append(row)
    order = sorted(sets, key=lambda name: (-len({r.fingerprint for r in sets[name]}), -len(sets[name]), name))
    return order[0] if order else ""


def _once(rows: Sequence[Row]) -> list[Row]:
    """Without the rows that a sweep with other tasks made again: of those, the one with the usual tasks."""
    tasks, made = usual_tasks(rows), {}
    for row in sorted(rows, key=lambda row: row.tasks == tasks):
        versions = row.kbitc, row.torch, row.transformers
        made[(row.fingerprint, Series.of(row), row.treatment, row.calibration, versions)] = row
    kept = {id(row) for row in made.values()}
    return [row for row in rows if id(row) in kept]


def _resampled(items: Floats, seed: int = SEED) -> Floats:
    """``(1 + draws, rows)`` means of ``(rows, items)``: of all items, then of as many drawn ones."""
    count = items.shape[1]
    weights = np.random.default_rng(seed).multinomial(count, [1 / count] * count, DRAWS) / count
    return np.concatenate([items.mean(1)[None], weights @ items.T])


def between(first: Curve, second: Curve) -> Interval | None:
    """The mean of second minus first where both are, over the logarithm of the bits."""
    low = max(first.bits[0], second.bits[0])
    high = min(first.bits[-1], second.bits[-1])
    if low >= high:
        return None
    places = np.geomspace(low, high, PLACES)
    return Interval.of((second.at(places) - first.at(places)).mean(1))


@dataclass(frozen=True)
class Best:
    """Which precision is best at which budget.

    Attributes:
        places: bits at which at least two precisions have a curve.
        winners: the best precision at each.
        shares: by precision, of the logarithmic axis where all of them have a curve, or where at least two
            have, if all nowhere have.
    """

    places: Floats
    winners: Sequence[int]
    shares: Mapping[int, Interval]


def best_precision(curves: Mapping[int, Curve]) -> Best | None:
    """The precision of lowest loss wherever at least two have a curve; None where nowhere two have."""
    if len(curves) < 2:
        return None
    low = min(curve.bits[0] for curve in curves.values())
    high = max(curve.bits[-1] for curve in curves.values())
    places = np.geomspace(low, high, 4 * PLACES)
    names = list(curves)
    losses = np.stack([curve.at(places) for curve in curves.values()])
    is_there = ~np.isnan(losses[:, 0])
    compared = is_there.sum(axis=0) >= 2
    if not compared.any():
        return None
    everywhere = is_there.sum(axis=0) == len(names)
    counted = everywhere[compared] if everywhere.any() else compared[compared]
    winners = np.where(np.isnan(losses), math.inf, losses)[:, :, compared].argmin(0)
    shares = {name: Interval.of((winners[:, counted] == i).mean(1)) for i, name in enumerate(names)}
    return Best(places[compared], [names[i] for i in winners[0]], shares)
