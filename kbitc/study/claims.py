"""What the k-bit paper says, held against a table: reproduced, not reproduced, or not testable here.

The one thing to know: "reproduced" and "not reproduced" need an interval that excludes the opposite; where an
interval holds both, or the jobs were not run, the claim is not testable with this table, and why is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from kbitc.study.curves import LOSS, Best, Family, Interval, Series, best_precision, between
from kbitc.study.laws import Floats

REPRODUCED, NOT_REPRODUCED, NOT_TESTABLE = "reproduced", "not reproduced", "not testable here"
FLOATS, QUANTILES, PLAINS = ("fp", "fp+paper"), ("quantile", "quantile+paper"), ("int", "dynamic")
OURS = ("bof", "learned")
FINE = (6, 7, 8)
FEWEST_PAIRS = 5  # jobs that a correlation is told of


@dataclass(frozen=True)
class Claim:
    """One of the paper's, and the answer.

    Attributes:
        text: what it says.
        verdict: one of the three.
        evidence: figures, with intervals.
    """

    text: str
    verdict: str
    evidence: str


Judge = Callable[[Family, Series], tuple[str, str]]


def judged(family: Family, reference: Series) -> list[Claim]:
    """Every claim.

    Args:
        family: of at least two models.
        reference: data type and block size where one is held and something else varies.
    """
    return [Claim(text, *judge(family, reference)) for text, judge in CLAIMS.items()]


def reference_of(family: Family) -> Series | None:
    """The series to compare precisions at: the paper's float at blocks of 64, or what comes next to it."""
    plain = [series for series in family.series if series.is_plain]
    order = [*FLOATS[::-1], "nf", "int"]

    def rank(series: Series) -> tuple[object, ...]:
        place = order.index(series.type) if series.type in order else len(order)
        jobs = sum(Series.of(row) == series for row in family.rows)
        return series.quantizer != "absmax", place, abs(series.block - 64), -jobs, str(series)

    return min(plain, key=rank, default=None)


def _four_is_best(family: Family, reference: Series) -> tuple[str, str]:
    curves = family.curves(reference)
    others = {k: between(curves[4], curves[k]) for k in (3, 5, 6, 8) if k in curves} if 4 in curves else {}
    found = {k: gap for k, gap in others.items() if gap is not None}
    if not found:
        return NOT_TESTABLE, "no two models at 4 bits and at another precision share a range of bits"
    shares = best_precision(curves)
    best = "" if shares is None else f"; shares of the axis won: {_told(shares)}"
    said = "; ".join(f"{k} bits minus 4: {gap}" for k, gap in found.items())
    return _above_zero(found.values(), is_all=len(found) == 4), f"{reference}: {said}{best}"


def _floats_above_int(family: Family, reference: Series) -> tuple[str, str]:
    gaps: dict[str, Interval] = {}
    for better in (*FLOATS, *QUANTILES):
        for plain in PLAINS:
            pairs = [
                ((own, 4), (other, 4))
                for own in _like(family, reference, better)
                for other in _like(family, reference, plain)
                if own.block == other.block
            ]
            gap = family.paired(*zip(*pairs, strict=True)) if pairs else None
            if gap is not None:
                gaps[f"{plain} minus {better}"] = gap
    has_all = all(any(n.endswith(f" {b}") for b in kind for n in gaps) for kind in (FLOATS, QUANTILES))
    said = "; ".join(f"{name}: {gap}" for name, gap in gaps.items())
    if not gaps:
        return NOT_TESTABLE, "the table has not float or quantile beside int or dynamic at 4 bits"
    verdict = _above_zero(gaps.values(), is_all=has_all)
    return verdict, f"at 4 bits, the same models and blocks: {said}"


def _small_blocks(family: Family, reference: Series) -> tuple[str, str]:
    blocks = sorted({s.block for s in family.series if s.is_plain and s.quantizer == reference.quantizer})
    if len(blocks) < 2:
        return NOT_TESTABLE, "the table has one block size"
    small, large = blocks[0], blocks[-1]
    gains = {}
    for name, bits in (("4 bits", (4,)), ("6 to 8 bits", FINE)):
        pairs = [
            ((own, k), (other, k))
            for own in family.series
            for other in family.series
            for k in bits
            if own.is_plain and other.is_plain and own.block == small and other.block == large
            and (own.type, own.quantizer, own.scope, own.is_flat)
            == (other.type, other.quantizer, other.scope, other.is_flat)
        ]  # fmt: skip
        gain = family.paired(*zip(*pairs, strict=True)) if pairs else None
        if gain is not None:
            gains[name] = gain
    said = f"loss at blocks of {large} minus {small}: " + "; ".join(f"{n}: {g}" for n, g in gains.items())
    if len(gains) < 2:
        return NOT_TESTABLE, said
    four, fine = gains.values()
    if four.low > 0 and fine.high < four.low:
        return REPRODUCED, said
    return (NOT_REPRODUCED if four.high < 0 or fine.low > four.high else NOT_TESTABLE), said


def _centring(family: Family, _: Series) -> tuple[str, str]:
    centred = [series for series in family.series if series.has_mean]
    pairs = [((_without(series), k), (series, k)) for series in centred for k in family.precisions(series)]
    gap = family.paired(*zip(*pairs, strict=True)) if pairs else None
    if gap is None:
        return NOT_TESTABLE, "no job was centred (--mean)"
    verdict = NOT_REPRODUCED if gap.high < 0 else REPRODUCED
    return verdict, f"centred minus plain, all precisions and types: {gap}"


