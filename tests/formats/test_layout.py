"""What tensors that are not packed are stored in."""

from __future__ import annotations

import pytest
import torch

from kbitc.formats.layout import LOSS, plain_dtype

ONES = torch.ones(40)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (ONES, torch.float16),
        (ONES * 0.1, torch.float16),
        (ONES * 1e-9, torch.float32),  # zero at 16 bits
        (torch.tensor([1.0, 1e-9]), torch.float32),  # one value is enough
        (torch.tensor([1.0, 1.0003e-6]), torch.float32),  # sub-normal
        (torch.tensor([1.0, 70000.3]), torch.float32),  # infinite
        (torch.tensor([1.0, 2.0**-40]), torch.bfloat16),  # what bfloat16 holds exactly
        (torch.tensor([0.0, torch.inf, -torch.inf, torch.nan]), torch.float16),
        (torch.tensor([1.0, 1e-9], dtype=torch.float64), torch.float32),
        (torch.tensor([1.0, 1e-99], dtype=torch.float64), torch.float64),
        (torch.empty(0), torch.float16),
        (torch.tensor(1e-9), torch.float32),
        (torch.ones(1, 3, 1) * torch.tensor([[[1.0], [1.0], [1e-9]]]), torch.float32),
        (torch.ones(3, dtype=torch.bfloat16) * 1e-9, torch.bfloat16),
        (torch.arange(3), torch.int64),
        (torch.ones(3, dtype=torch.complex64), torch.complex64),
        (torch.ones(3).to(torch.float8_e4m3fn), torch.float8_e4m3fn),
    ],
)
def test_sixteen_bits_unless_they_lose_a_thousandth_of_a_value(values, dtype):
    assert plain_dtype(values) == dtype


def test_what_must_be_wide_is_as_wide_as_the_source():
    assert plain_dtype(ONES, is_wide=True) == torch.float32
    assert plain_dtype(ONES.half(), is_wide=True) == torch.float16
    assert plain_dtype(ONES.double(), is_wide=True) == torch.float32


def test_rows_of_sums_are_judged_as_wholes():
    kernel = torch.randn(50, 3, 3, 9, generator=torch.Generator().manual_seed(0)) * 0.02
    kernel[0, 0, 0, 0] = 1e-9
    assert plain_dtype(kernel) == torch.float32
    assert plain_dtype(kernel, is_summed=True) == torch.float16
    kernel[7] *= 1e-6  # a whole row
    assert plain_dtype(kernel, is_summed=True) != torch.float16
    bias = torch.tensor([1.0, 1e-9])
    assert plain_dtype(bias, is_summed=True) == torch.float32  # a vector has no rows
    assert plain_dtype(torch.full((3, 1000), 70000.3), is_summed=True) != torch.float16


def test_large_tensors_are_compared_in_parts(monkeypatch):
    monkeypatch.setattr("kbitc.formats.layout.CHUNK", 7)
    values = torch.ones(100)
    assert plain_dtype(values) == torch.float16
    values[99] = 1e-9
    assert plain_dtype(values) == torch.float32
    assert plain_dtype(torch.ones(5, 30), is_summed=True) == torch.float16


def test_normal_values_of_float16_always_fit():
    values = torch.logspace(-4.2, 4.8, 9999, base=10.0)
    assert bool(((values.half().float() - values).abs() <= LOSS / 2 * values).all())
    assert plain_dtype(values) == torch.float16
