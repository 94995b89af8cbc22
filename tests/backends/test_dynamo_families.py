"""torch.compile with the backend "kbit" on models of transformers: one graph for prompts, one for each next token."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import kbitc
from kbitc.backends.dynamo.backend import kbit
from kbitc.graph.example_inputs import example_inputs

SPEC = {"spec": "nf4:32", "inner": "eager"}
MORE = ("gpt2", "opt", "bloom", "gpt_neox", "mixtral", "bart")
GENERATING = ("llama", "t5", *(pytest.param(family, marks=pytest.mark.slow) for family in MORE))

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def error(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def inputs_of(model):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(value.shape, generator=generator)
        if value.is_floating_point()
        else torch.ones(value.shape, dtype=value.dtype)
        if name == "attention_mask"
        else torch.randint(2, 20, value.shape, generator=generator)
        for name, value in example_inputs(model).items()
    }


def decoded(call, model, inputs):
    """Logits of a prompt and of one more token, on a static cache."""
    from transformers import EncoderDecoderCache, StaticCache

    config = model.config.get_text_config(decoder=True)
    prompt = inputs.get("decoder_input_ids", inputs["input_ids"])
    cache = StaticCache(config=config, max_cache_len=16)
    given, name = {}, "input_ids"
    if model.config.is_encoder_decoder:
        cache = EncoderDecoderCache(cache, StaticCache(config=config, max_cache_len=16))
        given, name = {"encoder_outputs": (torch.ones(2, 8, config.hidden_size) / 7,)}, "decoder_input_ids"
    found, at = [], 0
    for ids in (prompt, torch.full((2, 1), 5)):
        if model.config.model_type == "opt":  # its positions come from the mask otherwise, whose sum is data
            given["position_ids"] = torch.arange(at, at + ids.shape[1]).expand(2, -1)
        at += ids.shape[1]
        found.append(call(**{name: ids}, **given, past_key_values=cache, use_cache=True).logits)
    return found


@pytest.mark.parametrize("family", GENERATING)
@torch.no_grad()
def test_prefill_and_decode_of_a_family(family, tiny_model):
    model = tiny_model(family)
    wanted = kbitc.compile(model, spec="nf4:32")
    dense = copy.deepcopy(model)
    compiled = torch.compile(model, backend=kbit, options=SPEC, fullgraph=True)
    inputs = inputs_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        got = decoded(compiled, model, inputs)
    assert graphs() == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    for a, b, c in zip(got, decoded(wanted, model, inputs), decoded(dense, model, inputs), strict=True):
        assert error(a, b) <= 1e-3
        assert error(c, b) > 1e-2  # formats differ: the comparison can fail


@pytest.mark.parametrize("family", ["roberta", "clip"])
@torch.no_grad()
def test_a_family_without_decoding(family, tiny_model):
    model = tiny_model(family)
    compiled = torch.compile(model, backend=kbit, options=SPEC, fullgraph=True)
    inputs = inputs_of(model)
    got, wanted = compiled(**inputs), kbitc.compile(model, spec="nf4:32")(**inputs)
    name = "logits" if family == "roberta" else "logits_per_image"
    assert error(got[name], wanted[name]) <= 1e-3
    assert error(got[name], model(**inputs)[name]) > 1e-2


@torch.no_grad()
def test_two_compilations_serve_all_lengths(tiny_model):
    model = tiny_model("llama")
    wanted = kbitc.compile(model, spec="nf4:32")
    compiled = torch.compile(model, backend=kbit, options=SPEC, fullgraph=True)
    for length in range(1, 65):
        ids = torch.arange(length)[None] % 101
        got = compiled(input_ids=ids, use_cache=False).logits
        assert error(got, wanted(input_ids=ids).logits) <= 1e-3
    assert graphs() <= 2


@pytest.mark.slow
@torch.no_grad()
def test_a_state_space_model():
    """Mamba scans by `torch.vmap`."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=8)
    model = MambaForCausalLM(config).eval()
    ids = torch.arange(8)[None]
    wanted = kbitc.compile(copy.deepcopy(model), spec="nf4:32")(ids, use_cache=False).logits
    got = torch.compile(model, backend=kbit, options=SPEC)(ids, use_cache=False).logits
    assert error(got, wanted) <= 1e-3
    assert error(model(ids, use_cache=False).logits, wanted) > 1e-2
