"""Error feedback, coordinate descent and the normal equations, against plain float64 definitions."""

from __future__ import annotations

import pytest
import torch

from kbitc.formats.codebooks import shared_codebook
from kbitc.formats.encoder import Encoder
from kbitc.formats.spec import parse
from kbitc.quantizers._rounding import Damped, Grid, Rounded, descend, feed_back, refitted
from kbitc.sensitivity.gram import Gram

ROWS, WIDTH, BLOCK = 13, 203, 37  # more than one strip of columns, a short last block


def problem(spec="nf3:37", *, kept=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5 + torch.eye(WIDTH)
    x = torch.randn(900, WIDTH, generator=generator) @ mixed
    gram = Gram(x.mT @ x / len(x), None, len(x))
    target = torch.randn(WIDTH, ROWS, generator=generator)
    blocks = -(-WIDTH // BLOCK)
    scales = torch.rand(blocks, ROWS, generator=generator) + 1.5
    zeros = torch.randn(blocks, ROWS, generator=generator) / 5 if "+zp" in spec else None
    kept = None if kept is None else torch.tensor(kept)
    codebook = shared_codebook(parse(spec))
    grid = Grid(codebook, Encoder(codebook).bounds, BLOCK, scales, zeros, kept)
    return target, gram, grid


def damped(inputs, damping):
    """H + l I in float64."""
    moments = inputs.double()
    return moments + damping * float(moments.diagonal().mean()) * torch.eye(len(moments), dtype=torch.float64)


def loss(target, moments, values):
    error = values.double() - target.double()
    return (error * (moments.double() @ error)).sum(0)


def nearest(grid, column, wanted):
    """Value of the nearest level, and its code, for each row, in float64."""
    at = column // grid.block
    levels = grid.codebook.double()[:, None] * grid.scales[at].double()
    levels = levels if grid.zeros is None else levels + grid.zeros[at].double()
    code = (levels - wanted).abs().argmin(0)
    return code, levels.gather(0, code[None])[0]


def plain_feedback(target, moments, grid, order):
    """Each column's error is taken over by the columns left, as least squares has it."""
    rest, left = target.double().clone(), list(order)
    values = torch.empty_like(rest)
    while left:
        column, *left = left
        wanted = rest[column]
        if grid.kept is not None and column in grid.kept:
            value = wanted.half().double()
        else:
            _, value = nearest(grid, column, wanted)
        values[column] = value
        if left:
            own = moments[left][:, left]
            rest[left] -= torch.linalg.solve(own, moments[left, column][:, None]) * (value - wanted)
    return values


# One strip of columns, two, more than one part of rows.
@pytest.mark.parametrize("width", [1, 129, 700])
def test_the_factor_is_that_of_the_damped_moments_inverse(width):
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(3 * width, width, generator=generator) * torch.rand(width, generator=generator)
    moments = x.mT @ x / len(x)
    moments = (moments + moments.mT) / 2
    against = Damped.of(Gram(moments), 0.05)
    whole = damped(moments, 0.05)
    assert torch.equal(against.corner(slice(0, width)), whole.float())
    here = slice(width // 3, width // 2 + 1)
    columns = torch.randn(width, 5, generator=generator)
    assert torch.allclose(against.times(columns).double(), whole @ columns.double(), atol=1e-4)
    below = whole[here.start :, here] @ columns[here].double()
    assert torch.allclose(against.below(columns, here).double(), below, atol=1e-4)
    assert torch.equal(against.factor, against.factor.triu())
    factor = against.factor.double()
    left = factor.mT @ factor @ whole[against.order][:, against.order] - torch.eye(width)
    assert float(left.abs().max()) < 1e-5
    rows = torch.randn(7, width, generator=generator)
    exact = torch.linalg.solve(whole, rows.double().mT).mT
    assert float((against.solved(rows) - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("spec", ["nf3:37", "int4:37", "int3:37+zp", "fp5:37"])
@pytest.mark.parametrize("is_ordered", [True, False])
def test_feedback_is_sequential_least_squares(spec, is_ordered):
    target, gram, grid = problem(spec)
    against = Damped.of(gram, 0.05, is_ordered=is_ordered)
    diagonal = gram.inputs.diagonal()
    expected = sorted(range(WIDTH), key=lambda i: -float(diagonal[i])) if is_ordered else list(range(WIDTH))
    assert against.order.tolist() == expected
    rounded = feed_back(target, against, grid)
    wanted = plain_feedback(target, damped(gram.inputs, 0.05), grid, expected)
    # A value midway between two levels may fall to either side in float32, and all later ones differ then.
    same = ((rounded.values - wanted).abs() < 1e-3).all(0)
    assert same.float().mean() > 0.7
    assert loss(target, damped(gram.inputs, 0.05), rounded.values).sum() == pytest.approx(
        float(loss(target, damped(gram.inputs, 0.05), wanted).sum()), rel=0.03
    )


def test_kept_columns_come_last_and_take_what_remains():
    target, gram, grid = problem(kept=[3, 200])
    against = Damped.of(gram, 0.05, last=grid.kept)
    assert set(against.order[-2:].tolist()) == {3, 200}
    rounded = feed_back(target, against, grid)
    assert (rounded.codes[[3, 200]] == 0).all()
    others = [i for i in range(WIDTH) if i not in (3, 200)]
    moments = damped(gram.inputs, 0.05)
    error = rounded.values.double() - target.double()
    best = -torch.linalg.solve(moments[[3, 200]][:, [3, 200]], moments[[3, 200]][:, others] @ error[others])
    assert torch.allclose(error[[3, 200]], best, atol=2e-3)


def test_feedback_loses_less_than_nearest_codes():
    target, gram, grid = problem()
    against = Damped.of(gram, 0.05)
    plain = torch.stack([nearest(grid, i, target[i].double())[1] for i in range(WIDTH)])
    passed = loss(target, damped(gram.inputs, 0.05), feed_back(target, against, grid).values)
    assert passed.sum() < 0.9 * loss(target, damped(gram.inputs, 0.05), plain).sum()


@pytest.mark.parametrize("spec", ["nf3:37", "int2:37+zp"])
def test_descent_takes_each_code_in_turn_to_its_best(spec):
    target, gram, grid = problem(spec, kept=[5])
    against = Damped.of(gram, 0.05, last=grid.kept)
    start = feed_back(target, against, grid)
    moments = damped(gram.inputs, 0.05)
    values = start.values.double().clone()
    for column in range(WIDTH):
        wanted = values[column] - (moments[column] @ (values - target.double())) / moments[column, column]
        value = wanted.half().double() if column == 5 else nearest(grid, column, wanted)[1]
        values[column] = value
    found = descend(target, against, grid, start)
    assert ((found.values - values).abs() < 1e-3).float().mean() > 0.98
    assert (loss(target, moments, found.values) <= loss(target, moments, start.values) + 1e-6).all()


def test_descent_of_a_best_choice_changes_nothing():
    target, gram, grid = problem()
    against = Damped.of(gram, 0.05)
    found = feed_back(target, against, grid)
    for _ in range(30):
        found = descend(target, against, grid, found)
    again = descend(target, against, grid, found)
    assert torch.equal(again.codes, found.codes)


@pytest.mark.parametrize("spec", ["nf3:37", "int3:37+zp"])
@pytest.mark.parametrize("kept", [None, [7, 100]])
def test_refitted_scales_are_least_squares(spec, kept):
    target, gram, grid = problem(spec, kept=kept)
    against = Damped.of(gram, 0.05, last=grid.kept)
    rounded = feed_back(target, against, grid)
    found = refitted(target, against, grid, rounded, ridge=0.0)
    root = torch.linalg.cholesky(damped(gram.inputs, 0.05)).mT
    blocks = len(grid.scales)
    for row in range(ROWS):
        levels = grid.levels(rounded.codes)[:, row].double()
        columns = [torch.where(torch.arange(WIDTH) // BLOCK == b, levels, 0.0) for b in range(blocks)]
        if grid.zeros is not None:
            ones = torch.ones(WIDTH, dtype=torch.float64)
            if kept is not None:
                ones[kept] = 0.0
            columns += [torch.where(torch.arange(WIDTH) // BLOCK == b, ones, 0.0) for b in range(blocks)]
        wanted = target[:, row].double().clone()
        if kept is not None:
            wanted[kept] -= rounded.values[kept, row].double()
        best = torch.linalg.lstsq(root @ torch.stack(columns, 1), (root @ wanted)[:, None]).solution[:, 0]
        assert torch.allclose(found.scales[:, row].double(), best[:blocks], rtol=1e-3, atol=1e-4)
        if found.zeros is not None:
            assert torch.allclose(found.zeros[:, row].double(), best[blocks:], rtol=1e-2, atol=1e-3)


def test_scales_of_zero_stay_and_a_sign_never_turns():
    target, gram, grid = problem()
    grid.scales[2] = 0.0
    against = Damped.of(gram, 0.05)
    rounded = feed_back(target, against, grid)
    assert (rounded.values[2 * BLOCK : 3 * BLOCK] == 0).all()
    found = refitted(target, against, grid, rounded, ridge=0.0)
    assert (found.scales[2] == 0).all()
    turned = Rounded(grid.codebook.numel() - 1 - rounded.codes, rounded.values)  # codes of the other sign
    assert (refitted(target, against, grid, turned, ridge=0.0).scales >= 0).all()


def test_inputs_that_are_all_zero_are_rounded_to_the_nearest():
    target, _, grid = problem()
    against = Damped.of(Gram(torch.zeros(WIDTH, WIDTH)), 0.05)
    rounded = feed_back(target, against, grid)
    plain = torch.stack([nearest(grid, i, target[i].double())[1] for i in range(WIDTH)])
    assert torch.allclose(rounded.values.double(), plain, atol=1e-5)
