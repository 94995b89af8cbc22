"""What is verified is what is loaded: configuration, names, dtypes, shapes and bytes, by every way of loading."""

from __future__ import annotations

import json
import re
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import kbitc
from kbitc.artifact.folders import PLAN_FILE
from kbitc.artifact.reader import Artifact
from kbitc.compiler.inspection import inspect
from kbitc.errors import SourceError
from kbitc.quantizers import quantize
from kbitc.system.checksums import sealed

IDS = torch.tensor([[1, 5, 9, 100, 7]])
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An artifact of a model of three layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "vocab_size": 101}
    folder = tmp_path_factory.mktemp("artifact")
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes)).save_pretrained(folder / "source")
    (folder / "source" / "tokenizer_config.json").write_text("{}")
    kbitc.compile(folder / "source", spec="nf4:16+zp", out=folder / "out")
    return folder / "out"


@pytest.fixture
def out(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "out")


@pytest.fixture
def old(out):
    """As versions before wrote it: checksums of bytes alone."""
    edit(out, PLAN_FILE, files=None, sha256=None)
    return out


def edit(folder, name, **values):
    """Set values of a JSON file; None removes one."""
    data = json.loads((folder / name).read_text()) | values
    (folder / name).write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


WAYS = {"load": kbitc.load, "from_pretrained": AutoModelForCausalLM.from_pretrained}


@pytest.mark.parametrize("way", WAYS)
def test_what_was_written_is_loaded(out, way):
    Artifact.open(out).verify(is_whole=True)
    (out / "kbit_eval.json").write_text("[]")
    (out / "README.md").write_text("mine")
    assert torch.equal(logits(WAYS[way](out)), logits(kbitc.load(out, verify=False)))


def test_an_artifact_of_an_earlier_version_loads(old, whole):
    assert "files" not in json.loads((old / PLAN_FILE).read_text())
    assert torch.equal(logits(kbitc.load(old)), logits(kbitc.load(whole)))
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(old)), logits(AutoModelForCausalLM.from_pretrained(whole))
    )


def config(**values):
    return lambda folder: edit(folder, "config.json", **values)


def header(change):
    """Change the entries of the header of the weights, in place."""

    def do(folder):
        raw = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        entries = json.loads(raw[8 : 8 + length])
        change(entries)
        text = json.dumps(entries, separators=(",", ":")).encode().ljust(length)
        assert len(text) == length
        (folder / WEIGHTS).write_bytes(raw[:8] + text + raw[8 + length :])

    return do


def as_bfloat16(entries):
    for name, entry in entries.items():
        if name.endswith(".scales"):
            entry["dtype"] = "BF16"


def exchanged(entries):
    """Two tensors of one dtype and shape take each other's place."""
    first, second = (f"model.layers.{i}.self_attn.q_proj.weight.scales" for i in (0, 1))
    entries[first], entries[second] = entries[second], entries[first]


def flip(name, at):
    def do(folder):
        raw = bytearray((folder / name).read_bytes())
        raw[at] ^= 1
        (folder / name).write_bytes(raw)

    return do


def second_file(folder):
    """A good file beside a changed one."""
    shutil.copy(folder / WEIGHTS, folder / "z.safetensors")
    flip(WEIGHTS, -1)(folder)


def by_index(name):
    """An index that names another file."""

    def do(folder):
        file = folder / name
        names = list(load_file(folder / WEIGHTS))
        shutil.move(folder / WEIGHTS, file)
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return do


