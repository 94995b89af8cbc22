"""From what the user typed to the right reader, or to advice."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from kbitc.checkpoint import TensorInfo, demo, open_checkpoint
from kbitc.errors import SourceError, UsageError


def test_folder_by_string_and_path(tiny_model, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    for source in (tmp_path, str(tmp_path)):
        with open_checkpoint(source) as checkpoint:
            assert checkpoint.label == str(tmp_path)
            assert isinstance(next(iter(checkpoint.tensors().values())), TensorInfo)


def test_demo_is_the_folder_in_the_package(tiny_model, tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "demo_model")
    monkeypatch.setattr(demo, "folder", lambda: tmp_path / "demo_model")
    checkpoint = open_checkpoint("demo")
    assert checkpoint.label == "demo"
    assert checkpoint.folder == tmp_path / "demo_model"


def test_home_is_expanded(tiny_model, tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "m")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_checkpoint("~/m").folder == tmp_path / "m"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "give its folder"),
        ("config.json", "give its folder"),
        ("pytorch_model.bin", "pickle can run code"),
        ("weights.pt", "pickle can run code"),
        ("model.ckpt", "pickle can run code"),
        ("notes.md", "not a .gguf; give a GGUF file, a model folder, a hub id"),
    ],
)
def test_files(name, message, tmp_path):
    (tmp_path / name).write_text("x")
    with pytest.raises(SourceError, match=message):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("lama-7b", "llama-7b"),
        ("llama-7b/snapshot", None),
        ("lama-7b/inner", "llama-7b"),
        ("model.gguff", "model.gguf"),
    ],
)
def test_did_you_mean(typed, near, tmp_path):
    (tmp_path / "llama-7b").mkdir()
    (tmp_path / "model.gguf").touch()
    with pytest.raises(SourceError, match="no such file or folder") as caught:
        open_checkpoint(tmp_path / typed)
    assert near is None or f"did you mean '{tmp_path / near}'?" in str(caught.value)


def test_a_word_alone_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        SourceError, match="no such file or folder: gpt2; a model of the hub is named org/name"
    ):
        open_checkpoint("gpt2")
    with pytest.raises(SourceError, match="did you mean 'demo'"):
        open_checkpoint("dem")


@pytest.mark.parametrize("source", ["demo", Path(), nn.Linear(2, 2)])
def test_only_hub_ids_have_revisions(source):
    with pytest.raises(UsageError, match="only hub ids have revisions"):
        open_checkpoint(source, revision="main")


@pytest.mark.parametrize("name", ["a" * 5000, "a" * 300 + "/x", "x\0"])
def test_a_name_that_nothing_can_have(name):
    with pytest.raises(SourceError, match="no such file or folder|is neither a local path nor a hub id"):
        open_checkpoint(name)
