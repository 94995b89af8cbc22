"""A graph that runs on weights which are read one at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kbitc.sensitivity.streaming import LinearOnLoad, apply


def test_a_model_may_write_into_what_a_linear_gives():
    """Of three dimensions and with a bias torch makes a view, and refuses to write into a function's views."""
    weight, bias, x = torch.randn(4, 8), torch.randn(4), torch.randn(2, 3, 8)
    grads = []
    for call in (lambda x: apply(LinearOnLoad, x, lambda: weight, bias), lambda x: F.linear(x, weight, bias)):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.masked_fill_(y > 0, 1.0)
        y.square().sum().backward()
        grads.append((y.detach(), leaf.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1])
