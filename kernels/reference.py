"""Plain kernels: what is right. Every fast kernel is compared with these.

The one thing to know: no weight is dequantized whole. Rows are read in tiles, so that a reference
matmul needs a few megabytes beside its input and its output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from kbitc.formats.bit_planes import unpack
from kbitc.formats.dequantize import dequantize_operands
from kbitc.formats.packed import Operands
from kbitc.formats.scales import effective_scales

INT8_BITS = 8
INT8_MOST = 127  # of the integers that `int8` rounds to
INT8_NEEDS = (
    "kbit::linear_int8: needs evenly spaced 8-bit levels around 0 and one scale a row, without zero points: "
    "int8 with a block of at least in_features"
)
TILE = 2**20  # weights dequantized at a time: 4 MB in float32


def dequantize(operands: Operands, dtype: torch.dtype) -> Tensor:
    """The whole weight, ``(*lead, rows, in_features)`` of ``dtype``."""
    return dequantize_operands(operands, dtype)


def linear(x: Tensor, operands: Operands, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias``: ``x`` (..., in_features), W (rows, in_features)."""
    out = x.new_empty(*x.shape[:-1], operands.planes.shape[0])
    for rows, weight in _tiles(operands, x.dtype):
        out[..., rows] = dense_linear(x, weight, None if bias is None else bias[rows].to(x.dtype))
    return out


def linear_int8(x: Tensor, operands: Operands, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias`` as LLM.int8() computes it: int8 times int8, summed exactly, outlier columns apart.

    Each row of x is rounded to ``round(127 x / absmax)`` over its features but the outliers; these meet
    their 16-bit columns as they are. (LLM.int8(), 2208.07339, with outliers fixed in advance.)

    Raises:
        RuntimeError: the weight is not `int8` with one scale a row.
    """
    codebook, values, index = operands.codebook, operands.outlier_values, operands.outlier_index
    even = torch.arange(-INT8_MOST, INT8_MOST + 1, device=codebook.device) * (codebook[-1] / INT8_MOST)
    is_even = codebook.shape == even.shape and torch.allclose(codebook, even, rtol=1e-6, atol=1e-8)
    has_one_scale = operands.scales.shape[-1] == 1 and operands.zeros is None
    if operands.bits != INT8_BITS or not is_even or not has_one_scale:
        raise RuntimeError(INT8_NEEDS)
    rest = x.float()
    if index is not None:
        rest = rest.index_fill(-1, index.long(), 0.0)
    absmax = rest.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(absmax, INT8_MOST) / absmax  # a number over a tensor would round twice
    rounded = torch.where(inverse.isfinite(), (rest * inverse).round(), 0.0 * rest)
    weight = unpack(operands.planes, operands.in_features, INT8_BITS).double() - INT8_MOST
    sums = rounded.double() @ weight.mT  # whole numbers below 2**53: exact
    steps = plain_scales(operands).scales.float().mT * (codebook[-1] / INT8_MOST)
    out = sums.float() * (absmax / INT8_MOST * steps)
    if index is not None and values is not None:
        out = out + x.float()[..., index.long()] @ values.float().mT
    if bias is not None:
        out = out + bias
    return out.to(x.dtype)


def input_grad(grad: Tensor, operands: Operands) -> Tensor:
    """``grad @ W``: the gradient of :func:`linear` with respect to ``x``; ``grad`` (..., rows)."""
    out = grad.new_zeros(*grad.shape[:-1], operands.in_features)
    for rows, weight in _tiles(operands, grad.dtype):
        out += grad[..., rows] @ weight
    return out


def embedding(ids: Tensor, operands: Operands, dtype: torch.dtype) -> Tensor:
    """Rows ``ids`` (any shape, integers) of W as ``(*ids.shape, in_features)`` of ``dtype``."""
    vocabulary = operands.planes.shape[0]
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < vocabulary):
        raise IndexError(f"kbit::embedding: an id is outside 0 … {vocabulary - 1}")
    rows = dequantize_operands(operands, dtype, ids.flatten().long())
    return rows.view(*ids.shape, operands.in_features)


def grouped_linear(x: Tensor, operands: Operands, offsets: Tensor) -> Tensor:
    """Rows of ``x`` (tokens, in), sorted by expert, times their expert's W (experts, rows, in)."""
    out = x.new_zeros(x.shape[0], operands.planes.shape[1])
    for expert, tokens in groups(offsets):
        out[tokens] = linear(x[tokens], expert_operands(operands, expert), None)
    return out


def grouped_input_grad(grad: Tensor, operands: Operands, offsets: Tensor) -> Tensor:
    """The gradient of :func:`grouped_linear` with respect to ``x``; ``grad`` (tokens, rows)."""
    out = grad.new_zeros(grad.shape[0], operands.in_features)
    for expert, tokens in groups(offsets):
        out[tokens] = input_grad(grad[tokens], expert_operands(operands, expert))
    return out


def plain_scales(operands: Operands) -> Operands:
    """The same weight with its double-quantized scales, if any, read into float32."""
    scales = operands.scales
    read = effective_scales(
        scales.flatten(0, -2), operands.scale_codebook, operands.scale_absmax, operands.scale_mean
    )
    return operands._replace(
        scales=read.view(scales.shape), scale_codebook=None, scale_absmax=None, scale_mean=None
    )


def expert_operands(operands: Operands, expert: int | Tensor) -> Operands:
    """The operands of one expert, or of the experts that an index tensor picks."""
    return _indexed(plain_scales(operands), expert)


def row_tensors(operands: Operands) -> dict[str, Tensor]:
    """What a weight of plain scales has for each of its rows or experts, by field; all else they share."""
    fields = ("planes", "scales", "zeros", "outlier_values")
    return {field: value for field in fields if (value := getattr(operands, field)) is not None}


def _indexed(plain: Operands, at: int | slice | Tensor) -> Operands:
    """Rows or experts of a weight of plain scales."""
    picked: dict[str, Any] = {field: value[at] for field, value in row_tensors(plain).items()}
    return plain._replace(**picked)


def _tiles(operands: Operands, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """``(rows, dequantized rows)`` over a 2-D weight."""
    plain = plain_scales(operands)
    step = max(1, TILE // operands.in_features)
    for start in range(0, operands.planes.shape[0], step):
        rows = slice(start, start + step)
        yield rows, dequantize_operands(_indexed(plain, rows), dtype)


def groups(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """``(expert, its tokens)`` for every expert that has tokens."""
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end
