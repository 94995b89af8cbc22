"""A graph that runs on weights which are read one at a time."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from kbitc.checkpoint import open_checkpoint
from kbitc.compiler.calibrator import Calibrator
from kbitc.passes.canonicalize import traced_on
from kbitc.sensitivity.streaming import LinearOnLoad, Streamed, apply


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


@pytest.mark.parametrize("bias", [None, torch.randn(13)])
def test_a_large_matrix_is_read_in_parts(bias, monkeypatch):
    weight, x = torch.randn(13, 8).bfloat16(), torch.randn(2, 3, 8)
    grads = []
    for part in (8 * 5 + 1, 10**6):
        monkeypatch.setattr("kbitc.sensitivity.streaming.PART", part)
        leaf = x.clone().requires_grad_()
        y = apply(LinearOnLoad, leaf, lambda: weight, bias)
        y.square().sum().backward()
        grads.append((y.detach(), leaf.grad))
    torch.testing.assert_close(grads[0], grads[1])
    torch.testing.assert_close(grads[0][0], F.linear(x, weight.float(), bias))


def test_nothing_of_a_run_is_left_after_its_gradient(tiny_model):
    """Not until Python looks for circles: a window of a large model is a gigabyte."""
    ids = torch.randint(101, (1, 7))
    source = Calibrator(open_checkpoint(tiny_model("llama")), ids)
    feed = source.feeds()[0]
    left = []

    def seen(name, kind, given, out):
        left.append(weakref.ref(out))

    gc.disable()
    try:
        with torch.enable_grad():
            outputs = Streamed(traced_on(source, feed), source.read, seen).call(**feed)
            loss = source.loss(feed, outputs, 0)
            del outputs
            loss.backward()
            del loss
        assert len(left) > 10
        assert not any(ref() is not None for ref in left)
    finally:
        gc.enable()
