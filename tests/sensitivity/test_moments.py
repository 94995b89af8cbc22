"""Importance of input features, from moments and back."""

from __future__ import annotations

import pytest
import torch

from kbitc.sensitivity.moments import Factor, Moments, Reach, from_tensors, to_tensors


@pytest.mark.parametrize("shape", [(7,), (3, 7)])
def test_an_importance_is_that_of_its_moments(shape):
    given = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = Moments.of_importance(given)
    assert torch.equal(moments.importance(), given.float())
    assert moments.factors[0].rows.shape == (*shape[:-1], 1)
    assert moments.reach is None


def test_an_importance_needs_no_gradient():
    moments = Moments.of_importance(torch.ones(3, requires_grad=True))
    assert not moments.importance().requires_grad


def test_uses_add_up():
    """Columns weighed by the mean of their rows, summed over the uses."""
    first = Factor(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0, 0.0]))
    second = Factor(torch.tensor([0.0, 1.0]), torch.tensor([4.0, 0.0, 2.0]))
    assert Moments((first, second)).importance().tolist() == [4.0, 4.0, 1.0]


def test_flat_form_keeps_everything():
    reach = Reach(torch.rand(3), torch.rand(3), 5.5)
    factors = tuple(Factor(torch.rand(2), torch.rand(3)) for _ in range(11))
    moments = {
        "a|b.weight": Moments(factors, reach),
        "embedding": Moments(factors[:1]),
    }
    again = from_tensors(to_tensors(moments))
    assert again.keys() == moments.keys()
    for name, own in moments.items():
        for mine, theirs in zip(again[name].factors, own.factors, strict=True):
            assert torch.equal(mine.rows, theirs.rows)
            assert torch.equal(mine.columns, theirs.columns)
    assert again["a|b.weight"].reach.magnitude == 5.5
    assert torch.equal(again["a|b.weight"].reach.peaks, reach.peaks)
    assert again["embedding"].reach is None
