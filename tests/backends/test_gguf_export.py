"""GGUF files: the gguf package decodes our weights, kbitc reads the file back, and llama.cpp runs it."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from typer.testing import CliRunner

import kbitc
from kbitc.artifact.loading import load
from kbitc.artifact.reader import Artifact
from kbitc.backends import find_exporter
from kbitc.backends.gguf_export import architectures
from kbitc.backends.gguf_export.blocks import KINDS, blocks_of, kind_of
from kbitc.backends.gguf_export.target import GgufTarget
from kbitc.backends.gguf_export.vocabulary import vocabulary_of
from kbitc.checkpoint import demo as demo_model
from kbitc.checkpoint import open_checkpoint
from kbitc.cli.app import app
from kbitc.errors import SourceError, UsageError
from kbitc.evaluation import gguf_verify
from kbitc.formats.spec import parse
from kbitc.graph.capture import capture
from kbitc.passes.canonicalize import Canonicalize
from kbitc.tensor.kbit_tensor import KbitTensor

gguf = pytest.importorskip("gguf")

BASE = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
WINDOWS = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16}
CONFIGS = {
    "llama": lambda: LlamaConfig(**BASE, tie_word_embeddings=False),
    "biased": lambda: LlamaConfig(**BASE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama3": lambda: LlamaConfig(**BASE, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "mistral": lambda: MistralConfig(**BASE, tie_word_embeddings=False, sliding_window=64),
    "qwen2": lambda: Qwen2Config(**BASE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**BASE, head_dim=128, tie_word_embeddings=True),
    "gemma": lambda: GemmaConfig(**BASE, head_dim=64),
    "gemma2": lambda: Gemma2Config(**BASE, **WINDOWS),
    "gemma3": lambda: Gemma3TextConfig(**{**BASE, "num_hidden_layers": 6}, **WINDOWS),
}
FORMATS = {
    "*embed*": "sint8:32",
    "*q_proj.weight": "sint6:16+sb8",
    "*k_proj.weight": "sint5:32",
    "*down_proj.weight": "int4:32+zp+sb6+min",
    "*up_proj.weight": "fp16",
    "*": "sint4:32+nl",
}
PLAN = {"format": 1, "weights": {key: {"spec": spec} for key, spec in FORMATS.items()}}
READ = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"}  # by transformers, from a file


def saved(config, folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model.folder() / name, folder)
    return folder


@pytest.fixture(scope="module", params=CONFIGS)
def exported(request, tmp_path_factory):
    """Name of the family, the artifact, and its file."""
    folder = tmp_path_factory.mktemp(request.param)
    source = saved(CONFIGS[request.param](), folder / "source")
    kbitc.compile(source, plan=PLAN, out=folder / "out", quantizer="absmax", target="gguf")
    find_exporter("gguf").export(folder / "out", folder / "model.gguf")
    return request.param, folder / "out", folder / "model.gguf"


@pytest.mark.parametrize("spec", KINDS, ids=str)
def test_the_gguf_package_decodes_the_same_values(spec):
    torch.manual_seed(0)
    weight = torch.randn(7, 512) * torch.rand(7, 1)
    weight[2, :256] = 0.01
    weight[3] = 0.0
    weight[4] += 1.0
    packed = kbitc.quantize(weight, str(spec)).packed
    blocks, lost = blocks_of(packed)
    kind = gguf.GGMLQuantizationType[KINDS[spec].name]
    assert blocks.nbytes == 7 * KINDS[spec].row_bytes(512)
    assert lost == 0.0
    wanted = torch.ops.kbit.dequantize(*packed.operands(), torch.float32).numpy()
    assert np.array_equal(gguf.quants.dequantize(blocks, kind), wanted)


def test_what_16_bits_lose_of_a_scale_is_said():
    weight = torch.randn(3, 64)
    weight[0] *= 1e-6
    blocks, lost = blocks_of(kbitc.quantize(weight, "sint8:32").packed)
    assert 0 < lost < 1e-4


def test_rows_are_whole_numbers_of_blocks():
    assert kind_of(parse("sint4:32"), 576).name == "Q4_0"
    assert kind_of(parse("sint4:32"), 40) is None
    assert kind_of(parse("sint3:16+sb6"), 576) is None
    assert kind_of(parse("sint3:16+sb6"), 768).name == "Q3_K"
    assert kind_of(parse("nf4:32"), 512) is None


def test_weights_are_the_artifacts_to_the_last_bit(exported):
    _, out, file = exported
    assert gguf_verify.is_gguf(file)
    check = gguf_verify.weights_check(file, Artifact.open(out))
    assert check.is_passed, check


def test_bytes_are_those_of_the_file(exported):
    """The plan's, weight by weight, with what lies between them."""
    _, out, file = exported
    plan = Artifact.open(out).plan
    tensors = gguf.GGUFReader(file).tensors
    end = max(tensor.data_offset + tensor.n_bytes for tensor in tensors)
    start = min(tensor.data_offset for tensor in tensors)
    more = sum(tensor.n_bytes for tensor in tensors if tensor.name == "rope_freqs.weight")
    kinds = {name: kind_of(entry.spec, entry.shape[1]) for name, entry in plan.weights.items()}
    planned = sum(
        2 * entry.numel
        if entry.spec.is_left_alone
        else entry.shape[0] * kinds[name].row_bytes(entry.shape[1])
        for name, entry in plan.weights.items()
    )
    vectors = sum(4 * np.prod(entry.shape) for entry in plan.left_alone.values())
    assert end - start == planned + vectors + more


