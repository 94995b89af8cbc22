"""The eager backend: the canonical graph with packed weights equals the packed model."""

from __future__ import annotations

import pytest
import torch

import kbitc
from kbitc.backends.eager.backend import BACKEND
from kbitc.errors import UsageError
from kbitc.graph.capture import capture
from kbitc.graph.example_inputs import example_inputs
from kbitc.passes.canonicalize import Canonicalize


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "t5"])
def test_packed_graph_equals_packed_model(family, tiny_model):
    model = tiny_model(family)
    packed = kbitc.compile(model, spec="int8:32")
    program = Canonicalize().run(capture(model))
    run = BACKEND().lower(program, packed.state_dict(keep_vars=True) | dict(packed.named_buffers()))
    made = example_inputs(model)
    inputs = {
        n: torch.ones(t.shape, dtype=t.dtype) if isinstance(t, torch.Tensor) else t for n, t in made.items()
    }
    with torch.no_grad():
        wanted = packed(**inputs).logits
        got = run(*(v for v in inputs.values() if isinstance(v, torch.Tensor)))
    first = next(
        t
        for t in torch.utils._pytree.tree_leaves(got)
        if isinstance(t, torch.Tensor) and t.shape == wanted.shape
    )
    assert torch.allclose(first, wanted, atol=1e-4)


def test_what_it_refuses(tiny_model):
    model = tiny_model("llama")
    captured = capture(model)
    with pytest.raises(UsageError, match="canonicalize"):
        BACKEND().lower(captured, {})
    with pytest.raises(UsageError, match="is missing"):
        BACKEND().lower(Canonicalize().run(captured), {})
    assert BACKEND().missing() is None
