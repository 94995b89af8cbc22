"""Compiling and tuning as one."""

from __future__ import annotations

import pytest
import torch

from kbitc.artifact.reader import Artifact
from kbitc.compiler.driver import compile_to
from kbitc.compiler.request import Request
from kbitc.errors import UsageError
from kbitc.training.compiling import compile_tuned_to
from kbitc.training.distilling import Recipe
from kbitc.training.tuning import tune_to

IDS = torch.randint(101, (12, 16), generator=torch.Generator().manual_seed(1))
RECIPE = Recipe(steps=2, looks=1)


def test_it_is_what_the_two_do_one_after_the_other(tiny_model, tmp_path):
    model, request = tiny_model("llama"), Request.of(bits=4, calibrate=IDS)
    compile_to(model, tmp_path / "packed", request)
    wanted = tune_to(tmp_path / "packed", model, out=tmp_path / "two", calibrate=IDS, recipe=RECIPE)
    compiled, tuned = compile_tuned_to(model, tmp_path / "one", request, recipe=RECIPE)
    assert (compiled.out, tuned.out) == (tmp_path / "one", tmp_path / "one")
    assert tuned.tuning == wanted.tuning
    one, two = (Artifact.open(tmp_path / name).plan for name in ("one", "two"))
    assert one.checksums == two.checksums
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "packed", "two"]


def test_a_failure_of_tuning_leaves_nothing(tiny_model, tmp_path):
    request = Request.of(bits=4, calibrate=IDS[:8])
    with pytest.raises(UsageError, match="8 are held out"):
        compile_tuned_to(tiny_model("llama"), tmp_path / "out", request)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_tune_on_is_said_before_anything_is_compiled(tmp_path):
    with pytest.raises(UsageError, match="--tune needs something to run on"):
        compile_tuned_to("no such model", tmp_path / "out", Request.of(bits=4, calibrate="none"))