def test_kbitc_reads_it_back(exported):
    """Names, order of rows and norms, by transformers' rules of reading."""
    family, out, file = exported
    if family not in READ:
        pytest.skip(f"transformers reads no {family} files, or loses something of them")
    state = load(out, dtype=torch.float32).state_dict()
    with open_checkpoint(str(file)) as checkpoint:
        assert checkpoint.ignored() == []
        for name in checkpoint.tensors():
            wanted = state[name]
            wanted = wanted.dequantize() if isinstance(wanted, KbitTensor) else wanted
            assert torch.allclose(checkpoint.read(name).float(), wanted.float(), rtol=1e-3, atol=1e-5), name


def test_llama_cpp_runs_it(exported):
    pytest.importorskip("llama_cpp")
    _, out, file = exported
    checks = gguf_verify.verify(file, str(out))
    assert all(check.is_passed for check in checks), checks


def test_files_are_the_same_twice(exported, tmp_path):
    _, out, file = exported
    find_exporter("gguf").export(out, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == file.read_bytes()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    result = kbitc.compile("demo", bits=4.75, target="gguf", quantizer="absmax", out=folder / "out")
    return folder / "out", result


def test_a_budget_is_kept_in_bytes_of_the_file(demo, tmp_path):
    out, _ = demo
    report = find_exporter("gguf").export(out, tmp_path / "demo.gguf")
    assert report["tensor_bytes"] * 8 <= 4.75 * report["parameters"]
    assert report["tensor_bytes"] * 8 > 4.6 * report["parameters"]
    assert len({entry["container"] for entry in report["weights"].values()}) > 2
    reader = gguf.GGUFReader(tmp_path / "demo.gguf")
    assert reader.get_field("tokenizer.ggml.pre").contents() == "gpt-2"
    assert len(reader.get_field("tokenizer.ggml.tokens").contents()) == 2048


def test_the_command_line(demo, tmp_path):
    out, _ = demo
    file = tmp_path / "demo.gguf"
    run = CliRunner().invoke(app, ["export", str(out), "--format", "gguf", "-o", str(file)])
    assert run.exit_code == 0, run.output
    assert "MB" in run.output
    again = CliRunner().invoke(app, ["export", str(out), "--format", "gguf", "-o", str(file)])
    assert isinstance(again.exception, UsageError)
    assert "--force" in str(again.exception)
    forced = CliRunner().invoke(
        app, ["export", str(out), "--format", "gguf", "-o", str(file), "--force", "--json"]
    )
    assert json.loads(forced.stdout)["kind"] == "gguf"
    alone = CliRunner().invoke(app, ["verify", str(file)])
    assert "--against" in str(alone.exception)
    assert [p.name for p in tmp_path.iterdir()] == ["demo.gguf"]


def test_a_plan_that_does_not_fit_says_which_weights(tmp_path):
    kbitc.compile("demo", spec="nf4:64", out=tmp_path / "out", quantizer="absmax")
    with pytest.raises(UsageError, match="--for gguf") as error:
        find_exporter("gguf").export(tmp_path / "out", tmp_path / "model.gguf")
    assert "model.embed_tokens.weight: nf4:64" in str(error.value)
    assert not (tmp_path / "model.gguf").exists()


def test_a_full_disk_leaves_nothing(demo, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    out, _ = demo
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(UsageError, match="No space left on device; nothing was written"):
        find_exporter("gguf").export(out, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing_and_keeps_the_old_file(demo, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    out, _ = demo
    file = tmp_path / "model.gguf"
    file.write_bytes(b"old")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_exporter("gguf").export(out, file, force=True)
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.gguf"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            lambda: Gemma2Config(**{**BASE, **WINDOWS, "query_pre_attn_scalar": 100}),
            "attention scaled by 100",
        ),
        (
            lambda: Gemma3TextConfig(**BASE, **WINDOWS, layer_types=["full_attention"] * 2),
            "sliding windows but in all layers beside every 6th",
        ),
        (lambda: LlamaConfig(**BASE, hidden_act="gelu"), "activation gelu"),
        (
            lambda: LlamaConfig(
                **BASE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
            ),
            "rotary embedding of type dynamic",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(config, message):
    made = config()
    with pytest.raises(UsageError) as error:
        list(architectures.header_of(made, architectures.architecture_of(made, "M"), "M"))
    assert message in str(error.value)


def test_other_architectures_are_named(tiny_model, tmp_path):
    kbitc.compile(tiny_model("gpt2"), plan={"weights": {"*": {"spec": "fp16"}}}, out=tmp_path / "out")
    with pytest.raises(UsageError, match="type 'gpt2' are not written as GGUF; these are: llama"):
        find_exporter("gguf").export(tmp_path / "out", tmp_path / "model.gguf")


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    source = saved(CONFIGS["llama"](), tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    kbitc.compile(source, plan=PLAN, out=tmp_path / "out", quantizer="absmax")
    with pytest.raises(SourceError, match="has no tokenizer"):
        find_exporter("gguf").export(tmp_path / "out", tmp_path / "model.gguf")


def tokenizer_like(pre=None, **options):
    """One whose vocabulary is a few letters."""
    vocab = {"<unk>": 0, "<s>": 1, "▁": 2, "a": 3, "b": 4, "ab": 5, "▁ab": 6, "<0x0A>": 7}
    model = models.BPE(vocab, [("a", "b"), ("▁", "ab")], unk_token="<unk>", **options)
    tokenizer = Tokenizer(model)
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    return tokenizer


def test_sentencepiece_vocabularies_are_merged_in_the_same_order():
    made = tokenizer_like(byte_fallback=True)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")
    found = dict(vocabulary_of(fast, 10, "M"))
    assert found["ggml.model"] == "llama"
    assert found["ggml.tokens"][8:] == ["[PAD8]", "[PAD9]"]
    scores = dict(zip(found["ggml.tokens"], found["ggml.scores"], strict=True))
    assert scores["ab"] > scores["▁ab"] > scores["a"]
    assert found["ggml.token_type"] == [2, 3, 1, 1, 1, 1, 1, 6, 5, 5]
    assert found["ggml.add_space_prefix"] is True
    assert found["ggml.bos_token_id"] == 1


def test_an_unknown_splitter_is_refused():
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer_like(pre_tokenizers.Whitespace()))
    with pytest.raises(UsageError, match="would read other tokens") as error:
        dict(vocabulary_of(fast, 8, "M"))
    assert "Whitespace" in str(error.value)


def test_a_target_offers_what_rows_allow():
    with open_checkpoint("demo") as checkpoint:
        weights = Canonicalize().run(capture(checkpoint.skeleton())).weights
    offered = {name: set(map(str, GgufTarget().candidates(weight))) for name, weight in weights.items()}
    down = next(name for name in weights if "down_proj" in name)  # rows of 384
    query = next(name for name in weights if "q_proj" in name)  # rows of 256
    assert "sint3:16+sb6" in offered[query]
    assert "sint5:32" not in offered[query]
    assert GgufTarget().misfit(weights[query], parse("sint5:32")) == ""
    assert "sint3:16+sb6" not in offered[down]
    assert GgufTarget().weight_bytes(weights[down], parse("sint4:32")) == 256 * 384 // 32 * 18
