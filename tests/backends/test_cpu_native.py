"""The native step: the logits and tokens of the eager model, for prompts and tokens, without a compiler."""

from __future__ import annotations

import os
import threading

import pytest
import torch

import kbitc
from kbitc.backends import make_decoder
from kbitc.backends._decoding.cache import GrowingCache, PlainCache
from kbitc.backends._decoding.decoder import Decoder
from kbitc.backends.cpu.native_decoder import NativeDecoder
from kbitc.backends.cpu.native_values import Unknown
from kbitc.errors import UsageError
from kbitc.kernels.cpu.build import load

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not load(), reason="the native kernels cannot be had here")

PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9]])
NO_END = {"eos_token_id": None, "pad_token_id": 0}
SMALL = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Families by what they need beside a llama's operations.
CONFIGS = {
    "Llama": {},
    "Mistral": {"sliding_window": 24},  # a window
    "Qwen2": {},  # biases
    "Qwen3": {"head_dim": 16},  # norms of heads
    "Gemma": {"head_dim": 16},  # a scaled embedding, 1 + weight
    "Gemma2": {"head_dim": 16, "sliding_window": 24},  # soft caps, windows by turns
    "Gemma3Text": {"head_dim": 16, "sliding_window": 24},
    "Phi": {},  # a part of each head turned, a norm with a bias
    "Phi3": {},  # queries, keys and values in one weight
    "Cohere": {},  # turned in pairs
    "Glm": {"head_dim": 16},
    "Granite": {},  # multipliers
    "Olmo2": {},
    "StableLm": {},
    "Starcoder2": {},
    "Nemotron": {},  # squared relu
}


def other_model(name, dtype=torch.float32, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **CONFIGS[name], **more})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.05)  # not the initial ones and zeros
    return model.to(dtype)


def packed(model, spec="nf4:32"):
    return kbitc.compile(model, spec=spec, quantizer="absmax", calibrate="none")


def native(model):
    decoder = make_decoder(model, "cpu")
    assert isinstance(decoder, NativeDecoder)
    return decoder


def exact_cache(decoder):
    """One that keeps float32, so that only the order of sums differs from the eager model's."""
    usual, decoder.kv = decoder.kv, PlainCache(torch.float32)
    cache = decoder.new_cache(8)
    decoder.kv = usual
    return cache


def logits_of(decoder, ids, counts, cache):
    """All logits, the tokens given so many at a time."""
    parts, first = [], 0
    for count in counts:
        parts.append(decoder.run(ids[first : first + count], cache, range(count)))
        first += count
    return torch.cat(parts)


def relative(got, wanted):
    return float((got - wanted).abs().max() / wanted.abs().max())


@torch.inference_mode()
def check(model, bound=1e-3):
    """Prompts of many and of few tokens, and single ones, past the first room of the cache."""
    decoder = native(model)
    count = min(90, model.config.max_position_embeddings)
    ids = torch.randint(3, 99, (count,), generator=torch.Generator().manual_seed(1))
    wanted = model(input_ids=ids[None]).logits[0].float()
    got = logits_of(decoder, ids, [count - 24, 3, 11, *[1] * 10], exact_cache(decoder))
    assert relative(got, wanted) < bound
    return decoder


USUAL = ("Mistral", "Gemma2", "Phi", "Phi3", "Cohere")


