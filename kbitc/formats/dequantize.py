"""The definition of what a packed weight means, on plain tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from kbitc.formats import bit_planes
from kbitc.formats.blocks import TILE
from kbitc.formats.packed import Operands, Packed
from kbitc.formats.scales import effective_scales


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of :func:`quantize`, up to the quantization error.

    Returns:
        ``packed.shape`` tensor of ``dtype``; products are taken in float32 and rounded once.
    """
    return dequantize_operands(packed.operands(), dtype)


def dequantize_operands(operands: Operands, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
    """The definition of what a packed weight means, on plain tensors.

    Args:
        operands: the weight.
        dtype: of the result.
        rows: 1-D int64 rows to read, of a 2-D weight; None reads all of them.

    Returns:
        ``(*lead, rows, in_features)``.
    """
    in_features, bits, block = operands.numbers
    lead = operands.planes.shape[:-1] if rows is None else rows.shape
    planes, scales = operands.planes.flatten(0, -2), operands.scales.flatten(0, -2)
    all_scales = effective_scales(
        scales, operands.scale_codebook, operands.scale_absmax, operands.scale_mean, rows
    )
    zeros = None if operands.zeros is None else operands.zeros.flatten(0, -2)
    values = None if operands.outlier_values is None else operands.outlier_values.flatten(0, -2)
    if rows is not None:
        planes = planes[rows]
        zeros = None if zeros is None else zeros[rows]
        values = None if values is None else values[rows]
    out = torch.empty(planes.shape[0], in_features, dtype=dtype, device=planes.device)
    per_tile = max(1, TILE // in_features)
    short = -in_features % block
    for start in range(0, planes.shape[0], per_tile):
        tile = slice(start, start + per_tile)
        codes = bit_planes.unpack(planes[tile], in_features, bits)
        weights = operands.codebook.index_select(0, codes.flatten().int()).view(codes.shape)
        if short:
            weights = torch.nn.functional.pad(weights, (0, short))
        blocks = weights.unflatten(-1, (-1, block)).mul_(all_scales[tile].unsqueeze(-1))
        if zeros is not None:
            blocks += zeros[tile].float().unsqueeze(-1)
        out[tile] = blocks.flatten(-2)[:, :in_features]
    if values is not None and operands.outlier_index is not None:
        out[:, operands.outlier_index.long()] = values.to(dtype)
    return out.view(*lead, in_features)
