"""Intervals and standard errors by their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from kbitc.evaluation import intervals
from kbitc.evaluation.intervals import paired, paired_mean, standard_error

RANDOM = np.random.default_rng(3)


def test_the_error_of_a_mean():
    values = RANDOM.normal(size=37)
    assert standard_error(values) == pytest.approx(values.std(ddof=1) / np.sqrt(37), rel=1e-12)
    assert standard_error(values, [2] * 37) == pytest.approx(standard_error(values), rel=1e-12)
    assert standard_error([1.0]) is None


def test_the_error_of_a_weighted_mean_is_that_of_many_samples():
    """Of a ratio, it is right for many items; the spread of 2000 samples says how large it is."""
    means, errors = [], []
    for _ in range(2000):
        weights = RANDOM.integers(1, 30, 200)
        values = RANDOM.normal(size=200) / np.sqrt(weights)
        means.append((values * weights).sum() / weights.sum())
        errors.append(standard_error(values, weights))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.06)


def test_intervals_hold_the_truth():
    """95 % of them, where both models share what makes an item hard."""
    held = weighed = averaged = 0
    for i in range(200):
        hard = RANDOM.normal(size=(2, 60)) * 5
        weights = RANDOM.integers(1, 9, 60)
        ours, theirs = hard + 0.5 + RANDOM.normal(size=(2, 60)), hard + RANDOM.normal(size=(2, 60))
        held += (found := paired(ours[0], theirs[0], draws=800, seed=i)).low < 0.5 < found.high
        weighed += (found := paired(ours[0], theirs[0], weights=weights, draws=800)).low < 0.5 < found.high
        averaged += (
            (found := paired_mean(list(zip(ours, theirs, strict=True)), draws=800)).low < 0.5 < found.high
        )
    assert min(held, weighed, averaged) >= 178


def test_weights_count():
    assert paired([1.0, 0.0], [0.0, 0.0], weights=[3, 1]).mean == 0.75
    assert paired_mean([([1, 1], [0, 0]), ([0, 0, 0], [0, 0, 0])]).mean == 0.5
    with pytest.raises(ValueError, match="no tasks"):
        paired_mean([])


def test_many_items_are_resampled_in_parts(monkeypatch):
    ours, theirs = RANDOM.normal(size=(2, 50))
    whole = paired(ours, theirs, draws=4000)
    monkeypatch.setattr(intervals, "CHUNK", 50 * 7)
    parts = paired(ours, theirs, draws=4000)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), abs=0.05)
