"""The exact allocator against brute force, and on an instance of a real model's size."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from kbitc.planning.knapsack import Infeasible, Item, agreed, frontier, solve


def brute_force(groups, room, shared):
    best = None
    for chosen in itertools.product(*(range(len(items)) for items in groups)):
        picked = [items[i] for items, i in zip(groups, chosen, strict=True)]
        tables = {name for item in picked for name in item.shared}
        size = sum(item.nbytes for item in picked) + sum(shared[name] for name in tables)
        if size <= room:
            cost = math.fsum(item.cost for item in picked)
            if best is None or cost < best:
                best = cost
    return best


def random_instance(rng):
    shared = {name: rng.randrange(0, 40) for name in "abc"[: rng.randrange(4)]}
    groups = [
        [
            Item(
                rng.randrange(0, 120),
                rng.choice([0.0, rng.random(), rng.random() * 1e-9, float(rng.randrange(5))]),
                tuple(sorted(rng.sample(sorted(shared), rng.randrange(len(shared) + 1)))),
            )
            for _ in range(rng.randrange(1, 6))
        ]
        for _ in range(rng.randrange(1, 6))
    ]
    return groups, rng.randrange(0, 400), shared


@pytest.mark.parametrize("seed", range(10))
def test_equals_brute_force(seed):
    rng = random.Random(seed)
    for _ in range(30):
        groups, room, shared = random_instance(rng)
        best = brute_force(groups, room, shared)
        if best is None:
            with pytest.raises(Infeasible) as error:
                solve(groups, room, shared)
            # The size that it names is the smallest that works.
            assert brute_force(groups, error.value.nbytes, shared) is not None
            assert brute_force(groups, error.value.nbytes - 1, shared) is None
            continue
        found = solve(groups, room, shared)
        assert found.nbytes <= room
        assert found.cost == pytest.approx(best, rel=1e-6, abs=1e-15)
        assert found.lagrangian <= best * (1 + 1e-9) + 1e-15
        assert found == solve(groups, room, shared)


def model_like(groups=211, seed=0):
    rng = random.Random(seed)
    made = []
    for _ in range(groups):
        n, importance = rng.choice([110_592, 331_776, 884_736]), math.exp(rng.gauss(0, 1.2))
        made.append(
            [
                Item(
                    n * bits // 8 + n // block,
                    n * importance * 4.0**-bits * (1 + 0.2 * math.log2(block / 16)) * rng.uniform(0.8, 1.3),
                    ("scales", f"t{kind}{bits}"),
                    f"t{kind}{bits}:{block}",
                )
                for kind in "uvw"
                for bits in range(2, 8)
                for block in (32, 64, 128, 256)
            ]
        )
    tables = {"scales": 1024, **{f"t{kind}{bits}": 4 * 2**bits for kind in "uvw" for bits in range(2, 8)}}
    return made, tables


def test_a_model_of_real_size():
    groups, tables = model_like()
    most = sum(max(item.nbytes for item in items) for items in groups)
    for share in (0.45, 0.6):
        room = int(share * most)
        found = solve(groups, room, tables)
        assert found.nbytes <= room
        assert found.nbytes >= 0.995 * room
        assert found.gap < 1e-3


def test_groups_that_agree():
    options = [Item(10, 3.0, ("t",), "a"), Item(20, 1.0, (), "b"), Item(40, 0.0, (), "c")]
    other = [Item(1, 5.0, (), "b"), Item(9, 0.5, ("t",), "a")]
    merged, members = agreed([options, other, options], [[0, 1]])
    assert members == [[0, 1], [2]]
    assert [(item.key, item.nbytes, item.cost, item.shared) for item in merged[0]] == [
        ("a", 19, 3.5, ("t",)),
        ("b", 21, 6.0, ()),
    ]
    with pytest.raises(ValueError, match="no item in common"):
        agreed([options, [Item(1, 1.0, (), "z")]], [[0, 1]])
    with pytest.raises(ValueError, match="one set of others only"):
        agreed([options, other], [[0, 1], [1]])


def test_frontier_is_convex_and_ends_at_the_best():
    groups, _ = model_like(20)
    points = frontier(groups)
    assert points[0][0] == sum(min(item.nbytes for item in items) for items in groups)
    assert points[-1][1] == pytest.approx(sum(min(item.cost for item in items) for items in groups))
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
    assert all(first <= second + 1e-9 for first, second in itertools.pairwise(slopes))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[]], "without items"),
        ([[Item(1, math.inf)]], "finite"),
        ([[Item(-1, 0.0)]], "not negative"),
        ([[Item(1, 0.0, ("lost",))]], "size is not given"),
    ],
)
def test_bad_instances(groups, message):
    with pytest.raises(ValueError, match=message):
        solve(groups, 10)
