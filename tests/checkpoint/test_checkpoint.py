"""Readers: every tensor equals what transformers loads; every bad source is one clear error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kbitc.checkpoint import open_checkpoint
from kbitc.errors import SourceError

REAL = Path.home() / ".cache" / "kbitc-models"


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def assert_reads_what_transformers_loads(folder, dtype=torch.float32):
    """Bit for bit, under the model's names, tied tensors once."""
    with open_checkpoint(str(folder)) as checkpoint:
        skeleton = checkpoint.skeleton()
        assert all(p.is_meta for p in skeleton.parameters())
        model = type(skeleton).from_pretrained(folder, dtype=dtype)
        wanted = model.state_dict(keep_vars=True)
        infos = checkpoint.tensors()
        assert len({id(t) for t in wanted.values()}) == len(infos)
        for name, info in infos.items():
            tensor = checkpoint.read(name)
            assert tuple(tensor.shape) == info.shape == tuple(wanted[name].shape)
            assert tensor.dtype == info.dtype
            assert torch.equal(tensor.to(dtype), wanted[name])


@pytest.mark.parametrize(
    "family", ["gpt2", "opt", "bloom", "gpt_neox", "llama", "mixtral", "roberta", "bart", "t5", "clip"]
)
@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_every_family_whole_and_in_shards(family, shard, tiny_model, tmp_path):
    folder = save(tiny_model(family), tmp_path / "m", max_shard_size=shard)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard == "20KB")
    assert_reads_what_transformers_loads(folder)


