"""Moments of a streamed run equal those of the whole model in memory, and predict what errors cost."""

from __future__ import annotations

import copy
import gc
import shutil
import weakref

import pytest
import torch
import torch.nn.functional as F

from kbitc.checkpoint import open_checkpoint
from kbitc.compiler.calibrator import RANDOM, Calibrator
from kbitc.errors import UsageError
from kbitc.graph.capture import capture
from kbitc.graph.context import Context
from kbitc.passes.canonicalize import Canonicalize
from kbitc.passes.measure_moments import MeasureMoments
from kbitc.pipeline.manager import PassManager
from kbitc.sensitivity.moments import CALIBRATION, MOMENTS, from_tensors, to_tensors
from kbitc.sensitivity.streaming import Keeper

TOKENS = torch.randint(101, (3, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("kbitc.compiler.calibrator.cache_folder", lambda: tmp_path)
    return tmp_path


def measured(model, tokens=TOKENS):
    with open_checkpoint(model) as checkpoint:
        program = PassManager([Canonicalize()]).run(
            capture(checkpoint.skeleton(), context=Context(checkpoint.read, Calibrator(checkpoint, tokens)))
        )
        return PassManager([MeasureMoments()]).run(program)


def in_memory(model, name, tokens=TOKENS):
    """Inputs and output gradients of one linear, by hooks on the module itself."""
    module = model.get_submodule(name.removesuffix(".weight"))
    rows, columns, energy = 0.0, 0.0, 0.0
    for window in tokens:
        kept = {}

        def note(_, given, out, kept=kept):
            kept["x"] = given[0].detach().flatten(0, -2)
            out.retain_grad()
            kept["y"] = out

        handle = module.register_forward_hook(note)
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        F.cross_entropy(logits, window[1:], reduction="sum").backward()
        handle.remove()
        x, g = kept["x"].double(), kept["y"].grad.flatten(0, -2).double()
        weights = g.square().sum(-1, keepdim=True)
        rows, columns, energy = (
            rows + g.square().sum(0),
            columns + (x.square() * weights).sum(0),
            energy + weights.sum(),
        )
    return rows / tokens.numel(), columns / energy


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.0.mlp.down_proj.weight"),
        ("gpt2", "transformer.h.0.mlp.c_fc.weight"),
        *(
            pytest.param(*other, marks=pytest.mark.slow)
            for other in (
                ("llama", "model.layers.1.self_attn.q_proj.weight"),
                ("opt", "model.decoder.layers.1.fc2.weight"),
                ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight"),
                ("bloom", "transformer.h.1.mlp.dense_4h_to_h.weight"),
            )
        ),
    ],
)
def test_equals_the_model_in_memory(family, name, tiny_model):
    model = tiny_model(family)
    program = measured(model)
    (factor,) = program.facts[MOMENTS][name].factors
    rows, columns = in_memory(copy.deepcopy(model), name)
    torch.testing.assert_close(factor.rows.double(), rows, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(factor.columns.double(), columns, rtol=1e-3, atol=1e-7)


@pytest.fixture(scope="module")
def mixture(tiny_model):
    """A mixture of experts with its moments."""
    return measured(tiny_model("mixtral"))


def test_every_weight_of_a_mixture_of_experts(mixture):
    program = mixture
    moments = program.facts[MOMENTS]
    assert set(moments) == set(program.weights)
    for name, weight in program.weights.items():
        lead = weight.shape[:1] if len(weight.shape) == 3 else ()
        importance = moments[name].importance()
        assert importance.shape == (*lead, weight.in_features)
        assert bool((importance >= 0).all())
        assert bool(importance.isfinite().all())


def test_tied_weights_have_both_uses(tiny_model):
    moments = measured(tiny_model("gpt2")).facts[MOMENTS]["transformer.wte.weight"]
    assert len(moments.factors) == 2


def test_prices_predict_the_loss(tiny_model):
    """Half of rows x columns x dW² is the increase of the loss, for small errors of one weight."""
    torch.manual_seed(0)
    model = tiny_model("llama")
    tokens = torch.randint(101, (40, 24), generator=torch.Generator().manual_seed(1))
    # Text that the model would write itself: only there is the gradient zero on average.
    with torch.no_grad():
        for i in range(1, 24):
            probabilities = model(input_ids=tokens[:, :i]).logits[:, -1].softmax(-1)
            tokens[:, i] = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(i))[
                :, 0
            ]
    moments = measured(model, tokens).facts[MOMENTS]

    def log_probs():
        with torch.no_grad():
            return model(input_ids=tokens).logits[:, :-1].log_softmax(-1)

    before = log_probs()
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.o_proj.weight"):
        weight = model.get_parameter(name)
        kept, (factor,) = weight.detach().clone(), moments[name].factors
        divergence = predicted = 0.0
        for seed in range(12):
            noise = 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            weight.data.add_(noise)
            divergence += float((before.exp() * (before - log_probs())).sum(-1).mean()) / 12
            weight.data.copy_(kept)
            predicted += float((factor.rows[:, None] * factor.columns * noise**2).sum()) / 2 / 12
        assert predicted == pytest.approx(divergence, rel=0.35)


