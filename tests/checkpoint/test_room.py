"""A config that asks for more than its weights can fill is refused before anything of that size is made."""

from __future__ import annotations

import json
import os
import threading

import pytest
import torch
from torch import nn

from kbitc.checkpoint import open_checkpoint
from kbitc.checkpoint.room import Room
from kbitc.errors import SourceError


@pytest.fixture(scope="module")
def model_folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def source(model_folder, tmp_path):
    for path in model_folder.iterdir():
        os.link(path, tmp_path / path.name)
    return tmp_path


def edit(folder, **changes):
    path = folder / "config.json"
    data = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(data | changes))


NARROW = {
    "hidden_size": 2,
    "intermediate_size": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 2,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2_000_000}, "the config says 'num_hidden_layers': 2000000"),
        ({"num_hidden_layers": 10**15}, "the config says 'num_hidden_layers'"),
        ({"text_config": {"n_layers": 1e9}}, "the config says 'n_layers'"),
        ({"num_hidden_layers": 2500}, "asks for more than .* elements"),
        ({"num_hidden_layers": 2500, **NARROW}, "asks for more than .* parameters"),
        ({"vocab_size": 10**14}, "asks for more than .* elements"),
    ],
)
def test_too_large_a_config(changes, message, source):
    edit(source, **changes)
    with pytest.raises(SourceError, match=message) as caught:
        open_checkpoint(source)
    assert "config and weights do not belong together" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_threads_are_not_counted():
    made = []

    def build():
        made.append(nn.ModuleList(nn.Linear(2000, 2000, device="meta") for _ in range(20)))

    with Room(1, 1).bounded():
        thread = threading.Thread(target=build)
        thread.start()
        thread.join()
    assert made
    with pytest.raises(SourceError), Room(1, 1).bounded():
        build()
    build()  # and nothing is left of the bound


def test_counts_of_real_models_are_not_large():
    Room(3, 10).check_config({"num_hidden_layers": 128, "num_experts": 512, "block_size": 2**20}, "x")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "anything"])
def test_a_pipe_is_not_waited_for(name, source):
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    with pytest.raises(SourceError, match=f"'{name}' is a pipe, socket or device"):
        open_checkpoint(source)


def test_a_device_is_not_read(source):
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(SourceError, match=r"'model.safetensors' is a pipe, socket or device"):
        open_checkpoint(source)


def test_an_artifact_with_a_pipe_is_not_waited_for(tmp_path):
    import kbitc

    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(kbitc.quantize(torch.randn(8, 8), "nf4:8"), requires_grad=False)
    kbitc.save(model, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "out" / "model.safetensors")
    with pytest.raises(SourceError, match="is a pipe"):
        kbitc.load_into(model, tmp_path / "out")


def test_a_pipe_in_a_folder_of_an_artifact_is_not_waited_for(source, tmp_path, impatient):
    """Templates of a tokenizer, which another library opens."""
    import kbitc

    out = tmp_path / "out"
    kbitc.compile(source, spec="nf4:16", out=out)
    (out / ".git").mkdir()
    os.mkfifo(out / ".git" / "ipc")
    kbitc.load(out)
    (out / "additional_chat_templates").mkdir()
    os.mkfifo(out / "additional_chat_templates" / "x.jinja")
    with pytest.raises(SourceError, match=r"'additional_chat_templates/x\.jinja' is a pipe"):
        kbitc.load(out)
