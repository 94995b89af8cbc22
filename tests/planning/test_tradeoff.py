"""The trade-off curve and what would change: against the exact allocator and brute force."""

from __future__ import annotations

import itertools
import random

import pytest

from kbitc.formats.spec import parse
from kbitc.planning import tradeoff
from kbitc.report.charts import Point, trade_off
from kbitc.sensitivity.score_table import Option, ScoreTable

SPECS = [parse(text) for text in ("int2:64", "int3:64", "int4:64", "int6:64", "int8:64", "fp16")]


def random_scores(seed, count=4):
    rng = random.Random(seed)
    options = {}
    for i in range(count):
        size, scale = rng.randrange(100, 900), rng.random()
        options[f"w{i}"] = tuple(
            Option(s, size * s.bits + rng.randrange(50), scale * 3.0**-s.bits * rng.uniform(0.7, 1.3), 0.1)
            for s in SPECS
        )
    return ScoreTable(options, dict.fromkeys(options, 999), 37, 999 * count + 5, "error", "relative")


def size(scores, chosen):
    return 8 * (sum(o.nbytes for o in chosen) + scores.fixed) / scores.parameters


@pytest.mark.parametrize("seed", range(8))
def test_the_curve_is_monotone_convex_and_below_every_plan(seed):
    scores = random_scores(seed)
    points = tradeoff.curve(scores)
    assert all(a.bits < b.bits and a.cost > b.cost for a, b in itertools.pairwise(points))
    slopes = [(b.cost - a.cost) / (b.bits - a.bits) for a, b in itertools.pairwise(points)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(slopes))
    for chosen in itertools.product(*scores.options.values()):
        bound = tradeoff.at(points, size(scores, chosen))
        if bound is not None:
            assert sum(o.cost for o in chosen) >= bound - 1e-12
    for point in tradeoff.uniform(scores):
        assert point.cost >= (tradeoff.at(points, point.bits) or 0.0) - 1e-12
    assert len(tradeoff.uniform(scores)) == len(SPECS) - 1


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("bits", [-1.5, -0.25, 0.25, 1.5])
def test_what_would_change(seed, bits):
    scores = random_scores(seed)
    chosen = tradeoff.priced(scores, dict.fromkeys(scores.options, parse("int4:64")))
    changed = tradeoff.shifted(scores, chosen, bits)
    after = {**chosen, **changed}
    spent = size(scores, after.values()) - size(scores, chosen.values())
    assert all(option != chosen[name] for name, option in changed.items())
    if bits > 0:
        assert spent <= bits + 1e-9
        assert all(option.cost < chosen[name].cost for name, option in changed.items())
    else:
        smallest = all(o == min(scores.options[n], key=lambda x: x.nbytes) for n, o in after.items())
        assert spent <= bits + 1e-9 or smallest
    assert all(option in scores.options[name] for name, option in changed.items())


def test_a_spec_that_was_not_priced_has_no_prediction():
    scores = random_scores(0)
    assert tradeoff.priced(scores, dict.fromkeys(scores.options, parse("nf4:64"))) is None


def test_best_uniform():
    points = [Point(3, 2.0, "a"), Point(4, 1.0, "b"), Point(5, 3.0, "c")]
    assert tradeoff.best_uniform(points, 2.9) is None
    assert tradeoff.best_uniform(points, 5.5).label == "b"


def test_rows_are_a_quarter_bit_apart_and_begin_where_a_plan_exists():
    scores = random_scores(0)
    points = tradeoff.curve(scores)
    rows = tradeoff.trade_off_rows(scores, 3.1)
    assert [bits for bits, _, _ in rows] == [b / 4 for b in range(8, 17) if b / 4 >= points[0].bits]
    for bits, cost, best in rows:
        assert cost == tradeoff.at(points, bits)
        assert best is None or (best.bits <= bits and best.cost >= cost - 1e-12)
    assert tradeoff.trade_off_rows(scores, -5.0) == []


def test_a_chart_of_one_point_is_none():
    assert trade_off([Point(4, 1.0)], [], None, [], "nats") == ""
