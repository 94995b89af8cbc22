"""``kbitc verify``: what has changed, and what is no artifact to transformers any more."""

from __future__ import annotations

import json
import shutil

import pytest

from kbitc.artifact.folders import PLAN_FILE


@pytest.fixture
def out(compiled, tmp_path):
    return shutil.copytree(compiled[0], tmp_path / "out")


def edit(file, change):
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def remove(data):
    del data["quantization_config"]


def rename(data):
    data["Quantization_config"] = data.pop("quantization_config")


def another(data):
    data["quantization_config"]["quant_method"] = "x"


def test_what_is_no_export_says_so(kbitc, tmp_path):
    missing = kbitc("verify", tmp_path / "gone.gguf")
    assert missing.returncode == 1
    assert "no such file or folder" in missing.stderr
    empty = kbitc("verify", tmp_path)
    assert empty.returncode == 1
    assert "neither a compiled model nor exported from one" in empty.stderr


def test_an_artifact_is_verified(kbitc, compiled):
    done = kbitc("verify", compiled[0])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("change", [remove, rename, another])
@pytest.mark.parametrize("is_old", [False, True])
def test_no_command_takes_it_for_a_model(kbitc, out, change, is_old):
    """Without its entry in the config, transformers by itself makes a model of random weights."""
    edit(out / "config.json", change)
    if is_old:  # no checksum of the config
        edit(out / PLAN_FILE, lambda data: [data.pop(key) for key in ("files", "sha256")])
    for arguments in (("verify", out), ("run", out, "x"), ("eval", out)):
        done = kbitc(*arguments)
        assert done.returncode == 1, arguments
        assert "config.json: " in done.stderr, done.stderr
