"""Absmax against its formula in float64, and against the bytes that the format promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kbitc.errors import UsageError
from kbitc.formats import bit_planes
from kbitc.formats.codebooks import shared_codebook
from kbitc.formats.spec import parse
from kbitc.quantizers import Evidence, find_quantizer, quantize, quantize_weight

SPECS = ["nf4:64", "int3:50+zp", "bof4:32", "fp5:32+dq", "learned3:64", "nf3:64+out3%+dq"]
GAUSSIAN = torch.randn(23, 300, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spec", ["nf4:60", "int3:50", "fp5:300", "dynamic8:20"])
def test_scales_and_codes_are_the_formula(spec):
    parsed = parse(spec)
    packed = quantize_weight(GAUSSIAN, spec)
    blocks = GAUSSIAN.double().numpy().reshape(23, -1, parsed.block)
    scales = np.abs(blocks).max(-1).astype(np.float16)
    assert np.array_equal(packed.scales.numpy(), scales)
    levels = shared_codebook(parsed).double().numpy()
    values = blocks / scales.astype(np.float64)[..., None]
    distances = np.abs(values[..., None] - levels)
    codes = bit_planes.unpack(packed.planes, 300, parsed.bits).long().numpy().reshape(values.shape)
    chosen = np.take_along_axis(distances, codes[..., None], -1)[..., 0]
    # float32 may take either of two levels whose distances differ by its rounding.
    assert (chosen <= distances.min(-1) + 1e-6).all()
    assert (codes == distances.argmin(-1)).mean() > 0.999


@pytest.mark.parametrize("spec", SPECS)
def test_all_ways_to_it_give_the_same_bytes(spec):
    quantizer = find_quantizer("absmax")
    assert not quantizer.requires
    packed = quantizer.quantize(GAUSSIAN, parse(spec), Evidence())
    for other in (quantize_weight(GAUSSIAN, spec), quantize(GAUSSIAN, spec, quantizer="absmax").packed):
        assert other.spec == packed.spec
        assert other.tensors().keys() == packed.tensors().keys()
        assert all(packed.tensors()[name].equal(tensor) for name, tensor in other.tensors().items())


def test_importance_changes_nothing():
    packed = quantize_weight(GAUSSIAN, "nf4:64")
    other = quantize_weight(GAUSSIAN, "nf4:64", importance=torch.rand(300))
    assert packed.planes.equal(other.planes)
    assert packed.scales.equal(other.scales)


def test_outliers_of_the_evidence_are_kept():
    evidence = Evidence(outliers=torch.tensor([0, 9, 63]))
    packed = find_quantizer("absmax").quantize(GAUSSIAN, parse("nf3:64+out1%"), evidence)
    assert packed.outlier_index.tolist() == [0, 9, 63]
    assert packed.outlier_values.equal(GAUSSIAN[:, [0, 9, 63]].half())


def test_errors_name_the_weight():
    weight = GAUSSIAN.clone()
    weight[5, 7] = torch.nan
    with pytest.raises(UsageError, match=r"layers\.3\.weight: row 5"):
        find_quantizer("absmax").quantize(weight, parse("nf4:64"), Evidence("layers.3.weight"))