def added_index(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": WEIGHTS}}))


CHANGES = {
    "more_layers": config(num_hidden_layers=4),
    "fewer_layers": config(num_hidden_layers=2),
    "norms": config(rms_norm_eps=0.5),
    "activation": config(hidden_act="relu"),
    "a_space": lambda folder: (folder / "config.json").write_text((folder / "config.json").read_text() + " "),
    "other_files": config(transformers_weights="../x.safetensors"),
    "other_config": config(configuration_files=["config.4.0.0.json"]),
    "generation": lambda folder: edit(folder, "generation_config.json", do_sample=True, temperature=9.0),
    "dtype_of_scales": header(as_bfloat16),
    "exchanged": header(exchanged),
    "metadata": header(lambda entries: entries["__metadata__"].update(kbit_format="2")),
    "last_byte": flip(WEIGHTS, -1),
    "first_byte": flip(WEIGHTS, -2000),
    "second_file": second_file,
    "index_inside": by_index("other.safetensors"),
    "index_outside": by_index("../other.safetensors"),
    "added_index": added_index,
    "adapter": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "plan": lambda folder: edit(folder, PLAN_FILE, budget=3),
    "no_seal": lambda folder: edit(folder, PLAN_FILE, sha256=None),
    "no_files": lambda folder: edit(folder, PLAN_FILE, files=None),
    "fewer_files": lambda folder: edit(folder, PLAN_FILE, **sealed_without(folder, "config.json")),
    "no_plan": lambda folder: (folder / PLAN_FILE).unlink(),
    "linked": lambda folder: link_out(folder),
}
OLD = {"more_layers", "fewer_layers", "other_files", "other_config", "last_byte", "first_byte", "second_file"}
OLD |= {"exchanged", "index_outside", "adapter", "no_plan", "linked"}
BY_US = {
    "no_quantization": config(quantization_config=None),
    "renamed": config(quantization_config={"quant_method": "x"}),
}


def sealed_without(folder, name):
    data = json.loads((folder / PLAN_FILE).read_text())
    return sealed(data | {"files": {k: v for k, v in data["files"].items() if k != name}})


def link_out(folder):
    shutil.move(folder / WEIGHTS, folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_found(out, name, way):
    CHANGES[name](out)
    # transformers itself says that a file is not there which the config names
    kinds = (SourceError, OSError, ValueError) if name.startswith("other_") else SourceError
    with pytest.raises(kinds, match=f"{out.parent.name}|must reference a file inside"):
        WAYS[way](out)


@pytest.mark.parametrize("name", sorted(OLD))
def test_a_change_of_an_earlier_artifact_is_found(old, name):
    CHANGES[name](old)
    with pytest.raises(SourceError, match=re.escape(str(old.parent))):
        kbitc.load(old)


@pytest.mark.parametrize("name", BY_US)
@pytest.mark.parametrize("verify", [True, False])
def test_weights_are_never_random(out, name, verify):
    """Without its entry in the config, transformers would make a random model of the artifact."""
    BY_US[name](out)
    with pytest.raises(SourceError, match="quantization_config is not that of"):
        kbitc.load(out, verify=verify)


@pytest.mark.parametrize(
    "changed",
    [
        {"weights": 3.5}, {"weights": "x"}, {"weights": ["x"]}, {"weights": False}, {"weights": {"a": 3}},
        {"weights": [["a", "nf4:16"]]}, {"transposed": None}, {"transposed": 3}, {"transposed": "ab"},
        {"transposed": [3]}, {"transposed": {"a": 1}}, {"view_of": 3}, {"view_of": {"a": 3}}, {"view_of": "ab"},
        {"view_of": {"a": "ab"}}, {"format": None}, {"format": "x"}, {"format": float("nan")}, {"format": {}},
        {"bits_per_param": "x"}, {"bits_per_param": []},
    ],
)  # fmt: skip
def test_a_config_of_other_types_is_an_error(out, changed, monkeypatch):
    """transformers makes the entry an object before anything is verified."""
    monkeypatch.setenv("KBITC_VERIFY", "off")
    entry = json.loads((out / "config.json").read_text())["quantization_config"]
    edit(out, "config.json", quantization_config=entry | changed)
    with pytest.raises(SourceError, match=r"config\.json: its quantization_config: damaged .* copy it again"):
        AutoModelForCausalLM.from_pretrained(out)


def test_a_config_without_a_class_is_an_error_unverified(out):
    edit(out, "config.json", architectures=None, model_type="clap_text_model")
    with pytest.raises(SourceError, match="does not say of which class the model is"):
        kbitc.load(out, verify=False)
    with pytest.raises(SourceError, match="does not say of which class the model is"):
        inspect(str(out), with_graph=True)


@pytest.mark.parametrize("layers", [2, 4])
def test_no_key_is_missing_or_unexpected_unverified(out, layers):
    edit(out, "config.json", num_hidden_layers=layers)
    with pytest.raises(SourceError, match=r"is not of the model that was compiled.*layers\.[23]\."):
        kbitc.load(out, verify=False)


def test_whoever_asks_for_it_loads_unverified(out, monkeypatch):
    flip(WEIGHTS, -1)(out)
    kbitc.load(out, verify=False)
    monkeypatch.setenv("KBITC_VERIFY", "off")
    kbitc.load(out)
    AutoModelForCausalLM.from_pretrained(out)
    monkeypatch.setenv("KBITC_VERIFY", "on")
    with pytest.raises(SourceError, match="does not match its checksum"):
        AutoModelForCausalLM.from_pretrained(out)


def test_a_changed_tokenizer_is_found_when_all_is_verified(out):
    (out / "tokenizer_config.json").write_text('{"x": 1}')
    kbitc.load(out)
    with pytest.raises(SourceError, match=r"tokenizer_config\.json: it does not match its checksum"):
        Artifact.open(out).verify(is_whole=True)


def test_shards(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("kbitc.artifact.writer.SHARD_BYTES", 4000)
    kbitc.compile(whole.parent / "source", spec="nf4:16+zp", out=tmp_path / "out")
    assert torch.equal(logits(kbitc.load(tmp_path / "out")), logits(kbitc.load(whole)))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors.index.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(SourceError, match=r"index\.json: it does not match"):
        kbitc.load(tmp_path / "out")


def test_a_folder_of_the_hub_s_cache(whole, tmp_path):
    """Links into the cache's own blobs."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b" / "blobs"
    shutil.copytree(whole, snapshot)
    blobs.mkdir()
    for path in [*snapshot.iterdir()]:
        path.rename(blobs / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    assert torch.equal(logits(kbitc.load(snapshot)), logits(kbitc.load(whole)))
    AutoModelForCausalLM.from_pretrained(snapshot)


DAMAGE = {
    "rows": ("0.weight.planes", lambda t: t[:-1]),
    "columns": ("0.weight.planes", lambda t: t[:, :-1]),
    "dtype": ("0.weight.planes", lambda t: t.int()),
    "scales": ("0.weight.scales", lambda t: t[:, :-1]),
    "scale_dtype": ("0.weight.scales", lambda t: t.float()),
    "codebook": ("kbit.codebook.nf4", lambda t: t[:-1]),
    "codebook_dtype": ("kbit.codebook.nf4", lambda t: t.half()),
    "bias": ("0.bias", lambda t: t[:-1]),
    "outliers": ("0.weight.outlier_index", lambda t: t[:-1]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_shape_fails_at_load(name, tmp_path):
    """And not at the first forward, nor in a kernel."""
    model = nn.Sequential(nn.Linear(100, 30))
    model[0].weight = nn.Parameter(quantize(torch.randn(30, 100), "nf4:32+out2%"), requires_grad=False)
    kbitc.save(model, tmp_path / "out")
    key, change = DAMAGE[name]
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    save_file(tensors | {key: change(tensors[key]).contiguous()}, tmp_path / "out" / WEIGHTS)
    with pytest.raises(SourceError, match=f"'{re.escape(key)}' is .* which its plan does not ask for"):
        kbitc.load_into(nn.Sequential(nn.Linear(100, 30)), tmp_path / "out", verify=False)
