"""The grid: what is tried, once each, and what is refused."""

from __future__ import annotations

import pytest

from kbitc.errors import UsageError
from kbitc.study.grid import Grid, parse_bits, parse_outliers, parse_types


def test_every_treatment_once_and_16_bits():
    grid = Grid([3, 4, 4], ["int", "fp+paper"], [64, 256], outliers=[2.0], with_mean=True, is_flat=True)
    names = [str(treatment) for treatment in grid.treatments()]
    assert len(set(names)) == len(names) == 1 + 2 * 2 * 2 * 3
    assert names[0] == "fp16"
    assert "fp3:256+out2%+paper+flat" in names
    assert "int4:64+mean+flat" in names


def test_quantizers():
    names = [str(treatment) for treatment in Grid([4], ["nf"], [64], ["absmax", "weighted"]).treatments()]
    assert names == ["fp16", "nf4:64", "nf4:64 by weighted"]
    with pytest.raises(UsageError, match="paper's quantizer, absmax"):
        Grid([4], ["nf"], [64], ["weighted"], is_flat=True)
    with pytest.raises(UsageError, match="did you mean 'weighted'"):
        Grid([4], ["nf"], [64], ["weigted"])


@pytest.mark.parametrize(
    "text,message", [("2-9", "within 2 to 8"), ("x", "neither a number"), ("6-3", "within")]
)
def test_bad_bits(text, message):
    with pytest.raises(UsageError, match=message):
        parse_bits(text)


def test_bad_types_and_outliers():
    with pytest.raises(UsageError, match="did you mean 'quantile'"):
        parse_types("int,quantil")
    with pytest.raises(UsageError, match="proxy:2%"):
        parse_outliers("2%")
    with pytest.raises(UsageError, match="variant"):
        Grid([4], ["nf+paper"], [64]).treatments()
