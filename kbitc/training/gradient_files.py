"""The dense gradient of every weight, summed over windows, on disk: what flips are chosen by.

The one thing to know: a window is added by one thread, and there are as many files as windows are worked on
at once, so that sums have one order whatever the number of threads. A tile of one is in memory at a time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kbitc.formats.packed import Packed
from kbitc.training.tunable import BlockSums

ITEM = 4  # bytes of a float32


class GradientFile:
    """Float32 sums for all weights, in one sparse file.

    Args:
        path: to make.
        shapes: ``(rows, in_features)`` of each weight, experts one after another.

    Raises:
        OSError: the disk is full.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, int]]) -> None:
        self.shapes = shapes
        self.starts: dict[str, int] = {}
        size = 0
        for name, (rows, columns) in shapes.items():
            self.starts[name] = size
            size += rows * columns * ITEM
        self._file = path.open("w+b")
        self._file.truncate(size)

    def close(self) -> None:
        """Nothing is read any more."""
        self._file.close()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop, ``(rows, in_features)`` float32."""
        columns = self.shapes[name][1]
        nbytes = (stop - start) * columns * ITEM
        data = bytearray(os.pread(self._file.fileno(), nbytes, self._at(name, start)))
        return torch.frombuffer(data, dtype=torch.float32).view(-1, columns)

    def add(self, name: str, start: int, grad: Tensor) -> None:
        """Add ``(rows, in_features)`` float32 to the rows from ``start`` on."""
        total = self.read(name, start, start + len(grad)).add_(grad)
        array: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = total.numpy()
        os.pwrite(self._file.fileno(), array.data, self._at(name, start))

    def _at(self, name: str, row: int) -> int:
        return self.starts[name] + row * self.shapes[name][1] * ITEM


class FiledSums(BlockSums):
    """Sums of blocks, and the gradient itself added to a file."""

    def __init__(self, name: str, packed: Packed, file: GradientFile) -> None:
        super().__init__(packed)
        self.name, self.file = name, file

    def add(self, rows: slice | Tensor, grad: Tensor) -> None:
        """Add the gradient of some rows, ``(rows, in_features)`` float32, which is overwritten."""
        if isinstance(rows, slice):
            self.file.add(self.name, rows.start, grad)
        else:
            for row, own in zip(rows.tolist(), grad, strict=True):
                self.file.add(self.name, row, own[None])
        super().add(rows, grad)