def _outliers(family: Family, _: Series) -> tuple[str, str]:
    kept = [series for series in family.series if series.outliers]
    said, gains = [], {}
    for bits in (3, 4):
        gaps = []
        for series in kept:
            without, own = family.curve(_without(series), bits), family.curve(series, bits)
            gap = None if without is None or own is None else between(without, own)
            if gap is not None:
                gaps.append(gap)
                said.append(f"{series.type}{bits}: {gap}")
        gains[bits] = gaps
    if not gains[3] or not gains[4]:
        return NOT_TESTABLE, "no jobs with and without outlier features (--outliers proxy:2%) at 3 and 4 bits"
    text = "with outliers minus without, at equal bits: " + "; ".join(said)
    three, four = all(g.high < 0 for g in gains[3]), any(g.high < 0 for g in gains[4])
    if three and not four:
        return REPRODUCED, text
    is_open = any(g.low < 0 < g.high for g in gains[3])
    return (NOT_TESTABLE if is_open and not four else NOT_REPRODUCED), text


def _below_four(family: Family, reference: Series) -> tuple[str, str]:
    said, wins = [], False
    for series in family.series:
        if series.quantizer == "absmax" and series.type not in OURS:
            continue
        best = best_precision(family.curves(series))
        if best is None or min(best.shares) >= 4 or max(best.shares) < 4:
            continue
        wins |= any(share.low > 0.5 for bits, share in best.shares.items() if bits < 4)
        said.append(f"{series}: {_told(best)}")
    if not said:
        return NOT_TESTABLE, "no jobs of feedback, weighted, bof or learned at 4 bits and below"
    plain = best_precision(family.curves(reference))
    compared = [] if plain is None else [f"for comparison {reference}: {_told(plain)}"]
    return (REPRODUCED if wins else NOT_REPRODUCED), "shares of the axis won: " + "; ".join(said + compared)


def _told(best: Best) -> str:
    return ", ".join(
        f"{bits} bits {100 * share.value:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}]"
        for bits, share in best.shares.items()
    )


def _zero_shot(family: Family, reference: Series) -> tuple[str, str]:
    scored = family.by_accuracy()
    if scored is None:
        return NOT_TESTABLE, "the table has no zero-shot accuracies (kbitc sweep --tasks)"
    own = correlation(scored)
    if own is None:
        return NOT_TESTABLE, f"fewer than {FEWEST_PAIRS} jobs have accuracies, or all have the same one"
    best = best_precision(scored.curves(reference))
    told = "" if best is None else f"; shares of the axis won by accuracy: {_told(best)}"
    said = f"Pearson's r of loss and mean accuracy over {len(scored.rows)} jobs: {own}{told}"
    said += f"; on {scored.rows[0].tasks}"
    if own.high < 0:
        return REPRODUCED, said
    return (NOT_REPRODUCED if own.low > 0 else NOT_TESTABLE), said


def correlation(scored: Family) -> Interval | None:
    """Pearson's r of loss and mean accuracy, over resampled models, windows and examples.

    Args:
        scored: a family of accuracies.

    Returns:
        None of too few jobs, or where all have one loss or one accuracy.
    """
    losses, wrong = replace(scored, measure=LOSS).samples, scored.samples
    if len(scored.rows) < FEWEST_PAIRS or np.ptp(losses[0]) == 0 or np.ptp(wrong[0]) == 0:
        return None
    places = [np.flatnonzero([row.fingerprint == m for row in scored.rows]) for m in scored.models]
    chosen = np.random.default_rng(0).integers(0, len(places), (len(losses) - 1, len(places)))
    taken = [np.arange(len(scored.rows)), *(np.concatenate([places[i] for i in draw]) for draw in chosen)]
    found = [_pearson(a[own], 1 - b[own]) for a, b, own in zip(losses, wrong, taken, strict=True)]
    return Interval.of(np.array(found))


def _pearson(first: Floats, second: Floats) -> float:
    """0 where one does not vary, which a resample may come to: it says nothing of the other then."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


CLAIMS: dict[str, Judge] = {
    "4 bits have the lowest loss at a given number of bits, against 3, 5, 6 and 8": _four_is_best,
    "float and quantile types are above int and dynamic at 4 bits": _floats_above_int,
    "smaller blocks help at 4 bits, and hardly at 6 to 8": _small_blocks,
    "centring does not help": _centring,
    "outlier features of the proxy help at 3 bits, and not at 4": _outliers,
    "perplexity and zero-shot accuracy agree": _zero_shot,
    "(ours) with better quantizers and types the best precision is below 4 bits": _below_four,
}
"""What is asked, and who answers it."""


def _above_zero(gaps: Iterable[Interval], *, is_all: bool) -> str:
    """Whether all differences are positive; ``is_all``: whether they are all that the claim is of."""
    own = list(gaps)
    if any(gap.high < 0 for gap in own):
        return NOT_REPRODUCED
    return REPRODUCED if is_all and all(gap.low > 0 for gap in own) else NOT_TESTABLE


def _like(family: Family, reference: Series, type_: str) -> list[Series]:
    """Plain series of a data type that are as the reference is but for the block."""
    return [
        series
        for series in family.series
        if series.is_plain and series.type == type_ and series.quantizer == reference.quantizer
        and series.is_flat == reference.is_flat
    ]  # fmt: skip


def _without(series: Series) -> Series:
    """The plain one."""
    return Series(series.type, series.block, series.quantizer, series.scope, is_flat=series.is_flat)
