"""Quantizers by name, and which one a weight gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from kbitc.errors import UsageError
from kbitc.graph.facts import Fact
from kbitc.quantizers import (
    AUTO,
    Evidence,
    choose_quantizer,
    find_quantizer,
    quantize,
    quantize_weight,
    quantizer_names,
)
from kbitc.quantizers.absmax import Absmax
from kbitc.quantizers.weighted import Weighted
from kbitc.sensitivity.moments import MOMENTS, Moments

CALIBRATED = Evidence("layers.3.weight", facts={MOMENTS: Moments.of_importance(torch.ones(64))})
BARE = Evidence("layers.3.weight")


def test_names_are_the_files_of_the_room():
    assert quantizer_names() == ["absmax", "feedback", "weighted"]
    assert find_quantizer("absmax") == Absmax()
    assert find_quantizer("weighted") == Weighted()


def test_another_package_adds_its_own_by_an_entry_point(monkeypatch):
    weight = torch.randn(4, 64)

    @dataclass(frozen=True)
    class Half:
        requires: ClassVar[tuple[Fact, ...]] = ()

        def quantize(self, weight, spec, evidence):
            return Absmax().quantize(weight / 2, spec, evidence)

    class Point:
        name, value = "half_of_it", "somewhere:Half"

        def load(self):
            return Half

    monkeypatch.setattr("kbitc.pipeline.registry.entry_points", lambda group: [Point()])
    find_quantizer.cache_clear()
    try:
        assert quantizer_names() == ["absmax", "feedback", "half_of_it", "weighted"]
        packed = quantize_weight(weight, "nf4:64", quantizer="half_of_it")
    finally:
        find_quantizer.cache_clear()
    assert packed.scales.equal(quantize_weight(weight / 2, "nf4:64").scales)


@pytest.mark.parametrize("find", [find_quantizer, lambda name: choose_quantizer(name, CALIBRATED)])
def test_an_unknown_name_is_told_the_likely_one(find):
    with pytest.raises(UsageError, match="no quantizer 'absmx'; did you mean 'absmax'"):
        find("absmx")


@pytest.mark.parametrize("pack", [quantize, quantize_weight])
def test_quantize_tells_it_too(pack):
    with pytest.raises(UsageError, match="no quantizer 'wieghted'; did you mean 'weighted'"):
        pack(torch.ones(2, 64), "nf4:64", quantizer="wieghted")


@pytest.mark.parametrize("name", ["", AUTO])
def test_auto_takes_the_strongest_that_there_is_evidence_for(name):
    assert choose_quantizer(name, CALIBRATED) == ("weighted", Weighted())
    assert choose_quantizer(name, BARE) == ("absmax", Absmax())


@pytest.mark.parametrize("evidence", [CALIBRATED, BARE])
def test_a_named_quantizer_is_taken_whatever_else_is_known(evidence):
    assert choose_quantizer("absmax", evidence) == ("absmax", Absmax())


def test_lacking_evidence_says_what_to_do():
    with pytest.raises(UsageError) as caught:
        choose_quantizer("weighted", BARE)
    message = str(caught.value)
    assert message.startswith("layers.3.weight: the quantizer 'weighted' needs the fact")
    assert str(MOMENTS) in message
    assert "--calibrate self" in message
    assert "choose another quantizer" in message


def test_quantize_cannot_have_the_facts_of_a_model(monkeypatch):
    @dataclass(frozen=True)
    class Demanding:
        requires: ClassVar[tuple[Fact, ...]] = (Fact("hessians"),)

    monkeypatch.setattr("kbitc.quantizers._tensors.find_quantizer", lambda name: Demanding())
    with pytest.raises(
        UsageError, match="mlp: quantizer 'demanding' needs the fact 'hessians'; use it in comp"
    ):
        quantize_weight(torch.ones(2, 64), "nf4:64", quantizer="demanding", name="mlp")
