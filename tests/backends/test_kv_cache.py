"""Key-value caches of k bits: the rows, the native step that writes and reads them, and who takes them."""

import pytest
import torch
import transformers

import kbitc
from kbitc.backends import make_decoder
from kbitc.backends._decoding.cache import GrowingCache, PackedCache, PlainCache, cache_format
from kbitc.backends._decoding.packed_rows import FIRST, PackedRows, turned
from kbitc.errors import UsageError
from kbitc.formats.spec import parse
from kbitc.kernels.cpu.build import load

needs_native = pytest.mark.skipif(not load(), reason="no native kernels here")


def packed_model(head=64, key_heads=2, heads=4):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head,
        vocab_size=160,
        max_position_embeddings=512,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return kbitc.compile(model, spec="int8:64", quantizer="absmax", calibrate="none")


def tokens(count):
    return torch.randint(3, 150, (count,), generator=torch.Generator().manual_seed(3))


def relative(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


def test_turned_is_orthonormal_and_its_own_inverse():
    for size in (64, 96, 80, 12, 7):
        rows = torch.randn(5, size, dtype=torch.float64)
        assert torch.allclose(turned(turned(rows)), rows)
        assert torch.allclose(turned(rows).norm(dim=-1), rows.norm(dim=-1))
    assert turned(torch.eye(4)).abs().eq(0.5).all()


@pytest.mark.parametrize(
    ("spec", "bound"), [("int8:64", 0.01), ("nf4:64", 0.11), ("int4:32+zp", 0.11), ("nf3:24+zp", 0.22)]
)
@pytest.mark.parametrize("is_keys", [True, False])
@pytest.mark.parametrize("size", [64, 20])
def test_rows_read_as_written(spec, bound, is_keys, size):
    torch.manual_seed(0)
    rows = torch.randn(150, 3, size) + 3 * torch.randn(3, size)  # keys share much
    own = PackedRows(parse(spec), 192, 3, size, is_keys=is_keys)
    for first, last in ((0, 40), (40, 90), (90, 91), (91, 150)):
        own.write(first, rows[first:last])
    found = own.read(150, torch.float32)
    assert relative(found[:FIRST], rows[:FIRST]) < 2e-3
    off = rows - rows.mean(0) if is_keys else rows
    assert float((found - rows)[FIRST:].norm() / off[FIRST:].norm()) < bound
    whole = PackedRows(parse(spec), 192, 3, size, is_keys=is_keys)
    whole.write(0, rows)
    assert torch.equal(whole.read(150, torch.float32), found)  # whatever comes at once


def test_centred_keys_cost_less():
    """What all keys share, and channels far larger than others, are not quantized."""
    torch.manual_seed(0)
    loud = torch.ones(64)
    loud[::16] = 20.0
    keys = torch.randn(400, 1, 64) * loud + 50 * torch.randn(64)
    own = PackedRows(parse("nf4:64"), 448, 1, 64, is_keys=True)
    own.write(0, keys)
    as_values = PackedRows(parse("nf4:64"), 448, 1, 64, is_keys=False)
    as_values.write(0, keys)
    errors = [(rows.read(400, torch.float32) - keys)[FIRST:] for rows in (own, as_values)]
    quiet = [float(error[..., 1].norm()) for error in errors]
    assert quiet[0] < 0.2 * quiet[1]


@needs_native
@pytest.mark.parametrize("kernels", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize(
    ("head", "spec"),
    [
        *(
            (64, spec)
            for spec in ("int8:64", "nf4:64", "nf4:64+zp", "int3:32", "fp6:64", "nf5:16", "int6:64,nf4:32")
        ),
        *((128, "nf4:64"), (256, "int4:32+zp"), (320, "nf2:64")),
        *((80, "nf4:64"), (20, "int5:24+zp"), (64, "nf4:24")),  # lanes or blocks of no vector
    ],
)
@torch.inference_mode()
def test_native_attention_reads_what_it_wrote(kernels, head, spec):
    """The eager model on the same cache, unpacked, is the reference."""
    usual = torch.ops.kbit.cpu_kernels()
    try:
        torch.ops.kbit.use_cpu_kernels(kernels)
    except RuntimeError:
        pytest.skip(f"this machine has no {kernels}")
    try:
        decoder = make_decoder(packed_model(head), "cpu", spec)
        ids = tokens(200)
        for parts in ((140, 1, 1, 3), (30, 20, 90, 5)):
            cache, first = decoder.new_cache(8), 0
            for count in parts[:-1]:
                decoder.run(ids[first : first + count], cache, [])
                first += count
            last = ids[first : first + parts[-1]]
            got = decoder.run(last, cache, range(len(last)))
            cache.crop(-len(last))
            wanted = decoder.model(input_ids=last[None], past_key_values=cache).logits[0]
            assert cache.get_seq_length() == first + len(last)
            assert relative(got, wanted) < 4e-3  # its last rows are packed from slightly other numbers
    finally:
        torch.ops.kbit.use_cpu_kernels(usual)


@needs_native
@torch.inference_mode()
def test_native_rows_are_the_definitions():
    model = packed_model()
    decoder, exact = make_decoder(model, "cpu", "nf4:64+zp"), make_decoder(model, "cpu")
    exact.kv = PlainCache(torch.float32)
    ids = tokens(FIRST)  # as long as nothing is packed both see the same
    cache, plain = decoder.new_cache(8), exact.new_cache(8)
    decoder.run(ids, cache, [])
    exact.run(ids, plain, [])
    one = tokens(FIRST + 1)[-1:]
    decoder.run(one, cache, [])
    exact.run(one, plain, [])
    rows, keys = cache.growing[0].key_rows, plain.growing[0].key_rows.read(FIRST + 1, torch.float32)
    own = PackedRows(parse("nf4:64+zp"), 128, 2, 64, is_keys=True)
    own.write(0, keys[:FIRST])
    own.ways[0] = rows.ways[0]  # the queries' squares
    own.write(FIRST, keys[FIRST:])
    assert torch.allclose(own.ways[1], rows.ways[1], atol=1e-4)
    assert torch.allclose(own.ways[2], rows.ways[2], rtol=1e-3)
    assert torch.allclose(own.scales[FIRST].float(), rows.scales[FIRST].float(), rtol=2e-3)
    assert relative(own.read(FIRST + 1, torch.float32), rows.read(FIRST + 1, torch.float32)) < 5e-3


@needs_native
def test_tokens_of_an_int8_cache_are_those_of_float16():
    model = packed_model()
    prompt = tokens(90)[None]
    wanted = list(make_decoder(model, "cpu", "fp16").generate(prompt, 48))
    decoder = make_decoder(model, "cpu", "int8:64")
    assert list(decoder.generate(prompt, 48)) == wanted
    assert list(decoder.generate(prompt, 48)) == wanted  # from a cache of its own


@needs_native
@torch.inference_mode()
def test_a_cropped_cache_goes_on():
    decoder = make_decoder(packed_model(), "cpu", "nf4:64")
    ids = tokens(140)
    whole = decoder.new_cache(8)
    wanted = decoder.run(ids, whole, [139])
    cache = decoder.new_cache(8)
    decoder.run(ids[:130], cache, [])
    cache.crop(-90)
    assert relative(decoder.run(ids[40:], cache, [99]), wanted) < 2e-2
    cache.crop(-140)
    assert relative(decoder.run(ids, cache, [139]), wanted) < 1e-6


def test_what_a_format_is():
    assert cache_format("fp16") == PlainCache(torch.float16)
    assert isinstance(cache_format("int8:64"), PackedCache)
    for spec in ("sint4:64", "nf4:64+dq", "quantile4:64", "nf4:64+out1%", "int8:64+a8"):
        with pytest.raises(UsageError, match=r"a cache takes fp16, int8:64"):
            cache_format(spec)
    assert cache_format("int6:64,nf4:64") == PackedCache(parse("int6:64"), parse("nf4:64"))
    with pytest.raises(UsageError, match="does not go with k bits"):
        cache_format("fp16,nf4:64")
    with pytest.raises(UsageError, match="one of keys and one of values"):
        cache_format("nf4:64,nf4:64,nf4:64")
    with pytest.raises(UsageError, match="not a spec"):
        cache_format("half")


def test_who_takes_them(tiny_model):
    plain = tiny_model("llama")
    assert make_decoder(plain, "eager", "fp16").new_cache(4).format == PlainCache(torch.float16)
    with pytest.raises(UsageError, match=r"--kv nf4:64: .* needs packed weights"):
        make_decoder(plain, "auto", "nf4:64")
    with pytest.raises(UsageError, match="without these take fp16"):
        make_decoder(packed_model(), "eager", "nf4:64")


@torch.inference_mode()
def test_float16_caches_of_the_eager_model(tiny_model):
    model = tiny_model("llama")
    ids = tokens(40) % 100
    wanted = model(input_ids=ids[None]).logits[0]
    assert relative(make_decoder(model, "eager", "fp16").logits(ids), wanted) < 2e-3


@torch.inference_mode()
def test_the_model_itself_fills_a_packed_cache():
    model = packed_model()
    ids = tokens(100)
    wanted = model(input_ids=ids[None]).logits[0]
    cache = GrowingCache(2, kept_as=cache_format("int8:64"))
    got = [model(input_ids=part[None], past_key_values=cache).logits[0] for part in ids.split(30)]
    assert relative(torch.cat(got), wanted) < 0.02
