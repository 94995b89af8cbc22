"""How sure a mean is, and a difference of two models that were scored on the same items.

The one thing to know: two models fail at the same hard items, so that their difference is surer than either
figure; it is taken item by item (windows of a text, examples of a task, pairs), and the items are resampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
CHUNK = 2**24  # of the numbers that resampling holds at once


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences, and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Of lower-is-better figures: "lower", "higher", or "even" where the interval holds 0."""
        if self.high < 0:
            return "lower"
        return "higher" if self.low > 0 else "even"

    def to_json(self) -> dict[str, float]:
        """As ``kbitc eval --json`` prints it."""
        return {"mean": self.mean, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def paired(
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """Ours minus theirs, with the interval of a percentile bootstrap over items.

    Args:
        ours: one figure an item.
        theirs: of the same items, in the same order.
        weights: of the items in the mean, tokens for example; equal by default.
        draws: resamples of the items, with replacement.
        seed: of the draws.

    Raises:
        ValueError: not of the same items, or none.
    """
    means, mean = _resampled(ours, theirs, weights, draws, np.random.default_rng(seed))
    return _interval(means, mean)


def paired_mean(
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]], *, draws: int = DRAWS, seed: int = 0
) -> Difference:
    """The mean over tasks of ours minus theirs; the items of each task are resampled by themselves.

    Args:
        pairs: ours and theirs of each task, as of :func:`paired`.
        draws: resamples.
        seed: of the draws.

    Raises:
        ValueError: no tasks, or one whose items do not pair.
    """
    if not pairs:
        raise ValueError("no tasks to take the mean of")
    random = np.random.default_rng(seed)
    tasks = [_resampled(ours, theirs, None, draws, random) for ours, theirs in pairs]
    means = np.mean([means for means, _ in tasks], axis=0)
    return _interval(means, float(np.mean([mean for _, mean in tasks])))


def _resampled(
    ours: Sequence[float],
    theirs: Sequence[float],
    weights: Sequence[float] | None,
    draws: int,
    random: np.random.Generator,
) -> tuple[NDArray[Any], float]:
    """The mean difference in each resample, and in the items themselves."""
    if len(ours) != len(theirs) or not len(ours):
        raise ValueError(f"{len(ours)} and {len(theirs)} windows cannot be paired")
    differences = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    shares = np.ones(len(differences)) if weights is None else np.asarray(weights, np.float64)
    weighted = differences * shares
    rows = max(1, CHUNK // len(differences))
    means = []
    for start in range(0, draws, rows):
        drawn = random.integers(0, len(differences), (min(rows, draws - start), len(differences)))
        means.append(weighted[drawn].sum(1) / shares[drawn].sum(1))
    return np.concatenate(means), float(weighted.sum() / shares.sum())


def _interval(means: NDArray[Any], mean: float) -> Difference:
    low, high = np.quantile(means, (0.025, 0.975))
    return Difference(mean, float(low), float(high))


def standard_error(values: Sequence[float], weights: Sequence[float] | None = None) -> float | None:
    """Of a mean over items, weighted if weights are given (that of a ratio, linearized).

    Args:
        values: one figure an item.
        weights: of the items; equal by default.

    Returns:
        None of fewer than two items, which say nothing of it.

    >>> standard_error([0.0, 1.0, 1.0, 0.0])
    0.28867513459481287
    """
    count = len(values)
    if count < 2:
        return None
    shares = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    data = np.asarray(values, np.float64)
    residuals = (data - (data * shares).sum() / shares.sum()) * shares / shares.mean()
    return float(math.sqrt((residuals**2).sum() / (count - 1) / count))


def mean_of_tasks(tasks: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """The mean over tasks of each one's mean over items, and its standard error, tasks being independent.

    Args:
        tasks: at least one, each of at least one figure an item.

    Returns:
        Mean and standard error; None for the error where a task has one item.

    >>> mean_of_tasks([[1.0, 1.0], [0.0, 1.0, 1.0, 0.0]])
    (0.75, 0.14433756729740643)
    """
    mean = sum(sum(items) / len(items) for items in tasks) / len(tasks)
    errors = [standard_error(items) for items in tasks]
    known = [error for error in errors if error is not None]
    total = sum(error**2 for error in known) ** 0.5 / len(tasks)
    return mean, total if len(known) == len(tasks) else None
