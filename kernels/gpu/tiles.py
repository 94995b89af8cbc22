"""Tile sizes of the kernels: a table.

The one thing to know: every entry of the table compiles without spills for every format on every target of
``benchmarks.triton_static``, with 16-byte loads of the weight: a thread has four words of a chunk's eight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NVIDIA = 32  # threads a warp
WARP = 64 if torch.version.hip else NVIDIA
REGISTERS = 255


@dataclass(frozen=True)
class Tiles:
    """Of one kernel.

    Attributes:
        rows: of the weight, a program.
        chunks: of 256 columns, at a time.
        threads: a program.
        m: rows of x, a program.
        programs: to aim at when K is split.
    """

    rows: int
    chunks: int
    threads: int
    m: int = 0
    programs: int = 1024

    def constants(self) -> dict[str, int]:
        """Compile-time arguments."""
        return {"ROWS": self.rows, "CHUNKS": self.chunks}

    def options(self, warp: int = WARP) -> dict[str, int]:
        """Of the launch. One stage: a pipeline would bring every look-up of a level through shared memory."""
        chosen = {"num_warps": self.threads // warp, "num_stages": 1}
        # Else ptxas stops at 128 registers now and then, and spills a few.
        return chosen | {"maxnreg": REGISTERS} if self.m and warp == NVIDIA else chosen


TABLE = {
    "gemv": Tiles(rows=8, chunks=8, threads=128),
    "matmul": Tiles(rows=64, chunks=2, threads=256, m=16),
    "rows": Tiles(rows=8, chunks=8, threads=128),
}


def tiles_of(kernel: str) -> Tiles:
    """Tiles of a kernel, by its name in the table."""
    return TABLE[kernel]
