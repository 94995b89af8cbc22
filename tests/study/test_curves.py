"""Curves, the best precision and the paper's claims, on tables whose answers are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kbitc.study.claims import NOT_REPRODUCED, NOT_TESTABLE, REPRODUCED, judged, reference_of
from kbitc.study.curves import PAPER, TOTAL, Curve, Series, best_precision, between, families


def curve(bits, losses):
    return Curve(np.asarray(bits, float), np.tile(np.asarray(losses, float), (3, 1)))


def family_of(rows, count=TOTAL):
    (family,) = families(rows, count).values()
    return family


def verdicts(rows, count=PAPER):
    family = family_of(rows, count)
    return {claim.text: claim for claim in judged(family, reference_of(family))}


def of(claims, word):
    return next(claim for text, claim in claims.items() if word in text)


def test_lines_are_straight_over_the_logarithm_of_the_bits():
    own = curve([2, 8], [3.0, 1.0])
    assert own.at(np.array([4.0]))[0, 0] == pytest.approx(2.0)
    assert np.isnan(own.at(np.array([1.0, 9.0]))).all()
    gap = between(own, curve([4, 16], [2.5, 0.5]))
    assert gap.value == pytest.approx(0.5)
    assert between(own, curve([16, 32], [1, 1])) is None


def test_the_best_precision_is_told_where_two_compare():
    best = best_precision({3: curve([1, 8], [4, 1]), 4: curve([2, 16], [3.9, 0])})
    assert best.places[0] >= 2
    assert best.places[-1] <= 8
    assert best.winners[0] == 3
    assert sum(share.value for share in best.shares.values()) == pytest.approx(1)
    assert best_precision({3: curve([1, 2], [1, 1]), 4: curve([4, 8], [1, 1])}) is None


def test_every_resample_of_windows_is_one_of_all_rows(rows):
    family = family_of(rows)
    plain = np.array([row.losses for row in family.rows])
    assert family.samples[0] == pytest.approx(plain.mean(1))
    gaps = family.samples[1:, 0] - family.samples[1:, 1]
    assert gaps.std() < 1e-12, "rows that differ by a constant differ by it in every resample"


def test_the_reference_is_the_papers_float(rows):
    assert reference_of(family_of(rows)) == Series("fp+paper", 64, "absmax", "linear")


def test_claims_of_a_table_made_for_them(rows):
    claims = verdicts(rows)
    assert of(claims, "smaller blocks").verdict == REPRODUCED
    assert of(claims, "float and quantile").verdict == REPRODUCED
    assert of(claims, "centring").verdict == NOT_TESTABLE
    assert "--mean" in of(claims, "centring").evidence
    assert of(claims, "outlier").verdict == NOT_TESTABLE
    assert of(claims, "zero-shot").verdict == NOT_TESTABLE
    assert "shares of the axis" in of(claims, "4 bits have").evidence


def with_losses(rows, change):
    """Rows whose losses are shifted, and their windows with them."""
    made = []
    for row in rows:
        by = change(row)
        made.append(replace(row, loss=row.loss + by, losses=[loss + by for loss in row.losses]))
    return made


def test_four_bits_are_best_where_they_are(rows):
    worse = {3: 0.8, 4: -0.2, 5: 0.05, 6: 0.1, 7: 0.1, 8: 0.1}
    claims = verdicts(with_losses(rows, lambda row: worse.get(row.bits, 0.0)))
    assert of(claims, "4 bits have").verdict == REPRODUCED
    claims = verdicts(with_losses(rows, lambda row: -0.9 if row.bits == 3 else 0.0))
    assert of(claims, "4 bits have").verdict == NOT_REPRODUCED


def test_types_the_other_way_round(rows):
    claims = verdicts(with_losses(rows, lambda row: 0.5 if row.type in ("fp+paper", "quantile") else 0.0))
    assert of(claims, "float and quantile").verdict == NOT_REPRODUCED


@pytest.mark.parametrize("gain,verdict", [(-0.05, NOT_REPRODUCED), (0.0, REPRODUCED), (0.02, REPRODUCED)])
def test_centring(rows, gain, verdict):
    plain = [row for row in rows if row.type == "int" and row.block == 64]
    centred = [replace(row, has_mean=True, key=row.key + "m", format=f"{row.format}+mean") for row in plain]
    assert of(verdicts(rows + with_losses(centred, lambda _: gain)), "centring").verdict == verdict


@pytest.mark.parametrize("three,four,verdict", [
    (-0.5, 0.0, REPRODUCED), (-0.5, -0.5, NOT_REPRODUCED), (0.0, 0.0, NOT_REPRODUCED),
])  # fmt: skip
def test_outliers_at_equal_bits(rows, three, four, verdict):
    plain = [row for row in rows if row.type == "int" and row.block == 64 and row.bits in (3, 4)]
    kept = [replace(row, outliers=2.0, key=row.key + "o", paper_bits=row.paper_bits * 1.06) for row in plain]
    gains = {3: three, 4: four}
    claims = verdicts(rows + with_losses(kept, lambda row: gains[row.bits]))
    assert of(claims, "outlier").verdict == verdict


def test_a_better_quantizer_below_four_bits(rows):
    plain = [row for row in rows if row.type == "int" and row.block == 64 and row.bits in (3, 4, 5)]
    better = [replace(row, quantizer="feedback", key=row.key + "f") for row in plain]
    won = verdicts(rows + with_losses(better, lambda row: -0.9 if row.bits == 3 else 0.0))
    lost = verdicts(rows + with_losses(better, lambda row: 0.9 if row.bits == 3 else 0.0))
    assert of(won, "(ours)").verdict == REPRODUCED
    assert of(lost, "(ours)").verdict == NOT_REPRODUCED


def test_models_of_several_families_are_kept_apart(rows):
    other = [replace(row, family="gpt2-1", key=row.key + "x") for row in rows[:8]]
    assert [len(own.rows) for own in families(rows + other).values()] == [len(rows), 8]
