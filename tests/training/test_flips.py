"""Codes that move: which, how far, and what is kept."""

from __future__ import annotations

import pytest
import torch

from kbitc.formats.dequantize import dequantize
from kbitc.quantizers import quantize
from kbitc.training.curvature import Curvature, SquareSums
from kbitc.training.distilling import Outcome, held_out
from kbitc.training.flips import best_moves, curved, flip, gradients, moved_codes, moved_room


def dense(stored, name):
    return dequantize(stored.packed[name])


@pytest.mark.parametrize("spec", ["nf3:10", "int2:16+zp", "learned4:7+out6%"])
def test_a_code_moves_by_one_level(spec):
    torch.manual_seed(0)
    packed = quantize(torch.randn(5, 33), spec).packed
    before, at = dequantize(packed), torch.tensor([3, 40, 160])
    codes = moved_codes(packed, at, torch.zeros(3, dtype=torch.int8))
    assert torch.equal(codes.planes, packed.planes)
    up = torch.tensor([1, 1, 1], dtype=torch.int8)
    there = moved_codes(packed, at, up)
    assert torch.equal(moved_codes(there, at, -up).planes, packed.planes)
    changed = (dequantize(there) != before).flatten().nonzero()[:, 0].tolist()
    assert set(changed) <= {3, 40, 160}


@pytest.mark.parametrize(
    ("family", "spec"), [("llama", "int2:24"), ("mixtral", "nf3:9+zp"), ("gpt2", "int3:16+out6%")]
)
def test_the_summed_gradient_is_that_of_the_dense_weights(family, spec, schooled):
    """Against the loss itself, moved a little along the gradient of one weight."""
    school = schooled(family, spec, 3)
    room, stored = school.room, school.room.stored({})
    with gradients(room, stored, school.lessons) as files:
        shapes = files[0].shapes
        found = {name: sum(f.read(name, 0, shapes[name][0]) for f in files) / 3 for name in shapes}
    sums = [room.backward(stored, lesson)[1].sums for lesson in school.lessons]
    for name, grad in found.items():
        packed = stored.packed[name]
        index = packed.outlier_index
        if index is not None:
            outliers = sum(own[name].outliers for own in sums) / 3
            torch.testing.assert_close(grad[:, index.long()], outliers, rtol=1e-4, atol=1e-7)
            grad[:, index.long()] = 0
        short = -grad.shape[1] % packed.spec.block
        blocks = torch.nn.functional.pad(grad, (0, short)).unflatten(1, (-1, packed.spec.block)).sum(-1)
        if packed.zeros is not None:
            zeros = sum(own[name].zeros for own in sums) / 3
            torch.testing.assert_close(blocks, zeros, rtol=1e-3, atol=1e-6)
    assert len(found) == len(room.weights)


def test_moves_gain_what_is_predicted_where_they_are_few(schooled):
    school = schooled("llama", "int2:24", 4)
    room, stored = school.room, school.room.stored({})
    curvature = curved(room, stored, school.lessons)
    with gradients(room, stored, school.lessons) as files:
        moves = best_moves(room, stored, files, 4, curvature, 0.01, school.source.read)
    assert bool((moves.gains[:-1] <= moves.gains[1:]).all())
    assert bool((moves.gains < 0).all())
    before = held_out(room, {}, school.lessons)
    few = moves.best(5)
    after = held_out(moved_room(room, few), {}, school.lessons)
    predicted = float(few.gains.sum())  # with the curvature of many moves, so that five gain more
    assert 4 * predicted < after - before < 0.5 * predicted


@pytest.mark.parametrize("shape", [(5, 33), (3, 5, 33)])
def test_curvature_is_that_of_each_token(shape):
    """Of one token the product is exact; of several, the sum over all weights is."""
    torch.manual_seed(0)
    sums = SquareSums(quantize(torch.randn(shape), "nf3:10").packed)
    rows = len(sums.scales)
    exact = torch.zeros(rows, 33)
    for tokens, first in ((1, 0), (4, rows - 5)):
        left, right = torch.randn(tokens, 5), torch.randn(tokens, 33)
        sums.add_product(left, right, first)
        exact[first : first + 5] += left.square().T @ right.square()
        tile = Curvature({"w": sums}, 1).tile("w", 0, rows)
        assert float(tile.sum()) == pytest.approx(float(exact.sum()), rel=1e-5)
        if tokens == 1:
            torch.testing.assert_close(tile, exact)
    torch.testing.assert_close(Curvature({"w": sums}, 1).tile("w", 2, 4), tile[2:4])


def test_curvature_of_rows_that_are_looked_up():
    sums = SquareSums(quantize(torch.randn(5, 33), "nf3:10").packed)
    grad = torch.randn(3, 33)
    sums.add_rows(torch.tensor([4, 0, 4]), grad)
    often, mean = torch.tensor([1.0, 0, 0, 0, 2]), grad.square().mean(0)
    torch.testing.assert_close(Curvature({"w": sums}, 1).tile("w", 0, 5), often[:, None] * mean)


def test_what_is_kept_is_better_on_held_out_windows(schooled):
    school = schooled("llama", "int2:24", 12)
    lessons, held = school.lessons[:8], school.lessons[8:]
    before = held_out(school.room, {}, held)
    room, outcome, count = flip(school.room, Outcome({}, before, 0), lessons, held, school.source.read, 0.01)
    assert held_out(room, {}, held) == pytest.approx(outcome.loss)
    assert (count > 0) == (outcome.loss < before)
    assert count > 0
    changed = [n for n in room.weights if room.weights[n] is not school.room.weights[n]]
    moved = sum(int((dense(room.stored({}), n) != dense(school.room.stored({}), n)).sum()) for n in changed)
    assert 0 < moved <= count
