"""Where calibration text comes from, and what `calibrate` means in a compilation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import kbitc
from kbitc.checkpoint import open_checkpoint
from kbitc.cli.main import app
from kbitc.compiler.calibration_text import all_windows, spread
from kbitc.compiler.calibrator import (
    RANDOM,
    SELF,
    Calibrator,
    is_language_model,
    make_calibrator,
    sample_windows,
    window_length,
)
from kbitc.compiler.sampling import SamplingError
from kbitc.errors import UsageError
from kbitc.graph.context import silent


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
    windows = spread(all_windows(Characters(), text, 10), 4)
    assert ["".join(map(chr, w.tolist()))[0] for w in windows] == ["a", "f", "k", "p"]
    assert len(spread(all_windows(Characters(), text[:25], 10), 4)) == 2
    with pytest.raises(UsageError, match="9 tokens, fewer than one window of 10"):
        all_windows(Characters(), text[:9], 10)


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
    monkeypatch.setattr("kbitc.compiler.calibration_text.run_on_meta", lambda *_: None)
    assert is_language_model(model)
    model.get_output_embeddings = lambda: None
    assert not is_language_model(model)


def test_auto(tiny_model, tmp_path):
    with open_checkpoint(tiny_model("llama")) as checkpoint:
        assert make_calibrator(checkpoint, "none", print, is_wanted=True) is None
        assert make_calibrator(checkpoint, "auto", print, is_wanted=False) is None
        made = make_calibrator(checkpoint, "auto", print, is_wanted=True, most=3)
        assert "that the model sampled itself" in made.label
        assert torch.equal(made.windows(3)[:2], made.windows())
        with pytest.raises(UsageError, match="int64 token ids of shape"):
            make_calibrator(checkpoint, torch.ones(3), print, is_wanted=True)
        with pytest.raises(UsageError, match="has no tokenizer"):
            Calibrator(checkpoint, tmp_path / "text").windows()


def watched(monkeypatch):
    """How many windows are sampled each time that text is."""
    seen = []

    def sample(model, length, count, **options):
        seen.append(count)
        return sample_windows(model, length, count, **options)

    monkeypatch.setattr("kbitc.compiler.calibrator.sample_windows", sample)
    return seen


def test_text_is_sampled_once(tiny_model, cache, monkeypatch):
    """For every pass, and for the runs after this one."""
    seen = watched(monkeypatch)
    with open_checkpoint(tiny_model("llama")) as checkpoint:
        first = Calibrator(checkpoint, SELF, most=7)
        all_of_it = first.windows(7)
        assert all_of_it.shape == (7, 16)
        assert torch.equal(first.windows(), all_of_it[:2])
        again = Calibrator(checkpoint, SELF, most=7)  # of another run
        assert torch.equal(torch.cat([feed["input_ids"] for feed in again.feeds(5)]), all_of_it[:5])
        assert seen == [7]
        (path,) = (cache / "texts").iterdir()
        assert path.stat().st_mode & 0o777 == 0o600
        path.write_bytes(path.read_bytes()[:-1] + b"?")  # damaged: sampled again, the same
        assert torch.equal(Calibrator(checkpoint, SELF, most=7).windows(7), all_of_it)
        assert torch.equal(Calibrator(checkpoint, SELF, most=7).windows(7), all_of_it)
        assert seen == [7, 7]


def test_text_is_sampled_once_where_nothing_can_be_kept(tiny_model, cache, monkeypatch, caplog):
    seen = watched(monkeypatch)
    cache.mkdir()
    cache.chmod(0o777)
    with open_checkpoint(tiny_model("llama")) as checkpoint:
        made = Calibrator(checkpoint, SELF, most=3)
        assert torch.equal(made.windows(2), made.windows(3)[:2])
    assert seen == [3]
    assert "Text that a model samples is not kept" in caplog.text


def test_text_is_what_it_was_where_no_more_is_asked_for(tiny_model, monkeypatch):
    seen = watched(monkeypatch)
    model = tiny_model("llama")
    with open_checkpoint(model) as checkpoint:
        for most in (None, 1, 2):
            made = Calibrator(checkpoint, SELF, most=most)
            assert torch.equal(made.windows(), sample_windows(model, 16, 2))
            assert made._key("") == Calibrator(checkpoint)._key("")
        assert seen == [2]
        assert Calibrator(checkpoint, SELF, most=3)._key("") != made._key("")  # the first two of three
        assert len(made.windows(4)) == 4  # more than it was told of: sampled anew
        assert seen == [2, 4]


def test_what_samples_no_text_is_calibrated_on_random_inputs_by_default(tiny_model, monkeypatch, caplog):
    model = tiny_model("llama")
    random = kbitc.compile(model, bits=5, calibrate=RANDOM)

    def refuse(model, *_, **__):
        raise SamplingError(f"{type(model).__name__}: its 'generate' fails; use random")

    monkeypatch.setattr("kbitc.compiler.calibrator.sample_windows", refuse)
    with open_checkpoint(model) as checkpoint:
        made = make_calibrator(checkpoint, "auto", silent, is_wanted=True)
        assert made.label == "2 random inputs of up to 16 tokens, as the model cannot sample text"
        assert not made.is_text
        assert len(made.feeds(3)) == 3
        assert made._key("") == Calibrator(checkpoint, RANDOM)._key("")  # never those of sampled text
        asked = make_calibrator(checkpoint, SELF, silent, is_wanted=True)
        assert "that the model sampled itself" in asked.label
        with pytest.raises(SamplingError, match="its 'generate' fails"):
            asked.feeds()
    assert caplog.text.count("its 'generate' fails; use random. Calibrating on random inputs instead") == 1
    packed = kbitc.compile(model, bits=5)
    for name, parameter in packed.named_parameters():
        if isinstance(parameter, kbitc.KbitTensor):
            assert torch.equal(parameter.packed.planes, random.get_parameter(name).packed.planes)
    with pytest.raises(SamplingError):
        kbitc.compile(model, bits=5, calibrate=SELF)


def test_the_command_says_that_inputs_are_random(tiny_model, tmp_path, monkeypatch, caplog):
    tiny_model("llama").save_pretrained(tmp_path / "model")

    def refuse(self, **_):
        raise IndexError("list index out of range")

    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", refuse)
    command = ["compile", str(tmp_path / "model"), "--bits", "5", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "its 'generate' fails (IndexError: list index out of range)" in caplog.text
    assert "Calibrating on random inputs instead" in caplog.text
    assert "as the model cannot sample text" in (tmp_path / "out" / "kbit_plan.json").read_text()
    failed = CliRunner().invoke(app, [*command, "--force", "--calibrate", "self"])
    assert isinstance(failed.exception, SamplingError)


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
    """Of the same model and text: with other instructions the last bits of a sum are others."""
    with open_checkpoint(tiny_model("llama")) as checkpoint:
        calibrator = Calibrator(checkpoint, RANDOM)

        def measured():
            seen = []
            calibrator.remembered(lambda: seen.append(1) or {"sum": torch.ones(1)})
            return bool(seen)

        assert [measured(), measured()] == [True, False]
        monkeypatch.setattr("torch.get_num_threads", lambda: 97)
        assert not measured()
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
