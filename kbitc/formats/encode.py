"""Nearest codes under given scales, packed: the definition.

The one thing to know: codes are chosen against the scale *as stored*, so rounding a scale never costs more
than its own rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kbitc.formats import bit_planes
from kbitc.formats.blocks import RowTiles, normalize
from kbitc.formats.encoder import Encoder

Encode = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, int, int], Tensor]
"""The signature of :func:`encode_rows`."""


def encode_rows(
    rows: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor,
    outlier_index: Tensor | None,
    bits: int,
    block: int,
) -> Tensor:
    """Codes nearest to a weight under scales that are given, packed: the definition.

    Args:
        rows: ``(rows, in_features)``, any float dtype.
        scales: ``(rows, blocks)`` float32, as reading the stored ones gives them.
        zeros: ``(rows, blocks)`` as stored, subtracted first; or None.
        codebook: ``(levels,)`` float32, sorted.
        outlier_index: input features that count as 0; or None.
        bits: 2 to 8.
        block: weights a scale.

    Returns:
        ``(rows, row_bytes)`` uint8 planes.
    """
    source = RowTiles(rows, block, outlier_index)
    encode = Encoder(codebook)
    planes = torch.empty(rows.shape[0], bit_planes.row_bytes(rows.shape[1], bits), dtype=torch.uint8)
    for start, blocks in source.tiles():
        stop = start + blocks.shape[0]
        if zeros is not None:
            blocks.sub_(zeros[start:stop].float().unsqueeze(-1))
        codes = encode(normalize(blocks, scales[start:stop])).flatten(-2)[:, : rows.shape[1]]
        planes[start:stop] = bit_planes.pack(codes, bits)
    return planes
