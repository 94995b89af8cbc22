"""The fitter against data of known laws: intervals that cover, and other laws that are noticed."""

from __future__ import annotations

import numpy as np
import pytest

from kbitc.study.fits import NoFit, fit
from kbitc.study.laws import JOINT, POWER

SIZES = 2.0 ** np.arange(8) * 1e5
BITS = np.arange(3, 9)
NOISE = 0.005


def power_data(random, noise=NOISE, count=8):
    x = SIZES[:count]
    clean = 2.0 + 1.2 * (x / np.exp(np.log(x).mean())) ** -0.35
    return range(count), x, np.full(count, 4.0), clean * np.exp(noise * random.standard_normal(count))


def joint_data(random, noise=NOISE, count=8):
    n, k = (each.ravel() for each in np.meshgrid(SIZES[:count], BITS, indexing="ij"))
    size = n / np.exp(np.log(n).mean())
    clean = 2.0 + 1.2 * size**-0.35 + 8.0 * size**0.1 * np.exp(-1.1 * k)
    return n, n, k, clean * np.exp(noise * random.standard_normal(len(n)))


TRUTH = {
    POWER: {"E": 2.0, "A": 1.2, "α": 0.35},
    JOINT: {"E": 2.0, "A": 1.2, "α": 0.35, "C": 8.0, "δ": -0.1, "γ": 1.1},
}
LAWS = [(POWER, power_data), (JOINT, joint_data)]


def measured(form, make, seed):
    data = make(np.random.default_rng(seed))
    return fit(form, *data, NOISE * data[3], draws=0)


def covered(form, make, draws):
    hits, flagged = dict.fromkeys(form.parameters, 0), 0
    for seed in range(draws):
        fitted = measured(form, make, seed)
        flagged += bool(fitted.warning)
        for name, true in TRUTH[form].items():
            hits[name] += fitted.parameters[name].low <= true <= fitted.parameters[name].high
    return hits, flagged


@pytest.mark.slow
@pytest.mark.parametrize("form,make", LAWS, ids=["power", "joint"])
def test_intervals_cover_each_parameter_in_90_of_100_draws(form, make):
    hits, flagged = covered(form, make, 100)
    assert min(hits.values()) >= 90, hits
    assert flagged <= 12


def test_intervals_of_a_few_draws():
    hits, _ = covered(POWER, power_data, 10)
    assert min(hits.values()) >= 8, hits


@pytest.mark.parametrize("form,make", LAWS, ids=["power", "joint"])
def test_exact_data_give_the_law_back(form, make):
    fitted = fit(form, *make(np.random.default_rng(0), noise=0.0), draws=0)
    for name, true in TRUTH[form].items():
        assert fitted.parameters[name].value == pytest.approx(true, rel=1e-3), name
    assert not fitted.warning
    assert fitted.held_out.error < 1e-3


def step(random):
    models, x, k, losses = power_data(random)
    return models, x, k, losses * np.where(np.arange(len(x)) % 8 >= 5, 1.15, 1.0)  # large ones are broken


def growing(random):
    models, x, k, losses = power_data(random)
    return models, x, k, losses[::-1].copy()


def two_slopes(random):
    models, x, k, _ = power_data(random)
    z = np.log(x / x[4])
    return (
        models,
        x,
        k,
        np.exp(1.2 - 0.02 * z - 0.3 * np.maximum(z, 0)) * (1 + 0.003 * random.standard_normal(8)),
    )


def unstable(random):
    n, _, k, losses = joint_data(random)
    return n, n, k, losses * np.where((k == 3) & (n > SIZES[4]), 1.4, 1.0)  # 3 bits fail at size (C4)


@pytest.mark.parametrize(
    "form,make",
    [(POWER, step), (POWER, growing), (POWER, two_slopes), (JOINT, unstable)],
    ids=["step", "growing", "two slopes", "unstable"],
)
def test_data_of_another_law_are_flagged(form, make):
    flagged = [bool(measured(form, make, seed).warning) for seed in range(2)]
    assert all(flagged)


def test_too_few_sizes_are_no_fit():
    models, x, k, losses = power_data(np.random.default_rng(0), count=3)
    none = fit(POWER, models, x, k, losses)
    assert isinstance(none, NoFit)
    assert "3 models" in none.reason
    assert "4 sizes" in none.reason


def test_resampling_models_is_reproducible_and_holds_the_estimate():
    data = power_data(np.random.default_rng(3))
    first, again = (fit(POWER, *data, draws=40, seed=5) for _ in range(2))
    assert first.parameters == again.parameters
    assert first.draws > 20
    alpha = first.parameters["α"]
    assert alpha.models_low < alpha.value < alpha.models_high
