"""How many positions a model has."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kbitc.graph.positions import stated_positions, usable_positions


@pytest.mark.parametrize(
    ("family", "expected"),
    [("roberta", 33), ("gpt2", 33), ("opt", 33), ("bart", 33), ("clip", 17), ("bloom", None)],
)
def test_the_last_usable_position_and_no_more(family, expected, tiny_model):
    assert usable_positions(tiny_model(family)) == expected


@torch.no_grad()
def test_a_window_of_that_length_fits_and_a_longer_one_does_not(tiny_model):
    model = tiny_model("roberta")
    longest = usable_positions(model)
    model(input_ids=torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 5))


def test_no_limit():
    from transformers import XLNetConfig, XLNetLMHeadModel

    with torch.device("meta"):
        model = XLNetLMHeadModel(XLNetConfig(vocab_size=31, d_model=32, n_layer=1, n_head=2, d_inner=48))
    assert usable_positions(model) is None
    assert stated_positions(model.config) is None
    assert usable_positions(nn.Linear(2, 2)) is None
