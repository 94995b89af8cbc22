"""Prices under error feedback, against their definition."""

from __future__ import annotations

import pytest
import torch

from kbitc.formats.dequantize import dequantize
from kbitc.formats.spec import parse
from kbitc.quantizers import Evidence
from kbitc.quantizers.feedback import Feedback
from kbitc.replay.pricing import _restricted, _Sample, _worthwhile
from kbitc.sensitivity.gram import GRAM, Gram, RowGroup, equal_groups
from kbitc.sensitivity.outliers import OutlierFeatures
from kbitc.sensitivity.score_table import Option

ROWS, WIDTH = 21, 83


def problem():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, 9, generator=generator) @ torch.randn(9, WIDTH, generator=generator)
    x = x + torch.randn(500, WIDTH, generator=generator)
    values = torch.randn(ROWS, WIDTH, generator=generator)
    return values, Gram(x.mT @ x / len(x), None, len(x)), torch.rand(ROWS, generator=generator).double()


@pytest.mark.parametrize("spec", ["nf3:32", "int4:64+zp+dq"])
def test_a_price_is_half_the_weighted_output_error(spec):
    values, gram, rows = problem()
    groups = equal_groups((gram,), ROWS)
    quantizer = Feedback()
    sample = _Sample("w", values, rows, groups, OutlierFeatures(), quantizer)
    found = sample.option(Option(parse(spec), 10, 1.0, 1.0))
    made = quantizer.quantize(values, parse(spec), Evidence("w", None, {GRAM: groups}))
    error = values.double() - dequantize(made).double()
    lost = ((error @ gram.inputs.double()) * error).sum(1)
    assert found.cost == pytest.approx(float(rows @ lost) / 2, rel=1e-4)
    assert found.error == pytest.approx(float(error.norm() / values.double().norm()), rel=1e-4)


def test_leaving_a_weight_alone_keeps_its_price():
    values, gram, rows = problem()
    option = Option(parse("fp16"), 10, 0.25, 0.5)
    groups = equal_groups((gram,), ROWS)
    assert _Sample("w", values, rows, groups, OutlierFeatures(), Feedback()).option(option) == option


def test_groups_of_a_sample_are_those_of_its_rows():
    _, gram, _ = problem()
    groups = (RowGroup(torch.tensor([0, 2, 4]), gram), RowGroup(torch.tensor([1, 3, 5]), gram))
    found = _restricted(groups, torch.tensor([0, 3, 4]))
    assert [group.rows.tolist() for group in found] == [[0, 2], [1]]
    assert len(_restricted(groups, torch.tensor([1]))) == 1


def test_the_hull_and_the_best_of_each_number_of_bits_are_tried():
    def option(spec, nbytes, cost):
        return Option(parse(spec), nbytes, cost, cost)

    options = (
        option("nf2:64", 20, 9.0),
        option("int2:64", 20, 10.0),
        option("fp2:64", 20, 11.0),
        option("nf4:64", 40, 1.0),
        option("int4:64", 40, 1.5),
        option("fp4:64", 40, 2.0),
        option("nf3:64", 30, 8.0),  # above the line between the other two
        option("fp16", 160, 0.0),
    )
    tried = [str(each.spec) for each in _worthwhile(options, 80)]
    assert tried == ["nf2:64", "int2:64", "nf4:64", "int4:64", "nf3:64", "fp16"]
