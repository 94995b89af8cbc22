"""Tuning an artifact from end to end: what is written, what is kept, and that it is the same every time."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch

import kbitc
from kbitc.artifact.reader import Artifact
from kbitc.errors import UsageError
from kbitc.training import tuning
from kbitc.training.distilling import Recipe
from kbitc.training.tuning import tune_to

IDS = torch.randint(101, (24, 16), generator=torch.Generator().manual_seed(1))
RATES = dict.fromkeys(("rows", "blocks", "scales", "value"), 3e-3)
RECIPE = Recipe(windows=16, steps=10, looks=2, rates=RATES, flips=0)


@pytest.fixture
def packed(tiny_model, tmp_path):
    model = tiny_model("llama")
    kbitc.compile(model, spec="int2:24+dq", out=tmp_path / "packed", calibrate="none")
    return model, tmp_path / "packed"


def digests(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_tuned_artifact_is_whole_and_nearer_to_its_source(packed, tmp_path):
    model, folder = packed
    before = digests(folder)
    result = tune_to(folder, model, out=tmp_path / "tuned", calibrate=IDS, recipe=RECIPE)
    assert result.is_better
    assert digests(folder) == before
    tuned, was = Artifact.open(tmp_path / "tuned"), Artifact.open(folder)
    tuned.verify(is_whole=True)
    assert tuned.plan.tuning == result.tuning
    assert (tuned.plan.weights, tuned.payload_bytes) == (was.plan.weights, was.payload_bytes)
    changed = {name for name, digest in tuned.plan.checksums.items() if was.plan.checksums[name] != digest}
    assert changed
    assert not any(name.endswith(".planes") for name in changed)
    held = IDS[-tuning.HELD :]
    losses = [
        divergence(model, kbitc.load(path, dtype=torch.float32), held) for path in (folder, tuned.folder)
    ]
    assert losses == pytest.approx([result.tuning.before, result.tuning.after], rel=1e-3)


def divergence(teacher, student, ids):
    """KL over the teacher's 64 most probable outcomes and the rest as one more, a mean over positions."""
    with torch.no_grad():
        p, q = (model(ids).logits.double().softmax(-1) for model in (teacher, student))
    top = p.topk(64).indices
    p, q = (torch.cat([m.gather(-1, top), 1 - m.gather(-1, top).sum(-1, keepdim=True)], -1) for m in (p, q))
    return float((p * (p / q).log()).sum(-1).mean())


def test_codes_are_flipped_on_request(packed, tmp_path):
    model, folder = packed
    how = replace(RECIPE, flips=1, refining=2)
    result = tune_to(folder, model, out=tmp_path / "tuned", calibrate=IDS, recipe=how)
    tuned, was = Artifact.open(tmp_path / "tuned").plan, Artifact.open(folder).plan
    changed = {name for name, digest in tuned.checksums.items() if was.checksums[name] != digest}
    assert result.tuning.flips > 0
    assert any(name.endswith(".planes") for name in changed)
    held = IDS[-tuning.HELD :]
    loss = divergence(model, kbitc.load(tmp_path / "tuned", dtype=torch.float32), held)
    assert loss == pytest.approx(result.tuning.after, rel=1e-3)


def test_in_its_place(packed):
    model, folder = packed
    result = tune_to(folder, model, calibrate=IDS, recipe=RECIPE)
    assert Artifact.open(folder).plan.tuning == result.tuning
    again = tune_to(folder, model, calibrate=IDS, recipe=RECIPE)
    assert again.tuning.before == pytest.approx(result.tuning.after, rel=1e-6)


def test_what_gains_nothing_changes_nothing(packed):
    model, folder = packed
    before = digests(folder)
    bad = Recipe(steps=2, looks=1, rates={"value": 30.0}, flips=0)
    result = tune_to(folder, model, calibrate=IDS, recipe=bad)
    assert not result.is_better
    assert digests(folder) == before


@pytest.mark.parametrize("lowered", [0.99, 0.001])
def test_rates_that_gain_nothing_are_lowered(packed, monkeypatch, lowered):
    model, folder = packed
    high = Recipe(windows=16, steps=12, looks=4, rates=dict.fromkeys(RATES, 5.0), flips=0)
    monkeypatch.setattr("kbitc.training.distilling.LOWERED", lowered)
    result = tune_to(folder, model, calibrate=IDS, recipe=high, out=folder.parent / "tuned")
    assert result.is_better == (lowered < 0.5)


def test_another_source_is_refused(packed, tiny_model):
    _, folder = packed
    with pytest.raises(UsageError, match="was not compiled from"):
        tune_to(folder, tiny_model("gpt2"), calibrate=IDS)
    other = tiny_model("llama")
    with torch.no_grad():
        other.model.norm.weight.add_(1)
    with pytest.raises(UsageError, match="its tensors are others"):
        tune_to(folder, other, calibrate=IDS)


def test_too_few_windows_are_refused(packed):
    model, folder = packed
    with pytest.raises(UsageError, match="8 are held out"):
        tune_to(folder, model, calibrate=IDS[:8])


def test_an_interruption_leaves_the_artifact_as_it_was(packed, monkeypatch):
    model, folder = packed
    before = digests(folder.parent)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("kbitc.artifact.writer.Writer.digests", stop)
    with pytest.raises(KeyboardInterrupt):
        tune_to(folder, model, calibrate=IDS, recipe=RECIPE)
    assert digests(folder.parent) == before


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_bytes(threads, packed, tmp_path):
    model, folder = packed
    how = Recipe(windows=16, steps=4, looks=2, rates=RATES, flips=1, refining=2)
    tune_to(folder, model, out=tmp_path / "first", calibrate=IDS, recipe=how)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tune_to(folder, model, out=tmp_path / "second", calibrate=IDS, recipe=how)
    finally:
        torch.set_num_threads(before)
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


@pytest.mark.parametrize("family", ["t5", "clip", "mixtral"])
def test_models_of_other_kinds(family, tiny_model, tmp_path):
    model = tiny_model(family)
    kbitc.compile(model, spec="int3:16", out=tmp_path / "packed", calibrate="none")
    calibrate = IDS if family == "mixtral" else "random"
    how = Recipe(windows=8, steps=6, looks=1, rates=RATES, flips=1, refining=2)
    result = tune_to(tmp_path / "packed", model, out=tmp_path / "tuned", calibrate=calibrate, recipe=how)
    # Eight random images say little of others: there it may find nothing.
    assert result.is_better or family == "clip"
    assert result.tuning.after <= result.tuning.before
    Artifact.open(tmp_path / "tuned").verify(is_whole=True)


def test_what_cannot_be_found_is_asked_for(packed):
    _, folder = packed
    with pytest.raises(UsageError, match="with --source"):
        tune_to(folder, calibrate=IDS)
