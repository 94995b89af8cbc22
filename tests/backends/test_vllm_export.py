"""Folders of compressed-tensors: its own library decompresses our weights, and transformers runs them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import kbitc
from kbitc.artifact.reader import Artifact
from kbitc.backends import find_exporter
from kbitc.backends.vllm_export.export import converted
from kbitc.cli.app import app
from kbitc.errors import BackendUnavailable, BudgetError, SourceError, UsageError
from kbitc.evaluation import compressed_verify
from kbitc.evaluation.opening import open_model
from kbitc.sensitivity.score_table import ScoreTable

FORMATS = {
    "*": "fp16",
    "*_proj.weight": "sint4:32",
    "*.down_proj.weight": "sint8:32",
    "*.0.*.o_proj.weight": "sint4:64",
}
# The first pattern that fits counts.
PLAN = {"format": 1, "weights": {key: {"spec": FORMATS[key]} for key in reversed(FORMATS)}}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model with a head of its own, in bfloat16, as most are."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        eos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("vllm") / "source"
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(source):
    """The artifact and its export."""
    out, folder = source.parent / "out", source.parent / "compressed"
    kbitc.compile(source, plan=PLAN, out=out, quantizer="absmax", target="vllm")
    report = find_exporter("compressed-tensors").export(out, folder)
    return out, folder, report


SPECS = [("sint4:32", 96), ("sint8:64", 128), ("sint4:8", 40), ("int4:32+zp+iz", 96), ("int4:32+zp+iz", 64)]


@pytest.mark.parametrize(("spec", "features"), SPECS)
def test_integers_times_scales_are_the_weight(spec, features):
    torch.manual_seed(0)
    weight = torch.randn(5, features)
    weight[1] += 3.0
    weight[2] -= 3.0
    weight[3] = 0.0
    packed = kbitc.quantize(weight, spec).packed
    found = converted(packed)
    words, scales = found["weight_packed"], found["weight_scale"]
    bits, block = packed.spec.bits, packed.spec.block
    assert words.dtype == torch.int32
    assert words.shape == (5, -(-features * bits // 32))
    assert found["weight_shape"].tolist() == [5, features]
    integers = apart(words, bits)[:, :features] - 2 ** (bits - 1)
    if packed.zeros is not None:
        zeros = found["weight_zero_point"]
        assert zeros.shape == (1, features // block)
        own = apart(zeros.mT.contiguous(), bits).mT[:5] - 2 ** (bits - 1)
        integers = integers - own.repeat_interleave(block, 1)
    back = integers.float() * scales.float().repeat_interleave(block, 1)
    wanted = torch.ops.kbit.dequantize(*packed.operands(), torch.float32)
    assert torch.equal(back, wanted)
    assert not wanted[3].any()
    assert float((wanted - weight).norm() / weight.norm()) < 0.12


def apart(words, bits):
    stream = words.view(torch.uint8).to(torch.int64)
    return torch.stack([(stream >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -1).flatten(1)


def test_scales_that_16_bits_would_round_are_kept_whole():
    values = torch.randn(4, 64)
    values[0] *= 1e-6
    packed = kbitc.quantize(values, "sint4:32").packed
    assert converted(packed)["weight_scale"].dtype == torch.float32
    assert converted(kbitc.quantize(values[1:], "sint4:32").packed)["weight_scale"].dtype == torch.float16


def test_the_library_and_transformers_agree(folders):
    pytest.importorskip("compressed_tensors")
    out, folder, report = folders
    checks = compressed_verify.verify(folder)
    assert all(check.is_passed for check in checks), checks
    assert len(checks) == 4
    assert {entry["container"] for entry in report["weights"].values()} == {
        "int4, groups of 32",
        "int4, groups of 64",
        "int8, groups of 32",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert "lm_head" in config["quantization_config"]["ignore"]


def test_zero_points_are_whole_numbers(source, tmp_path):
    """Held, and decompressed by the library to the last bit; a budget does not choose them."""
    pytest.importorskip("compressed_tensors")
    plan = {"weights": {"*o_proj.weight": {"spec": "int4:32+zp+iz"}, "*": {"spec": "fp16"}}}
    kbitc.compile(source, plan=plan, out=tmp_path / "out", quantizer="absmax", target="vllm")
    report = find_exporter("compressed-tensors").export(tmp_path / "out", tmp_path / "folder")
    assert {entry["container"] for entry in report["weights"].values()} == {"int4, groups of 32, zero points"}
    checks = compressed_verify.verify(tmp_path / "folder")
    assert [check.name for check in checks][1:] == ["weights that decompress to other bits"]
    assert all(check.is_passed for check in checks), checks
    size = sum(entry["bytes"] for entry in report["weights"].values())
    assert size == 2 * (64 * (64 // 2 + 2 * 2) + 4 * (64 // 8) * 2 + 16)


def test_a_changed_weight_is_found(folders, tmp_path):
    pytest.importorskip("compressed_tensors")
    out, folder, _ = folders
    other = tmp_path / "other"
    plan = {"format": 1, "weights": {"*.q_proj.weight": {"spec": "sint4:32"}, "*": {"spec": "fp16"}}}
    kbitc.compile(out.parent / "source", plan=plan, out=other, quantizer="absmax")
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    state = load_file(damaged / "model.safetensors")
    state["model.layers.0.self_attn.q_proj.weight_packed"][0, 0] += 1
    save_file(state, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match="does not match its checksum"):
        compressed_verify.verify(damaged)
    wrong = compressed_verify._weights(damaged, Artifact.open(out))
    assert wrong.value == 1
    assert not wrong.is_passed


def test_command_line(folders, tmp_path):
    pytest.importorskip("compressed_tensors")
    out, folder, _ = folders
    runner = CliRunner()
    again = tmp_path / "again"
    done = runner.invoke(app, ["export", str(out), "--format", "compressed-tensors", "-o", str(again)])
    assert done.exit_code == 0, done.stderr
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    done = runner.invoke(app, ["verify", str(again), "--against", str(out), "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["passed"]


def test_it_is_not_run_here(folders):
    with pytest.raises(UsageError, match="kbitc runs the artifact that it was exported from"):
        open_model(str(folders[1]))


def test_a_budget_is_in_bytes_of_the_folder(source, tmp_path):
    out = tmp_path / "out"
    runner = CliRunner()
    command = [
        "compile",
        str(source),
        "--for",
        "vllm",
        "--quantizer",
        "absmax",
        "--calibrate",
        "none",
        "--json",
    ]
    done = runner.invoke(app, [*command, "--bits", "8", "-o", str(out)])
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    report = find_exporter("compressed-tensors").export(out, tmp_path / "compressed")
    with safe_open(tmp_path / "compressed" / "model.safetensors", framework="pt") as file:
        stored = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118  # not a dictionary
    assert stored == said["for"]["bytes"] <= said["parameters"]
    assert report["weights"]
    specs = {name: entry.spec for name, entry in Artifact.open(out).plan.weights.items()}
    for layer in range(2):
        own = {specs[f"model.layers.{layer}.self_attn.{kind}_proj.weight"] for kind in "qkv"}
        assert len(own) == 1  # one matmul there
    assert ScoreTable.open(out).target == "vllm"
    planned = runner.invoke(app, ["plan", str(out), "--bits", "7", "--for", "vllm", "--json"])
    assert planned.exit_code == 0, planned.stderr
    chosen = json.loads(planned.stdout)["weights"]
    for layer in range(2):
        own = {chosen[f"model.layers.{layer}.self_attn.{kind}_proj.weight"]["spec"] for kind in "qkv"}
        assert len(own) == 1
    other = runner.invoke(app, ["plan", str(out), "--bits", "7", "--for", "onnx"])
    assert "is of vllm, with its formats and bytes" in str(other.exception)
    done = runner.invoke(app, [*command, "--bits", "4", "-o", str(tmp_path / "small")])
    assert isinstance(done.exception, BudgetError)


def test_what_it_does_not_hold_is_listed(source, tmp_path):
    out = tmp_path / "out"
    kbitc.compile(source, spec="nf4:32", out=out, quantizer="absmax")
    with pytest.raises(UsageError, match=r"lm_head.weight: nf4:32[\s\S]*--for vllm"):
        find_exporter("compressed-tensors").export(out, tmp_path / "compressed")
    assert not (tmp_path / "compressed").exists()
    with pytest.raises(UsageError, match="q_proj.weight: nf4:32 becomes 16 bits"):
        kbitc.compile(source, spec="nf4:32", target="vllm", quantizer="absmax")
    with pytest.raises(UsageError, match="written from an artifact"):
        find_exporter("compressed-tensors").export(torch.nn.Linear(2, 2), tmp_path / "compressed")


def test_without_the_library(folders, monkeypatch):
    monkeypatch.setattr(compressed_verify, "find_spec", lambda _: None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'kbitc\[vllm\]'"):
        compressed_verify.verify(folders[1])
