"""Tile sizes of the kernels: a table, and with ``KBITC_AUTOTUNE=1`` the fastest of several, measured.

The one thing to know: every shipped entry compiles without spills for every format on every target of
``benchmarks.triton_static``. A weight is loaded 16 bytes an instruction: a thread has four words of a
chunk's eight.

A measurement is made at the first call with another shape or format, and kept in Triton's cache folder
(``TRITON_CACHE_DIR``): the next process reads it there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

NVIDIA = 32  # threads a warp
WARP = 64 if torch.version.hip else NVIDIA
REGISTERS = 255
CHUNK_WORDS = 8


@dataclass(frozen=True)
class Tiles:
    """Of one program.

    Attributes:
        rows: of the weight.
        chunks: of 256 columns, at a time.
        m: rows of x; 0 where there is at most one.
        words: of a row of bytes of a chunk, a thread.
    """

    rows: int
    chunks: int
    m: int = 0
    words: int = 4

    def config(self, warp: int = WARP) -> triton.Config:
        """Compile-time arguments and launch options.

        One stage: a pipeline would bring every look-up of a level through shared memory.
        """
        constants = {"ROWS": self.rows, "CHUNKS": self.chunks} | ({"TILE_M": self.m} if self.m else {})
        threads = self.rows * self.chunks * CHUNK_WORDS // self.words
        # Else ptxas stops at 32, 128 or 253 registers now and then, and spills a few.
        most = REGISTERS if warp == NVIDIA else None
        return triton.Config(constants, num_warps=threads // warp, num_stages=1, maxnreg=most)


# By kernel: first what is shipped, then what it is measured against.
TABLE: dict[str, Sequence[Tiles]] = {
    "gemv": (Tiles(8, 8), Tiles(4, 8), Tiles(4, 16), Tiles(16, 4), Tiles(16, 8), Tiles(8, 16), Tiles(2, 32)),
    "matmul": (Tiles(32, 2, 16), Tiles(16, 2, 16), Tiles(64, 2, 16), Tiles(128, 2, 16)),
    "rows": (Tiles(8, 8), Tiles(4, 8), Tiles(16, 4), Tiles(4, 16), Tiles(16, 8)),
    "encode": tuple(Tiles(rows, chunks, words=1) for rows, chunks in ((4, 4), (8, 4), (4, 8), (16, 1))),
}


def tiled(name: str, *key: str) -> Callable[[Any], Any]:
    """Decorate a kernel that takes the tiles ``name`` of the table; ``key``: what a measurement is good for.

    Every measurement is for one format, and the dtypes of what the kernel is given.
    """
    tried = TABLE[name] if os.environ.get("KBITC_AUTOTUNE", "0") not in ("", "0") else TABLE[name][:1]
    configs = [tiles.config() for tiles in tried]
    decorate: Callable[[Any], Any] = triton.autotune(configs, [*key, "BITS", "BLOCK"], cache_results=True)
    return decorate