@pytest.mark.parametrize(
    "name", [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_families(name):
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this transformers has no {name}")
    decoder = check(packed(other_model(name)))
    assert list(decoder.generate(PROMPT, 64)) == list(Decoder(decoder.model).generate(PROMPT, 64))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("spec", ["int3:24+zp", "nf4:64+dq+out"])  # blocks of no vector, outlier columns
def test_formats(family, spec, tiny_model):
    decoder = check(packed(tiny_model(family), spec))
    assert list(decoder.generate(PROMPT, 20)) == list(Decoder(decoder.model).generate(PROMPT, 20))


def test_products_in_int8(tiny_model):
    check(packed(tiny_model("llama"), "int8:65536+a8"), bound=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_packed(dtype):
    model = other_model("Llama", dtype)
    plan = {"weights": {"*.down_proj.weight": "nf4:32", "*": "fp16"}}
    compiled = kbitc.compile(model, plan=plan, calibrate="none")
    decoder = native(compiled)
    exact = compiled.dequantize(torch.float32).float()
    ids = torch.arange(3, 40)
    with torch.inference_mode():
        wanted = exact(input_ids=ids[None]).logits[0]
        assert relative(logits_of(decoder, ids, [30, 1, 6], exact_cache(decoder)), wanted) < 1e-3


@torch.inference_mode()
def test_results_do_not_depend_on_threads_or_on_how_tokens_come(tiny_model):
    decoder = native(packed(tiny_model("llama")))
    ids = torch.arange(3, 63)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(logits_of(decoder, ids, [40, *[1] * 20], exact_cache(decoder)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (5, 5)])
@torch.inference_mode()
def test_segments_of_a_long_cache(heads):
    config = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "hidden_size": 12 * heads[0]}
    model = packed(other_model("Llama", **config, max_position_embeddings=4096))
    decoder = native(model)
    ids = torch.randint(3, 99, (2200,), generator=torch.Generator().manual_seed(2))
    wanted = model(input_ids=ids[None]).logits[0]
    cache = exact_cache(decoder)
    for first, last, counts in ((0, 300, [1, 3]), (304, 2190, [4, 1, 1, 2])):
        decoder.run(ids[first:last], cache, [])
        own = slice(last, last + sum(counts))
        assert relative(logits_of(decoder, ids[own], counts, cache), wanted[own]) < 1e-3


@torch.inference_mode()
def test_several_sequences_at_once(tiny_model):
    decoder = native(packed(tiny_model("llama")))
    texts = [torch.arange(3, 10), torch.arange(40, 45), torch.arange(60, 90)]
    together, apart, slots = [], [], []
    for text in texts:
        cache = exact_cache(decoder)
        decoder.run(text[:-2], cache, [])
        other = exact_cache(decoder)
        decoder.run(text[:-2], other, [])
        apart.append(decoder.run(text[-2:], other, [1]))
        slots.append(cache.addresses(2))
        together.append(cache)
    starts = [cache.growing[0].length - 2 for cache in together]
    ids = torch.cat([text[-2:] for text in texts])
    positions = torch.cat([torch.arange(start, start + 2) for start in starts])
    got = torch.ops.kbit.run_step(
        decoder._native, ids, positions, torch.cat(slots), starts, [2, 2, 2], [1, 3, 5], [], [32]
    )
    assert relative(got, torch.cat(apart)) < 2e-4  # six rows may take other kernels than two


def test_generate_of_transformers(tiny_model):
    model = packed(tiny_model("llama"))
    options = {"max_new_tokens": 40, **NO_END}
    wanted = model.generate(PROMPT, do_sample=False, **options)
    beams = model.generate(PROMPT, num_beams=2, do_sample=False, **options)
    decoder = native(model)
    decoder.install()
    decoder.spent()
    assert torch.equal(model.generate(PROMPT, do_sample=False, **options), wanted)
    assert decoder.spent()["products"] > 0
    assert torch.equal(model.generate(PROMPT, num_beams=2, do_sample=False, **options), beams)
    hidden = model.generate(
        PROMPT, do_sample=False, return_dict_in_generate=True, output_hidden_states=True, **options
    )
    assert torch.equal(hidden.sequences, wanted)  # those steps are the model's own, on the same cache
    assert decoder.spent()["products"] == 0
    decoder.uninstall()
    assert "generate" not in vars(model)


@torch.inference_mode()
def test_a_token_that_is_none_leaves_the_cache_as_it_was(tiny_model):
    decoder = native(packed(tiny_model("llama")))
    _, cache = decoder.prefill(PROMPT)
    with pytest.raises(IndexError, match="outside"):
        decoder.step(10_000, cache)
    assert cache.get_seq_length() == PROMPT.shape[1]
    wanted, _ = decoder.prefill(torch.cat([PROMPT, torch.tensor([[7]])], 1))
    assert relative(decoder.step(7, cache), wanted) < 1e-3


@torch.inference_mode()
def test_long_prompts_go_in_parts(tiny_model, monkeypatch):
    decoder = native(packed(tiny_model("llama")))
    ids = torch.arange(3, 60)[None]
    whole, _ = decoder.prefill(ids)
    monkeypatch.setattr("kbitc.backends.cpu.native_decoder.AT_ONCE", 16)
    parts, cache = decoder.prefill(ids)
    assert isinstance(cache, GrowingCache)
    assert cache.get_seq_length() == 57
    assert relative(parts, whole) < 1e-4


def test_threads_of_one_process(tiny_model):
    decoder = native(packed(tiny_model("llama")))
    prompts = [PROMPT + i for i in range(8)]
    wanted = [list(decoder.generate(prompt, 24)) for prompt in prompts]
    found = [None] * len(prompts)

    def decode(i):
        found[i] = list(decoder.generate(prompts[i], 24))

    threads = [threading.Thread(target=decode, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_after_use(tiny_model):
    decoder = native(
        packed(
            tiny_model(
                "llama",
            ),
            "nf4:32",
        )
    )
    wanted = list(decoder.generate(PROMPT, 12))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if list(decoder.generate(PROMPT, 12)) == wanted else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert list(decoder.generate(PROMPT, 12)) == wanted


def test_what_a_native_step_cannot_say(tiny_model):
    with pytest.raises(Unknown, match="attention by aten"):
        NativeDecoder(packed(tiny_model("bloom")))
    with pytest.raises(UsageError, match="none of its weights is packed"):
        NativeDecoder(tiny_model("llama"))


def test_replaced_weights_are_noticed(tiny_model):
    model = packed(tiny_model("llama"))
    decoder = native(model)
    model.model.norm.weight = torch.nn.Parameter(torch.zeros_like(model.model.norm.weight))
    with pytest.raises(UsageError, match="were replaced"):
        list(decoder.generate(PROMPT, 2))


@torch.inference_mode()
def test_rows_that_the_model_itself_moved_are_found(tiny_model):
    model = packed(tiny_model("llama"))
    decoder = native(model)
    ids = torch.arange(3, 93)
    cache = exact_cache(decoder)
    decoder.run(ids[:60], cache, [])
    model(input_ids=ids[None, 60:80], past_key_values=cache)  # past the cache's room
    wanted = model(input_ids=ids[None]).logits[0, 80:]
    assert relative(decoder.run(ids[80:], cache, range(10)), wanted) < 1e-3


def test_ops_of_the_graph():
    states = torch.randn(1, 2, 3, 4)
    torch.library.opcheck(torch.ops.kbit.cached.default, (states, 5))
    query = torch.empty(1, 4, 3, 8, device="meta")
    key, value = torch.empty(1, 2, 3, 8, device="meta"), torch.empty(1, 2, 3, 6, device="meta")
    assert torch.ops.kbit.attend(query, key, value, 1.0, 0, 0.0).shape == (1, 3, 4, 6)
    with pytest.raises(NotImplementedError, match="no cache"):
        torch.ops.kbit.attend(*(torch.randn(1, 2, 3, 4) for _ in range(3)), 1.0, 0, 0.0)


@torch.inference_mode()
def test_what_a_step_refuses(tiny_model):
    decoder = native(packed(tiny_model("llama")))
    ids = torch.arange(3, 7)
    slots = decoder.new_cache().addresses(4)
    run, step = torch.ops.kbit.run_step, decoder._native
    with pytest.raises(RuntimeError, match="no step 0"):
        run(0, ids, ids, slots, [0], [4], [3], [], [16])
    with pytest.raises(RuntimeError, match="int64 tokens"):
        run(step, ids.int(), ids, slots, [0], [4], [3], [], [16])
    with pytest.raises(RuntimeError, match="have 3 tokens, not 4"):
        run(step, ids, ids, slots, [0], [3], [3], [], [16])
    with pytest.raises(RuntimeError, match="a cache of 4 parts, not 2"):
        run(step, ids, ids, slots[:, :2].contiguous(), [0], [4], [3], [], [16])
    for wanted in ([4], [-1], [2, 2], [3, 1]):
        with pytest.raises(IndexError, match="rise within"):
            run(step, ids, ids, slots, [0], [4], wanted, [], [16])
    with pytest.raises(RuntimeError, match="ends too early"):
        torch.ops.kbit.build_step([], [], [], [1, 16], [])
