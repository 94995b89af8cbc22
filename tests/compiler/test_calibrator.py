"""Where calibration text comes from, and what `calibrate` means in a compilation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kbitc
from kbitc.checkpoint import open_checkpoint
from kbitc.compiler.calibrator import (
    RANDOM,
    SELF,
    Calibrator,
    is_language_model,
    make_calibrator,
    sample_windows,
    text_windows,
    window_length,
)
from kbitc.errors import UsageError


class Characters:
    def __call__(self, text, **_):
        return {"input_ids": torch.tensor([[ord(c) for c in text]])}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    # Not KBITC_CACHE: the compiled kernels lie there, too.
    monkeypatch.setattr("kbitc.compiler.calibrator.cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def test_windows_are_spread_over_the_text():
    text = "".join(chr(ord("a") + i) * 10 for i in range(20))
    windows = text_windows(Characters(), text, 10, 4)
    assert ["".join(map(chr, w.tolist()))[0] for w in windows] == ["a", "f", "k", "p"]
    assert len(text_windows(Characters(), text[:25], 10, 4)) == 2
    with pytest.raises(UsageError, match="9 tokens, fewer than one window of 10"):
        text_windows(Characters(), text[:9], 10, 4)


def test_sampling_repeats_and_touches_no_seed(tiny_model):
    model = tiny_model("llama")
    state = torch.get_rng_state()
    first = sample_windows(model, 12, 3)
    assert first.shape == (3, 12)
    assert torch.equal(first, sample_windows(model, 12, 3))
    assert not torch.equal(first, sample_windows(model, 12, 3, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert bool(((first >= 0) & (first < 101)).all())


def test_a_short_context_is_kept(tiny_model, monkeypatch):
    monkeypatch.setattr("kbitc.compiler.calibrator.LENGTH", 256)
    assert window_length(tiny_model("gpt2")) == 33
    assert window_length(tiny_model("llama")) == 256


@pytest.mark.parametrize("family", ["bart", "roberta", "clip"])
def test_other_models_are_calibrated_on_random_inputs(family, tiny_model):
    model = tiny_model(family)
    with open_checkpoint(model) as checkpoint:
        made = make_calibrator(checkpoint, "auto", print, is_wanted=True)
        assert made.label == "2 random inputs of up to 16 tokens"
        with pytest.raises(UsageError, match="no causal language model"):
            make_calibrator(checkpoint, SELF, print, is_wanted=True)
    with open_checkpoint(nn.Linear(4, 4)) as checkpoint:
        assert make_calibrator(checkpoint, "auto", print, is_wanted=True) is None
        with pytest.raises(UsageError, match="not a model of transformers"):
            make_calibrator(checkpoint, RANDOM, print, is_wanted=True)


def test_a_model_that_gives_codes_of_sound_samples_no_text(tiny_model, monkeypatch):
    model = tiny_model("llama")
    assert is_language_model(model)
    model.lm_head = nn.Linear(model.lm_head.in_features, 3 * 41)
    assert not is_language_model(model)
    kbitc.compile(model, bits=6)  # 'auto' is random inputs
    monkeypatch.setattr("kbitc.compiler.calibrator.run_on_meta", lambda *_: None)
    assert is_language_model(model)
    model.get_output_embeddings = lambda: None
    assert not is_language_model(model)


def test_auto(tiny_model, tmp_path):
    with open_checkpoint(tiny_model("llama")) as checkpoint:
        assert make_calibrator(checkpoint, "none", print, is_wanted=True) is None
        assert make_calibrator(checkpoint, "auto", print, is_wanted=False) is None
        made = make_calibrator(checkpoint, "auto", print, is_wanted=True)
        assert "that the model sampled itself" in made.label
        with pytest.raises(UsageError, match="int64 token ids of shape"):
            make_calibrator(checkpoint, torch.ones(3), print, is_wanted=True)
        with pytest.raises(UsageError, match="has no tokenizer"):
            Calibrator(checkpoint, tmp_path / "text").windows()


def test_a_plan_from_its_own_text(tiny_model, cache):
    model = tiny_model("llama")
    packed = kbitc.compile(model, bits=4.5)
    assert len(list((cache / "moments").iterdir())) == 1
    again = kbitc.compile(model, bits=4.5)
    for name, parameter in packed.named_parameters():
        other = again.get_parameter(name)
        if isinstance(parameter, kbitc.KbitTensor):
            assert parameter.spec == other.spec
            assert torch.equal(parameter.packed.planes, other.packed.planes)


def test_measured_again_where_sums_could_differ(tiny_model, cache, monkeypatch):
    """Of the same model and text: with other threads or instructions the last bits of a sum are others."""
    with open_checkpoint(tiny_model("llama")) as checkpoint:
        calibrator = Calibrator(checkpoint, RANDOM)

        def measured():
            seen = []
            calibrator.remembered(lambda: seen.append(1) or {"sum": torch.ones(1)})
            return bool(seen)

        assert [measured(), measured()] == [True, False]
        monkeypatch.setattr("torch.get_num_threads", lambda: 97)
        assert [measured(), measured()] == [True, False]
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "other")
        assert [measured(), measured()] == [True, False]


def test_measured_again_for_windows_of_another_shape(tiny_model, cache):
    ids = torch.arange(20)
    with open_checkpoint(tiny_model("llama")) as checkpoint:
        for shape in ((2, 10), (4, 5)):
            given = Calibrator(checkpoint, ids.reshape(shape))
            kept = given.remembered(lambda shape=shape: {"windows": torch.tensor(shape[0])})
            assert kept["windows"] == shape[0]


def test_a_uniform_spec_with_and_without_text(tiny_model):
    """Calibrated scales have a smaller price, plain ones a smaller absolute maximum of nothing."""
    model = tiny_model("llama")
    ids = torch.randint(101, (4, 20), generator=torch.Generator().manual_seed(3))
    plain = kbitc.compile(model, spec="nf3:32")
    calibrated = kbitc.compile(model, spec="nf3:32", calibrate=ids)
    test = torch.randint(101, (8, 20), generator=torch.Generator().manual_seed(4))

    def divergence(packed):
        with torch.no_grad():
            wanted, got = (m(input_ids=test).logits.log_softmax(-1) for m in (model, packed))
        return float((wanted.exp() * (wanted - got)).sum(-1).mean())

    assert divergence(calibrated) < divergence(plain)
