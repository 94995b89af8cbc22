"""What `kbitc.save` writes of a packed module is what compiling writes, as far as a module knows it."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import kbitc
from kbitc.artifact.folders import PLAN_FILE
from kbitc.artifact.reader import Artifact

MEASURED = {"error", "quantizer"}  # by packing, of the dense weight


def test_the_plan_file_has_the_same_keys(tiny_model, tmp_path):
    packed = kbitc.compile(tiny_model("gpt2"), spec="nf4:32", out=tmp_path / "compiled")
    kbitc.save(packed, tmp_path / "saved")
    compiled, saved = (
        json.loads((tmp_path / name / PLAN_FILE).read_text()) for name in ("compiled", "saved")
    )
    assert list(saved) == list(compiled)
    assert saved["weights"].keys() == compiled["weights"].keys()
    for name, entry in compiled["weights"].items():
        assert saved["weights"][name].keys() == entry.keys() - MEASURED
        for key in ("spec", "bits", "shape", "dtype", "is_transposed", "aliases"):
            assert saved["weights"][name][key] == entry[key]
    for mine, theirs in zip(saved["left_alone"].values(), compiled["left_alone"].values(), strict=False):
        assert list(mine) == list(theirs)
    for key in ("format", "kbitc", "parameters", "bytes"):
        assert saved[key] == compiled[key]
    assert saved["checksums"] == compiled["checksums"]


def test_a_saved_module_loads_as_the_compiled_one_does(tiny_model, tmp_path):
    packed = kbitc.compile(tiny_model("gpt2"), spec="nf4:32", out=tmp_path / "compiled")
    kbitc.save(packed, tmp_path / "saved")
    wanted, got = (Artifact.open(tmp_path / name) for name in ("compiled", "saved"))
    got.verify()
    assert got.specs == wanted.specs
    assert (got.payload_bytes, got.bits_per_param) == (wanted.payload_bytes, wanted.bits_per_param)
    ids = torch.tensor([[1, 5, 9, 100, 7]])
    with torch.no_grad():
        outputs = [kbitc.load(tmp_path / name)(ids).logits for name in ("compiled", "saved")]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("kind", ["GPT2ForSequenceClassification", "GPT2ForTokenClassification", "GPT2Model"])
def test_a_module_loads_as_its_own_class_whatever_its_config_names(kind, tmp_path):
    sizes = {"vocab_size": 101, "n_positions": 33, "n_embd": 36, "n_layer": 2, "n_head": 3, "pad_token_id": 0}
    config = transformers.GPT2Config(**sizes, num_labels=3, architectures=["GPT2LMHeadModel"])
    torch.manual_seed(0)
    packed = kbitc.compile(
        getattr(transformers, kind)(config).eval(), spec="nf4:32", out=tmp_path / "compiled"
    )
    kbitc.save(packed, tmp_path / "saved")
    ids = torch.tensor([[1, 5, 9, 100, 7]])
    for name in ("compiled", "saved"):
        loaded = kbitc.load(tmp_path / name)
        assert type(loaded).__name__ == kind
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids)[0], packed(ids)[0])
