"""Adam against torch's, and the schedule of its steps."""

from __future__ import annotations

import pytest
import torch

from kbitc.training.adam import FAST, SLOW, Adam, cosine


def test_steps_are_those_of_torch():
    torch.manual_seed(0)
    key, other = ("w", "rows"), ("v", "rows")
    values = {key: torch.randn(5, 3), other: torch.randn(2)}
    leaf = values[key].clone().requires_grad_()
    optimizer, adam = torch.optim.Adam([leaf], lr=0.1, betas=(FAST, SLOW), eps=0.0), Adam()
    first = values[other]
    for _ in range(4):
        grad = torch.randn(5, 3)
        leaf.grad = grad.clone()
        optimizer.step()
        values = adam.step(values, {key: grad}, {"rows": 0.1})
    torch.testing.assert_close(values[key], leaf.detach())
    assert values[other] is first  # no gradient came to it


def test_a_gradient_of_zeros_moves_nothing():
    key = ("w", "rows")
    assert torch.equal(
        Adam().step({key: torch.ones(2)}, {key: torch.zeros(2)}, {"rows": 1.0})[key], torch.ones(2)
    )


def test_the_rate_rises_and_falls():
    shares = [cosine(step, 20, 4) for step in range(20)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert shares[4:] == sorted(shares[4:], reverse=True)
    assert shares[-1] < 0.01
