"""Second moments at stops, against their definitions in float64 on inputs that the models' own modules saw."""

from __future__ import annotations

import copy

import pytest
import torch

from kbitc.checkpoint import open_checkpoint
from kbitc.compiler.calibrator import RANDOM, Calibrator
from kbitc.graph.capture import capture
from kbitc.passes.canonicalize import Canonicalize
from kbitc.replay import grams as grams_module
from kbitc.replay.engine import Replay
from kbitc.replay.grams import grams, pull

FITTED, HELD_OUT = [0, 1, 3], [2]


@pytest.fixture
def both(tiny_model):
    """A model, a copy of it with other weights, and a replay of the two."""
    model = tiny_model("llama").float()
    changed = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in changed.parameters():
            if parameter.dim() == 2:
                parameter.add_(0.05 * torch.randn_like(parameter))
    with open_checkpoint(model) as checkpoint:
        calibrator = Calibrator(checkpoint, RANDOM)
        feeds = calibrator.feeds(4)
        program = Canonicalize().run(capture(calibrator.skeleton(), feeds[0]))
        return (
            model,
            changed,
            Replay(program, calibrator.read, feeds, lambda n: changed.get_parameter(n).data),
        )


def seen_by(model, path, feeds, indices):
    """What a module was given, all tokens of all inputs, float64."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for index in indices:
            model(**feeds[index])
    handle.remove()
    return torch.cat([x.flatten(0, -2) for x in seen]).double()


@pytest.mark.parametrize("width", [7, 256])
def test_moments_are_means_over_tokens(both, monkeypatch, width):
    monkeypatch.setattr(grams_module, "WIDTH", width)
    model, changed, replay = both
    for inputs in replay.run():
        path = inputs.stop.names[0].removesuffix(".weight")
        (gram,) = grams(inputs, FITTED, HELD_OUT)
        assert gram.held_out is not None
        for found, indices in ((gram, FITTED), (gram.held_out, HELD_OUT)):
            x, y = (seen_by(each, path, replay.feeds, indices) for each in (model, changed))
            assert found.tokens == len(x)
            torch.testing.assert_close(found.inputs.double(), y.mT @ y / len(y), rtol=1e-3, atol=1e-5)
            assert found.cross is not None
            torch.testing.assert_close(found.cross.double(), x.mT @ y / len(y), rtol=1e-3, atol=1e-5)


def test_what_an_output_is_added_to_is_the_residual_stream(both):
    model, changed, replay = both
    added = {}
    for inputs in replay.run():
        for name in inputs.stop.names:
            rows = replay.program.weights[name].rows
            added[name] = pull(inputs, name, rows, FITTED)
    assert {name for name, found in added.items() if found is not None} == {
        name for name in added if name.endswith(("o_proj.weight", "down_proj.weight"))
    }
    for layer in range(2):
        path = f"model.layers.{layer}"
        for branch, norm in (
            ("self_attn.o_proj", "input_layernorm"),
            ("mlp.down_proj", "post_attention_layernorm"),
        ):
            r, other = (seen_by(each, f"{path}.{norm}", replay.feeds, FITTED) for each in (model, changed))
            y = seen_by(changed, f"{path}.{branch}", replay.feeds, FITTED)
            found = added[f"{path}.{branch}.weight"]
            assert found is not None
            torch.testing.assert_close(found.double(), (r - other).mT @ y / len(y), rtol=1e-3, atol=1e-5)


def test_rows_pull_as_the_cross_moment_does(both):
    """W (C - H) and what the output is added to, without C."""
    model, _, replay = both
    compared = 0
    for inputs in replay.run():
        (whole,), (own,) = (grams(inputs, FITTED, HELD_OUT, is_crossed=crossed) for crossed in (True, False))
        assert own.cross is None
        assert torch.equal(own.inputs, whole.inputs)
        for name in inputs.stop.names:
            weight = model.get_parameter(name).float()
            added = pull(inputs, name, len(weight), FITTED)
            found = pull(inputs, name, len(weight), FITTED, weight)
            wanted = weight @ (whole.cross - whole.inputs)
            wanted = wanted if added is None else wanted + added
            assert found is not None
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
            compared += added is not None
    assert compared == 4


def test_each_expert_has_moments_of_its_own_tokens(tiny_model):
    model = tiny_model("mixtral").float()
    with open_checkpoint(model) as checkpoint:
        calibrator = Calibrator(checkpoint, RANDOM)
        feeds = calibrator.feeds(4)
        program = Canonicalize().run(capture(calibrator.skeleton(), feeds[0]))
        experts = 0
        for inputs in Replay(program, calibrator.read, feeds).run():
            found = grams(inputs, FITTED, HELD_OUT)
            if inputs.stop.kind == "linear":
                assert len(found) == 1
                continue
            experts += 1
            total = sum(gram.inputs.diagonal() * gram.tokens for gram in found)
            every = torch.cat([inputs.pair(index)[0] for index in FITTED])
            assert sum(gram.tokens for gram in found) == len(every)
            torch.testing.assert_close(total, every.square().sum(0), rtol=1e-4, atol=1e-5)
            assert all(gram.cross is None for gram in found)
        assert experts > 0
