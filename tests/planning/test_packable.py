"""Models that nothing, or too little, can be packed of, and what their users are told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kbitc
from kbitc.errors import BudgetError, UsageError

IMAGE = (torch.zeros(1, 3, 8, 8),)


def convolutions():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 3))


@pytest.mark.parametrize(
    "options", [{"spec": "nf4:64"}, {"plan": {"weights": {"*": "nf4:64"}}}, {"bits": 4, "calibrate": "none"}]
)
def test_a_model_without_weights_to_pack_is_told_what_it_has(options):
    with pytest.raises(UsageError) as caught:
        kbitc.compile(convolutions(), example_inputs=IMAGE, **options)
    message = str(caught.value)
    assert message.startswith("nothing to pack: the model has 9 tensors, none of which can be packed: ")
    assert "2 x convolution kernel" in message
    assert "4 x 1-D: norm weight or bias" in message
    assert "3 x persistent buffer" in message


def test_a_model_without_parameters_says_so():
    with pytest.raises(UsageError, match="the model has no parameters at all"):
        kbitc.compile(nn.ReLU(), spec="nf4:64", example_inputs=(torch.zeros(2),))


def test_a_budget_that_no_model_may_have_is_not_advised():
    model = nn.Sequential(convolutions(), nn.Flatten(), nn.Linear(64, 5))
    with pytest.raises(BudgetError) as caught:
        kbitc.compile(model, bits=4, calibrate="none", example_inputs=IMAGE)
    message = str(caught.value)
    assert "nor can any other budget, which end at 8" in message
    assert "Ask for" not in message
    assert f"with {100 * (1 - 320 / sum(p.numel() for p in model.parameters())):.3g} %" in message


def test_a_budget_that_can_be_met_is_advised_and_met():
    model, x = nn.Sequential(nn.Linear(128, 64), nn.LayerNorm((64,))), (torch.zeros(1, 128),)
    with pytest.raises(BudgetError, match=r"Ask for --bits \d\.\d\d or more") as caught:
        kbitc.compile(model, bits=2, calibrate="none", example_inputs=x)
    advised = float(str(caught.value).partition("--bits ")[2].partition("Ask for --bits ")[2].split()[0])
    kbitc.compile(model, bits=advised, calibrate="none", example_inputs=x)
