"""GGUF files: every tensor is what transformers loads, rounded to the file's 16 bits."""

from __future__ import annotations

import os
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from kbitc.checkpoint import open_checkpoint
from kbitc.errors import BackendUnavailable, SourceError

gguf = pytest.importorskip("gguf")
Kind = gguf.GGMLQuantizationType

MODELS = Path.home() / ".cache" / "kbitc-models"
WIDTH, WIDE, HEADS, KV, LAYERS, VOCABULARY = 64, 96, 4, 2, 2, 41

ATTENTION = {
    "attn_norm.weight": (WIDTH,),
    "attn_q.weight": (WIDTH, WIDTH),
    "attn_k.weight": (WIDTH // HEADS * KV, WIDTH),
    "attn_v.weight": (WIDTH // HEADS * KV, WIDTH),
    "attn_output.weight": (WIDTH, WIDTH),
}
MLP = {
    "ffn_norm.weight": (WIDTH,),
    "ffn_gate.weight": (WIDE, WIDTH),
    "ffn_up.weight": (WIDE, WIDTH),
    "ffn_down.weight": (WIDTH, WIDE),
}
ENDS = {"token_embd.weight": (VOCABULARY, WIDTH), "output_norm.weight": (WIDTH,)}
EXPERTS, NARROW = 3, 1408  # transformers does not read the width of Qwen2-MoE's experts

LLAMA = (ATTENTION | MLP, ENDS)
GPT2 = (
    {
        "attn_norm.weight": (WIDTH,), "attn_norm.bias": (WIDTH,), "attn_qkv.weight": (3 * WIDTH, WIDTH),
        "attn_qkv.bias": (3 * WIDTH,), "attn_output.weight": (WIDTH, WIDTH), "attn_output.bias": (WIDTH,),
        "ffn_norm.weight": (WIDTH,), "ffn_norm.bias": (WIDTH,), "ffn_up.weight": (4 * WIDTH, WIDTH),
        "ffn_up.bias": (4 * WIDTH,), "ffn_down.weight": (WIDTH, 4 * WIDTH), "ffn_down.bias": (WIDTH,),
    },
    ENDS | {"output_norm.bias": (WIDTH,), "position_embd.weight": (1024, WIDTH), "output.weight": (VOCABULARY, WIDTH)},
)  # fmt: skip
QWEN2MOE = (
    ATTENTION
    | {"attn_q.bias": (WIDTH,), "attn_k.bias": (WIDTH // HEADS * KV,), "attn_v.bias": (WIDTH // HEADS * KV,)}
    | {
        "ffn_norm.weight": (WIDTH,), "ffn_gate_inp.weight": (EXPERTS, WIDTH),
        "ffn_gate_exps.weight": (EXPERTS, NARROW, WIDTH), "ffn_up_exps.weight": (EXPERTS, NARROW, WIDTH),
        "ffn_down_exps.weight": (EXPERTS, WIDTH, NARROW), "ffn_gate_inp_shexp.weight": (WIDTH,),
        "ffn_gate_shexp.weight": (5632, WIDTH), "ffn_up_shexp.weight": (5632, WIDTH),
        "ffn_down_shexp.weight": (WIDTH, 5632),
    },
    ENDS | {"output.weight": (VOCABULARY, WIDTH)},
)  # fmt: skip
LFM2 = (
    {
        0: {"shortconv.conv.weight": (WIDTH, 3), "shortconv.in_proj.weight": (3 * WIDTH, WIDTH),
            "shortconv.out_proj.weight": (WIDTH, WIDTH), "attn_norm.weight": (WIDTH,)} | MLP,
        1: ATTENTION | MLP | {"attn_q_norm.weight": (WIDTH // HEADS,), "attn_k_norm.weight": (WIDTH // HEADS,)},
    },
    {"token_embd.weight": (VOCABULARY, WIDTH), "token_embd_norm.weight": (WIDTH,)},
)  # fmt: skip
MORE = {
    "qwen2moe": {
        "expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": NARROW,
        "expert_shared_feed_forward_length": 5632,
    },
    "lfm2": {"shortconv.l_cache": 3, "rope.freq_base": 1e6},
}  # fmt: skip
TABLES = {"llama": LLAMA, "gpt2": GPT2, "qwen2moe": QWEN2MOE, "lfm2": LFM2}


def write(path, arch, kind=Kind.F16, extra=None):
    """A random model in the file's own conventions."""
    layers, ends = TABLES[arch]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_context_length(33)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(4 * WIDTH if arch == "gpt2" else WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv([0, KV] if arch == "lfm2" else KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    for key, value in MORE.get(arch, {}).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{arch}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(VOCABULARY)])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges(["t 1"])
    shapes = dict(ends) | (extra or {})
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layers.get(i, layers).items()}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        data = random.standard_normal(shape).astype(np.float32)
        stored = Kind.F32 if len(shape) == 1 or ".conv." in name else kind
        packed = data if stored == Kind.F32 else gguf.quants.quantize(data, stored)
        writer.add_tensor(name, packed, raw_dtype=None if stored == Kind.F32 else stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


DTYPES = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16, Kind.F32: torch.float32}


def check_equal(path, kind=Kind.Q8_0):
    checkpoint = open_checkpoint(path)
    skeleton = checkpoint.skeleton()
    model = type(skeleton).from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, **unpacked()
    )
    state, infos = model.state_dict(keep_vars=True), checkpoint.tensors()
    assert len({id(t) for t in state.values()}) == len(infos)
    for name, info in infos.items():
        tensor = checkpoint.read(name)
        assert (tuple(tensor.shape), tensor.dtype, tensor.nbytes) == (info.shape, info.dtype, info.nbytes)
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name
        if tensor.dim() == 2 and len(tensor) > 1:  # a gate of one row is one-dimensional in the file
            assert tensor.dtype == DTYPES.get(kind, torch.float16)
    assert all(p.is_meta for p in skeleton.parameters())
    return checkpoint


def unpacked():
    """From 5.23 on transformers keeps some files packed unless told not to."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


@pytest.mark.parametrize("arch", list(TABLES))
def test_architectures(arch, tmp_path):
    assert check_equal(write(tmp_path / "m.gguf", arch, Kind.F16), Kind.F16).ignored() == []


@pytest.mark.parametrize(
    "kind", [Kind.F32, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q8_0], ids=lambda kind: kind.name
)
def test_kinds(kind, tmp_path):
    check_equal(write(tmp_path / "m.gguf", "llama", kind), kind)


def test_rows_are_dequantized_in_parts(tmp_path, monkeypatch):
    from kbitc.checkpoint import gguf_header

    path = write(tmp_path / "m.gguf", "llama", Kind.Q8_0)
    whole = open_checkpoint(path).read("model.layers.0.mlp.up_proj.weight")
    monkeypatch.setattr(gguf_header, "CHUNK", 5 * WIDTH)
    assert torch.equal(open_checkpoint(path).read("model.layers.0.mlp.up_proj.weight"), whole)


def test_what_transformers_does_not_take_is_listed(tmp_path, caplog):
    path = write(tmp_path / "m.gguf", "llama", extra={"rope_freqs.weight": (8,)})
    assert open_checkpoint(path).ignored() == ["rope_freqs.weight"]
    assert "long contexts may differ" in caplog.text


def test_companions(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    open_checkpoint(write(tmp_path / "m.gguf", "llama")).save_companions(out)
    config = transformers.AutoConfig.from_pretrained(out)
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.hidden_size, config.dtype) == (WIDTH, torch.float16)


def test_fingerprint_tells_files_apart(tmp_path):
    path = write(tmp_path / "m.gguf", "llama")
    first = open_checkpoint(path).fingerprint()
    assert open_checkpoint(path).fingerprint() == first
    write(path, "llama", Kind.Q8_0)
    assert open_checkpoint(path).fingerprint() != first


def split(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def big_endian(path):
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b""), "is not a GGUF file"),
        (lambda path: path.write_bytes(b"junk" * 99), "is not a GGUF file"),
        (lambda path: path.write_bytes(write(path, "llama").read_bytes()[:200]), "cut off or damaged"),
        (lambda path: path.write_bytes(write(path, "llama").read_bytes()[:-100]), "is truncated, .* bytes"),
        (split, "one of 3 parts of a model; join them first"),
        (big_endian, "big-endian"),
        (lambda path: gguf_of(path, "llama"), "lacks .* tensors of LlamaForCausalLM"),
        (lambda path: gguf_of(path, "wololo"), "cannot read the model's config"),
    ],
)
def test_what_is_wrong_is_said_in_one_paragraph(make, message, tmp_path):
    path = tmp_path / "m.gguf"
    make(path)
    with pytest.raises(SourceError, match=message) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def gguf_of(path, arch):
    """A file with a config and an embedding, but no layers."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(33)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tensor("token_embd.weight", np.zeros((VOCABULARY, WIDTH), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_missing_package_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf", "llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'kbitc\[gguf\]'"):
        open_checkpoint(path)


@pytest.mark.skipif(
    not (MODELS / "smollm2-135m.gguf").exists(), reason="no smollm2-135m.gguf in ~/.cache/kbitc-models"
)
def test_real_model_equals_its_folder(tmp_path):
    checkpoint = open_checkpoint(MODELS / "smollm2-135m.gguf")
    folder = open_checkpoint(MODELS / "smollm2-135m")
    assert list(checkpoint.tensors()) == list(folder.tensors())
    for name in checkpoint.tensors():
        assert torch.equal(checkpoint.read(name).half(), folder.read(name)), name
    checkpoint.save_companions(tmp_path)
    ours, theirs = (
        transformers.AutoTokenizer.from_pretrained(path)("Once upon a time").input_ids
        for path in (tmp_path, MODELS / "smollm2-135m")
    )
    assert ours == theirs


KIND = struct.Struct("<I").pack


def _header(*parts):
    """A file of numbers of 64 bits and raw bytes; the counts of tensors and keys come first."""
    raw = b"".join(part if isinstance(part, bytes) else struct.pack("<Q", part) for part in parts)
    return b"GGUF" + KIND(3) + raw


KEY = struct.pack("<Q", 1) + b"k"
ROOM = bytes(2**25)  # zeros: a reader that believed a count would find as many empty strings in them


@pytest.mark.parametrize(
    "raw",
    [
        _header(2**40, 0, ROOM),
        _header(0, 2**40, ROOM),
        _header(0, 2**22, ROOM[: 2**21]),
        _header(0, 1, KEY, KIND(9), KIND(8), 2**40, ROOM),
        _header(0, 1, KEY, KIND(9), KIND(0), 2**40, ROOM),
        _header(0, 1, KEY, KIND(9), KIND(9), 2**40, ROOM),
        _header(0, 1, KEY, KIND(9), *([KIND(9), 1] * 500), ROOM),
        _header(1, 0, KEY, KIND(2**31), ROOM),
        _header(1, 0, KEY, KIND(2), 2**62, 2**62, KIND(0), 0, ROOM),
    ],
    ids=["tensors", "keys", "more keys than bytes", "texts", "numbers", "arrays", "depth", "dims", "sizes"],
)
def test_counts_of_a_header_are_not_believed(raw, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    started = time.perf_counter()
    with pytest.raises(SourceError, match="cut off or damaged|truncated"):
        open_checkpoint(path)
    assert time.perf_counter() - started < 2


def test_a_count_of_layers_is_not_believed(tmp_path):
    path = tmp_path / "m.gguf"
    key = b"llama.block_count"
    head, _, tail = write(path, "llama").read_bytes().partition(key)
    path.write_bytes(head + key + tail[:4] + KIND(2**31) + tail[8:])
    with pytest.raises(SourceError, match="the config says 'llama.block_count': 2147483648"):
        open_checkpoint(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(SourceError, match="is a pipe"):
        open_checkpoint(tmp_path / "m.gguf")
