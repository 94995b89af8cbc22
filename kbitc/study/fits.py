"""Scaling laws fitted to what was measured, with intervals, and told when the data are of another law.

The one thing to know: residuals are of log L, under a Huber loss whose corner is 1.345 robust standard
deviations (first 1e-3, as in 2203.15556, from every start; then once more from the best). Intervals of 95 %
are Student's, of the Gauss-Newton covariance; those that resample whole models stand beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares
from scipy.stats import chi2
from scipy.stats import f as f_distribution
from scipy.stats import t as t_distribution

from kbitc.study.laws import Floats, Form

FEWEST_SIZES = 4
"""Models of different size, below which there is no fit."""
CORNER = 1e-3
EFFICIENT = 1.345  # robust standard deviations: 95 % of the efficiency of least squares on Gaussian noise
STEPS = 200
DRAWS = 200
LEVEL = 0.95
SIGNIFICANT = 0.01
"""Probability below which data of the law itself would show such a misfit."""
VANISHED = 1e-3  # of the lowest loss, below which E is 0
LEAST_EXPLAINED = 0.5
"""R² below which losses do not follow x as the law says."""
MANY, FAR = 20, 6.0
"""Points from which on single ones are told, and robust standard deviations at which they are."""
SAME = 1e-3  # relative difference of objectives that are one optimum


@dataclass(frozen=True)
class Parameter:
    """A fitted number.

    Attributes:
        value: of it.
        low: of the 95 % interval, from the residuals.
        high: the same.
        models_low: of the 95 % interval, from resampled models.
        models_high: the same.
    """

    value: float
    low: float
    high: float
    models_low: float = math.nan
    models_high: float = math.nan


@dataclass(frozen=True)
class HeldOut:
    """The largest model, predicted from all others.

    Attributes:
        error: largest relative error of a predicted loss.
        is_within: whether every loss is within its 95 % prediction interval.
    """

    error: float
    is_within: bool


@dataclass(frozen=True)
class Fitted:
    """A law, fitted.

    Attributes:
        form: the law.
        parameters: by name.
        scale: x0 or N0, the geometric mean of what was fitted.
        points: how many.
        sizes: models of different size among them.
        spread: standard deviation of the residuals of log L.
        explained: R² of log L.
        starts: how many were tried.
        reached: how many of them ended at the best optimum.
        misfit: probability that data of the law deviate as these do.
        excess: probability that data of the law, measured with the errors that were given, lie as far from
            it; 1 where none were given.
        strays: points far from all others, where there are many.
        held_out: extrapolation to the largest model; None of too few others.
        fitted: parameters as they were fitted, see `Form.logged`.
        draws: of the bootstrap that could be fitted.
    """

    form: Form
    parameters: Mapping[str, Parameter]
    scale: float
    points: int
    sizes: int
    spread: float
    explained: float
    starts: int
    reached: int
    misfit: float
    excess: float
    strays: int
    held_out: HeldOut | None
    fitted: Floats = field(repr=False)
    draws: int = 0

    @property
    def warning(self) -> str:
        """Why the data seem to be of another law; "" where they do not."""
        if self.explained < LEAST_EXPLAINED:
            return f"the losses do not fall as the law says (R² = {self.explained:.2f})"
        if self.excess < SIGNIFICANT:
            return (
                f"the losses lie {100 * self.spread:.2g} % from the law, farther than they were measured "
                f"with (p = {self.excess:.2g})"
            )
        if self.parameters["E"].value < VANISHED:
            return "no E above 0 fits: the losses fall without end, or by another law"
        if self.strays:
            return f"{self.strays} of {self.points} points lie more than {FAR:g} standard deviations away"
        if self.misfit < SIGNIFICANT:
            return f"the residuals have a shape that the law has not (p = {self.misfit:.2g})"
        if self.held_out is not None and not self.held_out.is_within:
            return f"the largest model is {100 * self.held_out.error:.2g} % from its prediction"
        return ""

    def predict(self, x: Floats, k: Floats) -> Floats:
        """Losses at total bits or parameters ``x``, and bits of a code ``k``."""
        return np.exp(self.form.value(self.fitted, np.asarray(x) / self.scale, np.asarray(k)))


@dataclass(frozen=True)
class NoFit:
    """Why there is none."""

    reason: str


def fit(
    form: Form,
    models: Sequence[object],
    x: Sequence[float],
    k: Sequence[float],
    losses: Sequence[float],
    errors: Sequence[float] | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Fitted | NoFit:
    """Fit a law.

    Args:
        form: the law.
        models: which model each point is of.
        x: total bits or parameters of each point.
        k: bits of a code of each point.
        losses: nats per token.
        errors: standard errors of the losses; None where they are not known.
        draws: resamples of the models; 0 for none.
        seed: of the resamples.
    """
    names = np.unique(np.asarray([str(model) for model in models]), return_inverse=True)[1]
    data = _Data(form, names, np.asarray(x, float), np.asarray(k, float), np.asarray(losses, float))
    reason = data.why_not()
    if reason:
        return NoFit(reason)
    best, starts, reached = data.best()
    residuals, slopes = data.residuals(best), data.slopes(best)
    half = data.half_widths(residuals, slopes)
    own = form.natural(best), form.natural(best - half), form.natural(best + half)
    resampled = data.resampled(best, draws, seed)
    low, high = (
        np.quantile(resampled, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0)
        if len(resampled)
        else np.full((2, len(best)), math.nan)
    )
    parameters = {
        name: Parameter(*map(float, numbers))
        for name, *numbers in zip(form.parameters, *own, low, high, strict=True)
    }
    logs = np.log(data.losses)
    return Fitted(
        form,
        parameters,
        data.scale,
        len(logs),
        data.sizes,
        data.spread(residuals),
        float(1 - np.square(residuals).sum() / max(np.square(logs - logs.mean()).sum(), 1e-300)),
        starts,
        reached,
        data.misfit(residuals, slopes),
        1.0 if errors is None else data.excess(residuals, np.asarray(errors, float)),
        data.strays(best),
        data.held_out(),
        best,
        len(resampled),
    )


@dataclass(frozen=True)
class _Data:
    form: Form
    models: npt.NDArray[np.int64]
    x: Floats
    k: Floats
    losses: Floats
    given_scale: float = 0.0

    @property
    def scale(self) -> float:
        return self.given_scale or float(np.exp(np.log(self.x).mean()))

    @property
    def sizes(self) -> int:
        return len(np.unique(self.models))

    def why_not(self) -> str:
        if self.sizes < FEWEST_SIZES:
            return f"{self.sizes} models; a fit takes {FEWEST_SIZES} sizes or more"
        if len(self.losses) <= len(self.form.parameters):
            return f"{len(self.losses)} points for {len(self.form.parameters)} parameters; a fit takes more"
        return ""

    def picked(self, which: npt.NDArray[Any]) -> _Data:
        chosen = (self.models[which], self.x[which], self.k[which], self.losses[which])
        return _Data(self.form, *chosen, self.scale)

    def residuals(self, p: Floats) -> Floats:
        return self.form.value(p, self.x / self.scale, self.k) - np.log(self.losses)

    def slopes(self, p: Floats) -> Floats:
        step = 1e-6
        columns = [
            (self.residuals(p + step * unit) - self.residuals(p - step * unit)) / (2 * step)
            for unit in np.eye(len(p))
        ]
        return np.stack(columns, 1)

    def solved(self, start: Floats, corner: float) -> Any:
        return least_squares(self.residuals, start, self.slopes, loss="huber", f_scale=corner, max_nfev=STEPS)

    def best(self) -> tuple[Floats, int, int]:
        """The parameters, how many starts there were, and how many of them ended there."""
        ends = [self.solved(start, CORNER) for start in self.form.starts(self.x, self.k, self.losses)]
        lowest = min(ends, key=lambda end: float(end.cost))
        reached = sum(bool(end.cost <= lowest.cost * (1 + SAME) + 1e-15) for end in ends)
        return self.solved(lowest.x, self.corner(lowest.x)).x, len(ends), reached

    def corner(self, p: Floats) -> float:
        return max(EFFICIENT * self.robust_spread(p), 1e-9)

    def robust_spread(self, p: Floats) -> float:
        return 1.4826 * float(np.median(np.abs(self.residuals(p))))

    def strays(self, p: Floats) -> int:
        if len(self.losses) < MANY:
            return 0
        return int((np.abs(self.residuals(p)) > FAR * max(self.robust_spread(p), CORNER)).sum())

    @property
    def freedom(self) -> int:
        return len(self.losses) - len(self.form.parameters)

    def spread(self, residuals: Floats) -> float:
        return math.sqrt(float(np.square(residuals).sum()) / self.freedom)

    def half_widths(self, residuals: Floats, slopes: Floats) -> Floats:
        """Of the parameters' intervals."""
        variance = self.spread(residuals) ** 2 * np.diag(np.linalg.pinv(slopes.T @ slopes))
        return np.asarray(t_distribution.ppf((1 + LEVEL) / 2, self.freedom) * np.sqrt(variance))

    def misfit(self, residuals: Floats, slopes: Floats) -> float:
        """Probability, under the law, of residuals that follow other shapes as much as these."""
        extra = self.form.beyond(self.x, self.k)[:, : max(0, self.freedom - 1)]
        if not extra.shape[1]:
            return 1.0
        whole = np.concatenate([slopes, extra], 1)
        left, more = (_rest(residuals, columns) for columns in (slopes, whole))
        freedom = len(residuals) - int(np.linalg.matrix_rank(whole))
        used = int(np.linalg.matrix_rank(whole)) - int(np.linalg.matrix_rank(slopes))
        if freedom < 1 or used < 1 or left <= 1e-24:
            return 1.0
        ratio = ((left - more) / used) / max(more / freedom, 1e-30)
        return float(f_distribution.sf(ratio, used, freedom))

    def excess(self, residuals: Floats, errors: Floats) -> float:
        """Probability, under the law and these errors of the losses, of residuals as large as these."""
        return float(chi2.sf(np.square(residuals * self.losses / errors).sum(), self.freedom))

    def resampled(self, best: Floats, draws: int, seed: int) -> Floats:
        """Natural parameters of fits to resampled models, those with too few of them left out."""
        random, corner = np.random.default_rng(seed), self.corner(best)
        members = [np.flatnonzero(self.models == model) for model in np.unique(self.models)]
        made = []
        for _ in range(draws):
            chosen = random.integers(0, len(members), len(members))
            if len(np.unique(chosen)) < FEWEST_SIZES:
                continue
            data = self.picked(np.concatenate([members[i] for i in chosen]))
            made.append(self.form.natural(data.solved(best, corner).x))
        return np.asarray(made)

    def held_out(self) -> HeldOut | None:
        """Of the largest model, by its largest x."""
        largest = self.models == self.models[self.x.argmax()]
        rest = self.picked(~largest)
        if rest.why_not() or rest.freedom < 2:
            return None
        fitted = rest.best()[0]
        slopes, far = rest.slopes(fitted), self.picked(largest)
        error, there = far.residuals(fitted), far.slopes(fitted)
        lever = np.einsum("ij,jk,ik->i", there, np.linalg.pinv(slopes.T @ slopes), there)
        level = 1 - (1 - LEVEL) / len(error)  # of all of them together (Bonferroni)
        width = t_distribution.ppf((1 + level) / 2, rest.freedom) * rest.spread(rest.residuals(fitted))
        is_within = bool((np.abs(error) <= width * np.sqrt(1 + lever)).all())
        return HeldOut(float(np.abs(np.expm1(error)).max()), is_within)


def _rest(residuals: Floats, columns: Floats) -> float:
    """Sum of squares that columns do not explain."""
    solution = np.linalg.lstsq(columns, residuals, rcond=None)[0]
    return float(np.square(residuals - columns @ solution).sum())
