"""A replay against running the model itself, with and without other weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kbitc.checkpoint import open_checkpoint
from kbitc.compiler.calibrator import RANDOM, Calibrator
from kbitc.graph.capture import capture
from kbitc.passes.canonicalize import Canonicalize
from kbitc.replay.engine import Replay
from kbitc.replay.stops import stops, weight_reads

FEEDS = 3


def traced_of(model):
    """A canonical program, inputs and a reader of a model's tensors."""
    with open_checkpoint(model) as checkpoint:
        calibrator = Calibrator(checkpoint, RANDOM)
        feeds = calibrator.feeds(FEEDS)
        program = Canonicalize().run(capture(calibrator.skeleton(), feeds[0]))
        return program, feeds, calibrator.read


def shaken(weight, data):
    """A weight with an error, input dimension last."""
    generator = torch.Generator().manual_seed(len(weight.name))
    oriented = weight.oriented(data).float()
    return oriented + 0.05 * torch.randn(oriented.shape, generator=generator)


def given_back(weight, oriented):
    """As the model has it."""
    back = oriented.mT if weight.is_transposed else oriented
    return back.reshape(weight.shape)


def with_weights(model, program, read, names):
    """A copy of the model in which some weights have an error."""
    import copy

    changed = copy.deepcopy(model)
    for name in names:
        weight = program.weights[name]
        parameter = changed.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(given_back(weight, shaken(weight, read(name))))
    return changed.float()


def flat(outputs):
    leaves = torch.utils._pytree.tree_leaves(dict(outputs) if hasattr(outputs, "keys") else outputs)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


@pytest.mark.parametrize("family", ["gpt2", "bloom", "llama", "mixtral", "roberta", "bart", "t5", "clip"])
def test_outputs_are_those_of_both_models(tiny_model, family):
    model = tiny_model(family)
    program, feeds, read = traced_of(model)
    found = {}
    replay = Replay(program, read, feeds, lambda name: shaken(program.weights[name], read(name)))
    for _ in replay.run(lambda i, source, packed: found.__setitem__(i, (source, packed)), range(FEEDS)):
        pass
    changed = with_weights(model, program, read, program.weights)
    with torch.no_grad():
        for i, feed in enumerate(feeds):
            for got, run in zip(found[i], (model.float(), changed), strict=True):
                wanted, own = flat(run(**feed)), [t for t in got if isinstance(t, torch.Tensor)]
                matched = [t for t in own if t.is_floating_point() and t.shape == wanted[0].shape]
                assert any(torch.allclose(t, wanted[0], rtol=1e-3, atol=1e-4) for t in matched)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_what_is_quantized_at_a_stop_is_read_from_then_on(tiny_model, family):
    """The packed input at a stop is that of the model in which all weights before it have their errors."""
    model = tiny_model(family).float()
    program, feeds, read = traced_of(model)
    every = sorted(stops(program), key=lambda stop: stop.position)
    early = [r.name for r in weight_reads(program) if r.name not in {n for s in every for n in s.names}]
    done = set(early)

    def dequantized(name):
        return shaken(program.weights[name], read(name)) if name in done else None

    for inputs in Replay(program, read, feeds, dequantized).run():
        source, packed = inputs.pair(1)
        module = next(m for n, m in model.named_modules() if f"{n}.weight" == inputs.stop.names[0])
        for run, mine in ((model, source), (with_weights(model, program, read, done), packed)):
            target = next(m for n, m in run.named_modules() if f"{n}.weight" == inputs.stop.names[0])
            seen = []
            handle = target.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            with torch.no_grad():
                run(**feeds[1])
            handle.remove()
            torch.testing.assert_close(mine, seen[0].flatten(0, -2), rtol=1e-3, atol=1e-4)
        assert isinstance(module, nn.Module)
        done.update(inputs.stop.names)


def collected(program, feeds, read, **options):
    replay = Replay(program, read, feeds, lambda name: shaken(program.weights[name], read(name)), **options)
    return [(inputs.stop.names, *inputs.pair(0), *inputs.pair(2)) for inputs in replay.run()]


def test_neither_cores_nor_room_change_a_bit(tiny_model):
    program, feeds, read = traced_of(tiny_model("mixtral"))
    threads = torch.get_num_threads()
    first = collected(program, feeds, read)
    try:
        torch.set_num_threads(1)
        others = [collected(program, feeds, read), collected(program, feeds, read, room=0)]
    finally:
        torch.set_num_threads(threads)
    for other in others:
        for (names, *values), (others_names, *others_values) in zip(first, other, strict=True):
            assert names == others_names
            assert all(torch.equal(a, b) for a, b in zip(values, others_values, strict=True))


def test_a_replay_of_the_source_alone_has_one_value_on_every_edge(tiny_model):
    program, feeds, read = traced_of(tiny_model("llama"))
    for inputs in Replay(program, read, feeds).run():
        source, packed = inputs.pair(0)
        assert source is packed


class Writes(nn.Module):
    """A model that writes into a buffer which both models share until then."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        y = torch.zeros_like(x)
        part = y[:, :3]
        part.add_(self.first(x)[:, :3])
        y.mul_(2.0)
        return self.second(y + x)


def test_memory_that_one_model_writes_into_is_not_the_others():
    torch.manual_seed(0)
    model = Writes().eval()
    feeds = [{"x": torch.randn(5, 6)} for _ in range(FEEDS)]
    program = Canonicalize().run(capture(Writes().to("meta").eval(), feeds[0]))
    parameters = dict(model.named_parameters())
    found = {}

    def read(name):
        return parameters[name].detach()

    replay = Replay(program, read, feeds, lambda name: shaken(program.weights[name], read(name)), room=0)
    for _ in replay.run(lambda i, source, packed: found.__setitem__(i, (source[0], packed[0])), [0, 2]):
        pass
    changed = with_weights(model, program, read, program.weights)
    assert set(found) == {0, 2}
    with torch.no_grad():
        for i, (source, packed) in found.items():
            torch.testing.assert_close(source, model(**feeds[i]))
            torch.testing.assert_close(packed, changed(**feeds[i]))
