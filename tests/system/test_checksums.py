"""Fingerprints are of contents, and a checksum stands for every value of an object."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

from kbitc.checkpoint import open_checkpoint
from kbitc.errors import SourceError
from kbitc.system.checksums import check_seal, sealed


def fingerprint(folder):
    return open_checkpoint(folder).fingerprint()


def test_fingerprint_tells_sources_apart_by_what_they_hold(tiny_model, tmp_path):
    folder, moved = tmp_path / "model", tmp_path / "moved"
    tiny_model("llama").save_pretrained(folder, max_shard_size="20KB")
    first = fingerprint(folder)
    shutil.copytree(folder, moved, copy_function=shutil.copy)
    assert fingerprint(moved) == first
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert fingerprint(moved) != first
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes())
    assert fingerprint(folder) == first, "the time of a file says nothing of its contents"
    before, raw = shard.stat(), bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fingerprint(folder) != first


@pytest.mark.parametrize("changed", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_fingerprint_of_a_long_file_sees_a_change_of_any_tensor(tiny_model, tmp_path, monkeypatch, changed):
    """Two fine-tunes of one model, of equal names, sizes and times."""
    monkeypatch.setattr("kbitc.system.checksums.WHOLE", 0)
    monkeypatch.setattr("kbitc.system.checksums.SAMPLE", 16)
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    first = fingerprint(folder)
    assert fingerprint(folder) == first
    file = folder / "model.safetensors"
    tensors = dict(load_file(file))
    before = file.stat()
    tensors[changed] = tensors[changed] + 1
    save_file(tensors, file, {"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert fingerprint(folder) != first


def test_a_checksum_is_of_values_and_not_of_their_layout():
    data = {"b": [1, 0.1, float("inf")], "a": {"x": None, "é": "ü"}}
    again = json.loads(json.dumps(sealed(data), indent=3))
    check_seal(again, "plan.json", "compile again")
    for change in ({"b": [1, 0.1]}, {"c": 1}, {"sha256": "0"}, {"sha256": None}):
        with pytest.raises(SourceError, match=r"plan\.json: does not match its checksum.*compile again"):
            check_seal(again | change, "plan.json", "compile again")
