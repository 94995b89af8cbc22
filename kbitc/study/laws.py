"""The laws that losses are fitted to: their values, where a fit begins, and shapes that they have not.

power   L = E + A (x / x0)^-alpha                                    x: total bits, one fit a precision
joint   L = E + A (N / N0)^-alpha + C (N / N0)^-delta e^(-gamma k)   N: parameters, k: bits of a code
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]

STEEPEST = 5.0  # logarithm of the largest exponent


@dataclass(frozen=True)
class Form:
    """A law.

    Attributes:
        name: of it.
        equation: for people.
        parameters: names, in order.
        logged: those that are positive, and fitted by their logarithms.
        value: ``(parameters, x, k) -> log L``, ``x`` relative to its geometric mean.
        starts: ``(x, k, losses) -> parameters`` to begin from.
        beyond: ``(x, k) -> columns``: shapes that the law has not, by which another one is noticed.
    """

    name: str
    equation: str
    parameters: tuple[str, ...]
    logged: tuple[bool, ...]
    value: Callable[[Floats, Floats, Floats], Floats]
    starts: Callable[[Floats, Floats, Floats], list[Floats]]
    beyond: Callable[[Floats, Floats], Floats]

    def natural(self, fitted: Floats) -> Floats:
        """Parameters as the equation has them."""
        return np.where(self.logged, np.exp(fitted), fitted)


def _power_value(p: Floats, x: Floats, k: Floats) -> Floats:
    del k
    return np.asarray(np.logaddexp(p[0], p[1] - np.exp(min(p[2], STEEPEST)) * np.log(x)))


def _power_starts(x: Floats, k: Floats, losses: Floats) -> list[Floats]:
    del x, k
    low, middle = losses.min(), float(np.median(losses))
    return [
        np.log([share * low, max(middle - share * low, 1e-3 * low), alpha])
        for share, alpha in itertools.product((0.2, 0.5, 0.8, 0.95), (0.15, 0.4, 1.0))
    ]


def _joint_value(p: Floats, x: Floats, k: Floats) -> Floats:
    size = np.log(x)
    clean = _power_value(p[:3], x, k)
    return np.asarray(np.logaddexp(clean, p[3] - p[4] * size - np.exp(min(p[5], STEEPEST)) * k))


def _joint_starts(x: Floats, k: Floats, losses: Floats) -> list[Floats]:
    finest = k == k.max()
    clean = _power_starts(x[finest], k[finest], losses[finest])
    coarse = losses[k == k.min()].mean() - losses[finest].mean()
    starts = []
    for own, gamma in itertools.product(clean[::2], (0.7, 1.4)):
        starts.append(np.array([*own, math.log(max(coarse, 1e-3)) + gamma * k.min(), 0.0, math.log(gamma)]))
    return starts


def _waves(x: Floats, *, degrees: Sequence[int]) -> Floats:
    """Legendre polynomials of log x, scaled to [-1, 1]."""
    z = np.log(x)
    z = (2 * z - z.min() - z.max()) / max(z.max() - z.min(), 1e-12)
    return np.stack([np.polynomial.Legendre.basis(degree)(z) for degree in degrees], 1)


def _joint_beyond(x: Floats, k: Floats) -> Floats:
    waves, steps = _waves(x, degrees=(1, 3)), _waves(np.exp(k), degrees=(1, 2))
    return np.concatenate([waves[:, 1:], steps[:, 1:], waves[:, :1] * steps[:, :1]], 1)


POWER = Form(
    "power law",
    "L = E + A (x / x0)^-α",
    ("E", "A", "α"),
    (True, True, True),
    _power_value,
    _power_starts,
    lambda x, _: _waves(x, degrees=(3,)),
)
JOINT = Form(
    "joint form",
    "L = E + A (N / N0)^-α + C (N / N0)^-δ e^(-γ k)",
    ("E", "A", "α", "C", "δ", "γ"),
    (True, True, True, True, False, True),
    _joint_value,
    _joint_starts,
    _joint_beyond,
)