def test_experts_are_merged_in_order(tmp_path):
    """Mixtral on the hub: one tensor an expert; more than ten, so that order is not alphabetical."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=20, num_local_experts=12,
    )  # fmt: skip
    folder = save(MixtralForCausalLM(config), tmp_path / "m")
    names = [name for file in folder.glob("*.safetensors") for name in load_file(file)]
    assert any("experts.11." in name for name in names)
    assert_reads_what_transformers_loads(folder)


def test_half_precision_is_kept(tiny_model, tmp_path):
    folder = save(tiny_model("llama").to(torch.bfloat16), tmp_path / "m")
    with open_checkpoint(str(folder)) as checkpoint:
        assert {info.dtype for info in checkpoint.tensors().values()} == {torch.bfloat16}
    assert_reads_what_transformers_loads(folder, torch.bfloat16)


def test_names_without_the_base_prefix(tiny_model, tmp_path):
    """GPT-2 on the hub was saved from the bare model."""
    model = tiny_model("gpt2")
    folder = save(model, tmp_path / "m")
    file = folder / "model.safetensors"
    state = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # a mask that old checkpoints carry
    save_file(state, file, metadata={"format": "pt"})
    assert_reads_what_transformers_loads(folder)
    with open_checkpoint(str(folder)) as checkpoint:
        assert checkpoint.ignored() == ["h.0.attn.bias"]


def test_fingerprint_follows_the_files(tiny_model, tmp_path):
    folder = save(tiny_model("llama"), tmp_path / "m")
    first = open_checkpoint(str(folder)).fingerprint()
    assert open_checkpoint(str(folder)).fingerprint() == first
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"] + 1
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert open_checkpoint(str(folder)).fingerprint() != first


def test_companions_are_copied_and_weights_are_not(tiny_model, tmp_path):
    folder = save(tiny_model("llama"), tmp_path / "m")
    for name in ("tokenizer.json", "chat_template.jinja", "modeling_x.py", "notes.bin"):
        (folder / name).write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    open_checkpoint(str(folder)).save_companions(out)
    assert {p.name for p in out.iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "modeling_x.py",
    }  # fmt: skip


def break_missing_shard(folder):
    sorted(folder.glob("model-*.safetensors"))[0].unlink()


def break_truncate(folder):
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-7])


def break_header(folder):
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(b"\xff" * 64)


def break_index(folder):
    (folder / "model.safetensors.index.json").write_text("{")


def break_config(folder):
    (folder / "config.json").write_text("[]")


def break_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 77
    (folder / "config.json").write_text(json.dumps(config))


def break_layers(folder):
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))


def break_pickle(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def break_no_config(folder):
    (folder / "config.json").unlink()


def break_quantized(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))


def break_class(folder):
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlamaForTelepathy"]
    (folder / "config.json").write_text(json.dumps(config))


def break_type(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "llama17"
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_missing_shard, "shards are missing"),
        (break_truncate, "is truncated, .* download it again"),
        (break_header, "not a safetensors file"),
        (break_index, "is not valid JSON"),
        (break_config, "not an object"),
        (break_shape, "do not belong together"),
        (break_layers, "lacks 9 .* tensors of LlamaForCausalLM, the first is 'model.layers.2"),
        (break_pickle, "pickled .*save_pretrained"),
        (break_no_config, "no config.json"),
        (break_quantized, "quantized already, by 'gptq'"),
        (break_class, "no model class 'LlamaForTelepathy'"),
        (break_type, "cannot read the model's config"),
    ],
)
def test_a_broken_folder_is_one_clear_error(change, message, tiny_model, tmp_path):
    folder = save(tiny_model("llama"), tmp_path / "m", max_shard_size="20KB")
    change(folder)
    with pytest.raises(SourceError, match=message) as caught:
        open_checkpoint(str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_source_that_is_not_there(tmp_path):
    (tmp_path / "llama-7b").mkdir()
    with pytest.raises(SourceError, match=r"no such file or folder: .*; did you mean .*llama-7b"):
        open_checkpoint(str(tmp_path / "lama-7b"))
    with pytest.raises(SourceError, match="empty"):
        open_checkpoint(str(tmp_path / "llama-7b"))
    with pytest.raises(SourceError, match="pickled"):
        (tmp_path / "x.bin").write_bytes(b"")
        open_checkpoint(str(tmp_path / "x.bin"))
    with pytest.raises(SourceError, match="give its folder"):
        (tmp_path / "x.safetensors").write_bytes(b"")
        open_checkpoint(str(tmp_path / "x.safetensors"))
    with pytest.raises(SourceError, match="GGUF file"):
        (tmp_path / "x.gguf").write_bytes(b"junk" * 100)
        open_checkpoint(str(tmp_path / "x.gguf"))


def test_module_in_memory(tiny_model):
    model = tiny_model("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    with open_checkpoint(model) as checkpoint:
        skeleton = checkpoint.skeleton()
        assert all(p.is_meta for p in skeleton.parameters())
        assert skeleton.lm_head.weight is skeleton.model.embed_tokens.weight
        assert not any(p.is_meta for p in model.parameters())
        for name in checkpoint.tensors():
            assert torch.equal(checkpoint.read(name), model.state_dict()[name])
        first = checkpoint.fingerprint()
    with torch.no_grad():
        model.model.norm.weight += 1
    assert open_checkpoint(model).fingerprint() != first


def test_module_without_a_config(tmp_path):
    with open_checkpoint(nn.Linear(3, 2)) as checkpoint:
        assert set(checkpoint.tensors()) == {"weight", "bias"}
        checkpoint.save_companions(tmp_path)
    assert list(tmp_path.iterdir()) == []


class FakeHub(BaseHTTPRequestHandler):
    """The few routes that a snapshot download uses."""

    folder: Path
    commit = "0" * 40

    def _file(self):
        return self.folder / self.path.rpartition("/")[2]

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        if self.path.startswith("/api/models/org/tiny/"):
            files = [{"rfilename": p.name} for p in sorted(self.folder.iterdir())]
            tree = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "1" * 40}
                for p in sorted(self.folder.iterdir())
            ]
            data = json.dumps(
                tree
                if "/tree/" in self.path
                else {
                    "id": "org/tiny",
                    "sha": self.commit,
                    "siblings": files,
                    "private": False,
                    "tags": [],
                    "downloads": 0,
                }
            ).encode()
            self._send(200, data, body, {"Content-Type": "application/json"})
        elif self.path.startswith("/org/tiny/resolve/") and self._file().is_file():
            data = self._file().read_bytes()
            self._send(
                200, data, body, {"ETag": f'"{len(data):x}{self._file().name}"', "X-Repo-Commit": self.commit}
            )
        else:
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self._send(404, b"", body, headers)

    def _send(self, code, data, body, headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tiny_model, tmp_path):
    FakeHub.folder = save(tiny_model("llama"), tmp_path / "served")
    (FakeHub.folder / "pytorch_model.bin").write_bytes(b"never fetched")
    server = HTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


READ = """
import sys
from kbitc.checkpoint import open_checkpoint
from kbitc.errors import SourceError
try:
    with open_checkpoint(sys.argv[1]) as checkpoint:
        print(len(checkpoint.tensors()), checkpoint.folder)
