"""The weighted quantizer: what it searches for, what it needs, and the same bytes whoever asks."""

from __future__ import annotations

import pytest
import torch

from kbitc.errors import UsageError
from kbitc.formats.dequantize import dequantize
from kbitc.formats.spec import parse
from kbitc.quantizers import Evidence, find_quantizer, quantize, quantize_weight
from kbitc.sensitivity.moments import MOMENTS, Moments

SPECS = ["nf4:64", "int3:50+zp", "bof4:32", "fp5:32+dq", "learned3:64", "nf3:64+out3%"]
GAUSSIAN = torch.randn(23, 300, generator=torch.Generator().manual_seed(0))
IMPORTANCE = torch.rand(300, generator=torch.Generator().manual_seed(1)) ** 4


def evidence(importance=IMPORTANCE, **known):
    return Evidence(facts={MOMENTS: Moments.of_importance(importance)}, **known)


def loss(packed):
    """Float64, as the module's docstring writes it."""
    error = GAUSSIAN.double() - dequantize(packed).double()
    return float((IMPORTANCE.double() * error**2).sum())


@pytest.mark.parametrize("spec", SPECS)
def test_it_loses_less_than_absmax(spec):
    packed = find_quantizer("weighted").quantize(GAUSSIAN, parse(spec), evidence())
    assert loss(packed) < loss(quantize_weight(GAUSSIAN, spec))


@pytest.mark.parametrize("spec", SPECS)
def test_all_ways_to_it_give_the_same_bytes(spec):
    packed = find_quantizer("weighted").quantize(GAUSSIAN, parse(spec), evidence())
    asked = {"quantizer": "weighted", "importance": IMPORTANCE}
    for other in (quantize_weight(GAUSSIAN, spec, **asked), quantize(GAUSSIAN, spec, **asked).packed):
        assert other.spec == packed.spec
        assert other.tensors().keys() == packed.tensors().keys()
        assert all(packed.tensors()[name].equal(tensor) for name, tensor in other.tensors().items())


def test_no_scale_of_the_search_loses_more_than_a_grid_of_them():
    """One block, 2 bits: every scale of a fine grid, by hand in float64."""
    weight, importance = GAUSSIAN[:1, :64], IMPORTANCE[:64].double()
    packed = quantize_weight(weight, "int2:64", quantizer="weighted", importance=IMPORTANCE[:64])
    levels = packed.codebook.double()
    scales = torch.linspace(0.05, 1.1, 500, dtype=torch.float64) * weight.abs().max()
    normalized = weight.double() / scales[:, None]
    nearest = levels[(normalized[..., None] - levels).abs().argmin(-1)]
    losses = (importance * (weight.double() - nearest * scales[:, None]) ** 2).sum(-1)
    reached = (importance * (weight.double() - dequantize(packed).double()) ** 2).sum()
    assert reached <= 1.02 * losses.min()


def test_it_requires_moments():
    assert find_quantizer("weighted").requires == (MOMENTS,)
    with pytest.raises(
        UsageError, match="mlp: quantizer 'weighted' needs the importance of each input feature"
    ):
        quantize_weight(GAUSSIAN, "nf4:64", quantizer="weighted", name="mlp")


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (torch.ones(299), r"mlp: importance has shape \(299,\); expected \(300,\)"),
        (-torch.ones(300), "mlp: importance holds a negative"),
        (torch.full((300,), torch.inf), "mlp: importance holds a negative, NaN or infinite value"),
    ],
)
def test_an_importance_that_makes_no_sense_is_an_error(importance, message):
    with pytest.raises(UsageError, match=message):
        find_quantizer("weighted").quantize(GAUSSIAN, parse("nf4:64"), evidence(importance, name="mlp"))
