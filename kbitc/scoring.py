"""Quantization error of a weight, measured on a sample of its rows.

The one thing to know: the sample is evenly spaced rows, the same on every run; 2**15 values put the
standard error of a relative error below 1 % of it for every data type tried.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbitc import blockwise
from kbitc.blockwise import Packed
from kbitc.kernels import ops  # noqa: F401  # defines torch.ops.kbit
from kbitc.spec import Spec

SAMPLE = 2**15


def sample_rows(rows: int, in_features: int, values: int = SAMPLE) -> Tensor:
    """Indices of evenly spaced rows that hold about ``values`` weights; at least one."""
    count = min(rows, max(1, values // in_features))
    return torch.arange(count) * rows // count


def take_sample(weight: Tensor) -> Tensor:
    """``(sampled rows, in_features)`` float32 of a ``(*lead, in_features)`` weight."""
    rows = weight.flatten(0, -2)
    return rows[sample_rows(*rows.shape)].float()


def option_error(sample: Tensor, spec: Spec, quantizer: str = "absmax") -> float:
    """Relative error ``||W - dequantize(quantize(W))|| / ||W||`` of a sampled weight under ``spec``."""
    if spec.is_left_alone:
        return relative_error(sample, sample.half().float())
    packed = blockwise.quantize(sample, spec, quantizer=quantizer, encode=torch.ops.kbit.encode)
    return relative_error(sample, torch.ops.kbit.dequantize(*packed.operands(), torch.float32))


def packed_error(weight: Tensor, packed: Packed) -> float:
    """Relative error of what was packed, on the sampled rows of ``weight`` (oriented like it)."""
    rows = weight.flatten(0, -2)
    picked = sample_rows(*rows.shape)
    operands = packed.map(lambda t: t.flatten(0, -2) if t.dim() == 3 else t).operands()
    back = blockwise.dequantize_operands(*operands, dtype=torch.float32, rows=picked)
    return relative_error(rows[picked].float(), back)


def relative_error(weight: Tensor, back: Tensor) -> float:
    """``||weight - back|| / ||weight||`` in float64; 0 for an all-zero weight."""
    norm = weight.double().norm()
    return float((weight.double() - back.double()).norm() / norm) if norm > 0 else 0.0
