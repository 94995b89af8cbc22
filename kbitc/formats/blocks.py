"""A weight's rows, tile by tile, as float32 blocks, and what is taken of each block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Values a tile: 1 MB in float32, so that the handful of temporaries stays in the L2/L3 cache.
# 4096 x 4096 fp16, 2 threads: 2**18 wins over 2**16 (call overhead) and 2**21 (cache misses).
TILE = 2**18


def absmax(blocks: Tensor, is_signed: bool) -> Tensor:
    """The largest magnitude of each block; with its sign when ``is_signed`` (first of equals)."""
    if not is_signed:
        low, high = torch.aminmax(blocks, dim=-1)
        return torch.maximum(high, -low)
    at = blocks.abs().argmax(dim=-1, keepdim=True)
    return blocks.gather(-1, at).squeeze(-1)


class RowTiles:
    """Tiles of a matrix as float32 blocks, outlier columns zeroed, the last block zero-padded."""

    def __init__(self, rows: Tensor, block: int, outlier_index: Tensor | None) -> None:
        self.rows = rows
        self.block = block
        self.columns = None if outlier_index is None else outlier_index.long()
        self.per_tile = max(1, TILE // rows.shape[1])

    def blocks(self, start: int, stop: int) -> Tensor:
        """Rows start to stop as a fresh ``(rows, blocks, block)`` float32 tensor."""
        tile = self.rows[start:stop].to(torch.float32, copy=True).contiguous()
        if self.columns is not None:
            tile[:, self.columns] = 0.0
        short = -tile.shape[1] % self.block
        if short:
            tile = torch.nn.functional.pad(tile, (0, short))
        return tile.view(tile.shape[0], -1, self.block)

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """``(first row, blocks)`` of every tile."""
        for start in range(0, self.rows.shape[0], self.per_tile):
            yield start, self.blocks(start, min(start + self.per_tile, self.rows.shape[0]))

    def limits(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Minimum and maximum of each block, the padding of a short last block left out."""
        low, high = torch.aminmax(blocks, dim=-1)
        short = -self.rows.shape[1] % self.block
        if short:
            last = blocks[:, -1, : self.block - short]
            low[:, -1], high[:, -1] = torch.aminmax(last, dim=-1)
        return low, high


def inverse_scales(scales: Tensor) -> Tensor:
    """``1 / scales``, float32; a scale of 0, and one below 3e-39 (a block of sub-normals), gives 0."""
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    return torch.where(inverse.isfinite(), inverse, 0.0)


def normalize(blocks: Tensor, scales: Tensor) -> Tensor:
    """Blocks divided by their scale, in place."""
    return blocks.mul_(inverse_scales(scales).unsqueeze(-1))