@pytest.mark.parametrize("family", ["llama", "mixtral", "t5"])
def test_what_waits_for_its_gradient_at_16_bits_changes_little(family, tiny_model, cache, monkeypatch):
    model = tiny_model(family)
    exact = to_tensors(measured(model).facts[MOMENTS])
    shutil.rmtree(cache)
    monkeypatch.setattr("kbitc.sensitivity.streaming.LARGE", 1)
    kept = to_tensors(measured(model).facts[MOMENTS])
    assert kept.keys() == exact.keys()
    assert any(not torch.equal(kept[name], values) for name, values in exact.items())
    for name, values in exact.items():
        assert (kept[name] - values).norm() <= 0.02 * values.norm(), name


def test_no_window_outlives_its_gradient(tiny_model, monkeypatch):
    """Not until Python looks for circles, and there are some that it cannot see."""
    left, keep = [], Keeper.keep

    def kept(keeper, tensor):
        left.append(weakref.ref((made := keep(keeper, tensor)).tensor))
        return made

    monkeypatch.setattr("kbitc.sensitivity.streaming.LARGE", 1)
    monkeypatch.setattr(Keeper, "keep", kept)
    gc.disable()
    try:
        measured(tiny_model("llama"))
        assert len(left) > 30
        assert not any(tensor() is not None for tensor in left)
    finally:
        gc.enable()


def test_kept_in_the_cache_and_no_seed_is_touched(tiny_model, cache, monkeypatch):
    model = tiny_model("llama")
    state = torch.get_rng_state()
    first = measured(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.facts[CALIBRATION] == "3 windows of 16 given tokens"
    assert len(list(cache.rglob("*.safetensors"))) == 1
    assert not list(cache.rglob("*.part"))
    monkeypatch.setattr(MeasureMoments, "_measure", lambda *_: pytest.fail("measured again"))
    again = measured(model)
    for name, moments in first.facts[MOMENTS].items():
        assert torch.equal(again.facts[MOMENTS][name].importance(), moments.importance())
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        measured(model, TOKENS.flip(0))


@pytest.mark.parametrize("family", ["roberta", "t5", "clip", "mixtral"])
def test_random_inputs_know_every_weight(family, tiny_model):
    """Whatever the outputs are, and whether the first layer has a gradient before it or not."""
    model = tiny_model(family)
    state = torch.get_rng_state()
    program = measured(model, RANDOM)
    assert torch.equal(torch.get_rng_state(), state)
    moments = program.facts[MOMENTS]
    assert set(moments) == set(program.weights)
    for name, found in moments.items():
        assert bool(found.importance().isfinite().all()), name
        assert float(found.importance().sum()) > 0, name


def test_random_inputs_predict_the_change_of_an_output(tiny_model):
    """A normal law around each output: half of rows x columns x dW² is its relative squared error."""
    torch.manual_seed(0)
    model = tiny_model("roberta").roberta
    program = measured(model, RANDOM)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(101, (40, 16), generator=generator)
    name = "encoder.layer.1.output.dense.weight"
    weight, (factor,) = model.get_parameter(name), program.facts[MOMENTS][name].factors

    def output():
        with torch.no_grad():
            return model(input_ids=ids).last_hidden_state

    before, kept = output(), weight.detach().clone()
    change = predicted = 0.0
    for _ in range(12):
        noise = 0.01 * torch.randn(weight.shape, generator=generator)
        weight.data.add_(noise)
        change += float((output() - before).square().mean() / before.square().mean()) / 2
        weight.data.copy_(kept)
        predicted += float((factor.rows[:, None] * factor.columns * noise**2).sum()) / 2
    assert predicted == pytest.approx(change, rel=0.35)


def test_flat_form_is_exact(mixture):
    moments = mixture.facts[MOMENTS]
    flat = to_tensors(moments)
    again = to_tensors(from_tensors(flat))
    assert flat.keys() == again.keys()
    assert all(torch.equal(flat[key], again[key]) for key in flat)


def test_without_text_it_says_where_text_comes_from(tiny_model):
    with pytest.raises(UsageError, match="--calibrate"):
        MeasureMoments().run(PassManager([Canonicalize()]).run(capture(tiny_model("llama"))))
