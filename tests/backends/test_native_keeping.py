"""Native steps that are kept: found again, made anew for another model, and never read damaged."""

import json

import pytest
import torch

import kbitc
from kbitc.backends import make_decoder
from kbitc.backends.cpu import native_decoder, native_keeping
from kbitc.kernels.cpu.build import load

pytestmark = pytest.mark.skipif(not load(), reason="no native kernels here")

PROMPT = torch.tensor([[5, 17, 60, 3]])


@pytest.fixture
def folder():
    return native_keeping.kept_folder()  # of this test alone, see conftest.py


@pytest.fixture
def traced(monkeypatch):
    """How often a step was made."""
    times = []
    make = native_decoder.native_step

    def counted(*given):
        times.append(given)
        return make(*given)

    monkeypatch.setattr(native_decoder, "native_step", counted)
    return times


def packed(model, spec="nf4:32"):
    return kbitc.compile(model, spec=spec, quantizer="absmax", calibrate="none")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_a_kept_step_gives_the_same(family, tiny_model, folder, traced):
    model = packed(tiny_model(family), "nf4:32+dq+out")
    first = make_decoder(model, "cpu")
    second = make_decoder(model, "cpu")
    assert len(traced) == 1
    assert len(list(folder.glob("*.json"))) == 1
    assert (second.program.code, second.program.numbers) == (first.program.code, first.program.numbers)
    assert second.program.slots == first.program.slots
    assert second.fusions == first.fusions
    for ours, theirs in zip(second.program.constants, first.program.constants, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert list(second.generate(PROMPT, 20)) == list(first.generate(PROMPT, 20))


def test_other_weights_of_the_same_model(tiny_model, folder, traced):
    model = tiny_model("llama")
    one = packed(model)
    make_decoder(one, "cpu")
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" not in name:
                tensor.mul_(1.5)
    other = packed(model)
    decoder = make_decoder(other, "cpu")
    assert len(traced) == 1  # packed weights are not in the file
    assert list(decoder.generate(PROMPT, 20)) == list(make_decoder(other, "eager").generate(PROMPT, 20))
    with torch.no_grad():
        model.model.norm.weight.mul_(torch.linspace(0.2, 2.0, len(model.model.norm.weight)))
    third = packed(model)
    decoder = make_decoder(third, "cpu")
    assert len(traced) == 2  # constants may have been computed from what is not packed
    assert list(decoder.generate(PROMPT, 20)) == list(make_decoder(third, "eager").generate(PROMPT, 20))
    make_decoder(packed(model, "nf4:64"), "cpu")
    assert len(traced) == 3


def test_a_damaged_file_is_made_again(tiny_model, folder, traced):
    model = packed(tiny_model("llama"))
    wanted = list(make_decoder(model, "cpu").generate(PROMPT, 8))
    (file,) = folder.glob("*.json")
    whole = file.read_text()
    data = json.loads(whole)
    data["code"][7] += 1
    for text in (json.dumps(data), whole[: len(whole) // 2], "", "[]"):
        file.write_text(text)
        assert list(make_decoder(model, "cpu").generate(PROMPT, 8)) == wanted
        assert json.loads(file.read_text()) == json.loads(whole)
    assert len(traced) == 5


def test_a_file_that_others_may_write_is_not_read(tiny_model, folder, traced):
    model = packed(tiny_model("llama"))
    make_decoder(model, "cpu")
    folder.chmod(0o777)
    make_decoder(model, "cpu")
    assert len(traced) == 2


def test_large_constants_are_not_written(tiny_model, folder, traced, monkeypatch):
    monkeypatch.setattr("kbitc.backends.cpu.native_keeping.MOST_NUMBERS", 1)
    model = packed(tiny_model("llama"))
    make_decoder(model, "cpu")
    make_decoder(model, "cpu")
    assert len(traced) == 2
    assert not list(folder.glob("*"))