except SourceError as error:
    print("ERROR", error)
"""


def run_with_hub(endpoint, cache, name, **extra):
    env = {
        "PATH": "/usr/bin", "HOME": str(cache), "HF_HOME": str(cache), "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1", **extra,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", READ, name], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_hub_id_from_a_server_then_from_the_cache(hub, tmp_path):
    cache = tmp_path / "cache"
    answer = run_with_hub(hub, cache, "org/tiny")
    count, folder = answer.split(" ", 1)
    assert int(count) > 10
    assert not (Path(folder) / "pytorch_model.bin").exists()
    assert run_with_hub("http://127.0.0.1:9", cache, "org/tiny", HF_HUB_OFFLINE="1") == answer


def test_unknown_hub_ids(hub, tmp_path):
    assert "neither a local path nor a model of the hub" in run_with_hub(hub, tmp_path / "c", "org/none")
    offline = run_with_hub("http://127.0.0.1:9", tmp_path / "c", "org/none", HF_HUB_OFFLINE="1")
    assert "not in the download cache" in offline


def test_importing_is_light():
    code = "import sys, kbitc.checkpoint; print([m for m in ('transformers','gguf','huggingface_hub') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


@pytest.mark.skipif(
    not (REAL / "smollm2-135m.gguf").exists(), reason="needs the real model smollm2-135m.gguf"
)
def test_gguf_equals_the_folder_it_was_made_into(tmp_path):
    with (
        open_checkpoint(REAL / "smollm2-135m.gguf") as gguf,
        open_checkpoint(REAL / "smollm2-135m") as folder,
    ):
        assert set(gguf.tensors()) == set(folder.tensors())
        for name in list(folder.tensors())[::9]:
            assert torch.equal(gguf.read(name).half(), folder.read(name)), name
        gguf.save_companions(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()


def test_tiny_gguf(tmp_path):
    """A LLaMA in the file's own conventions: rows of q and k permuted, F16 and Q8_0 tensors."""
    gguf = pytest.importorskip("gguf")
    import numpy as np
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads, width, wide, vocabulary = 4, 64, 96, 40
    config = LlamaConfig(
        hidden_size=width, intermediate_size=wide, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=2, vocab_size=vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    state = LlamaForCausalLM(config).state_dict()
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(heads)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(vocabulary)

    def permute(weight, count):
        return (
            weight.reshape(count, 2, weight.shape[0] // count // 2, -1).swapaxes(1, 2).reshape(weight.shape)
        )

    names = {
        "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
        "blk.0.attn_q.weight": "self_attn.q_proj.weight", "blk.0.attn_k.weight": "self_attn.k_proj.weight",
        "blk.0.attn_v.weight": "self_attn.v_proj.weight", "blk.0.attn_output.weight": "self_attn.o_proj.weight",
        "blk.0.ffn_gate.weight": "mlp.gate_proj.weight", "blk.0.ffn_up.weight": "mlp.up_proj.weight",
        "blk.0.ffn_down.weight": "mlp.down_proj.weight", "blk.0.attn_norm.weight": "input_layernorm.weight",
        "blk.0.ffn_norm.weight": "post_attention_layernorm.weight",
    }  # fmt: skip
    wanted = {}
    for theirs, ours in names.items():
        full = ours if ours.startswith("model.") else f"model.layers.0.{ours}"
        dense = state[full].numpy()
        stored = (
            permute(dense, heads if "attn_q" in theirs else 2)
            if "attn_q" in theirs or "attn_k." in theirs
            else dense
        )
        if dense.ndim == 1:
            writer.add_tensor(theirs, dense.astype(np.float32))
            wanted[full] = state[full]
        elif "ffn_up" in theirs:
            packed = gguf.quants.quantize(stored, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(theirs, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            wanted[full] = torch.from_numpy(
                gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
            ).half()
        else:
            writer.add_tensor(theirs, stored.astype(np.float16))
            wanted[full] = state[full].half()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_checkpoint(tmp_path / "tiny.gguf") as checkpoint:
        assert set(checkpoint.tensors()) == set(wanted)
        for name, tensor in wanted.items():
            assert torch.equal(checkpoint.read(name), tensor), name
    shutil.rmtree(tmp_path)
