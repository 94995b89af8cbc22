"""What every reader of a source model offers.

The one thing to know: tensors go by the *model's* names; how the source names, splits, merges or
encodes them stays inside the reader.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as ``read`` gives it.

    Attributes:
        shape: the model's.
        dtype: the source's (float16 for quantized GGUF blocks).
        nbytes: in that shape and dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int

    @staticmethod
    def of(shape: tuple[int, ...], dtype: torch.dtype) -> TensorInfo:
        """The info of a tensor of that shape and dtype.

        >>> TensorInfo.of((2, 3), torch.float16).nbytes
        12
        """
        return TensorInfo(shape, dtype, math.prod(shape) * dtype.itemsize)


class Checkpoint(Protocol):
    """A source model, read lazily. Also a context manager that closes it."""

    label: str
    """What the user typed, for messages."""

    def skeleton(self) -> nn.Module:
        """The model on the meta device, tied, in eval mode; without memory; not to be changed."""
        ...

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every parameter and persistent buffer by first name, tied ones once, in model order."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU; its memory goes when the caller drops it. Any thread may call.

        Raises:
            SourceError: the source changed or broke since it was opened.
        """
        ...

    def pieces(self, name: str, rows: int) -> Iterator[Tensor]:
        """The tensor that ``read`` gives, so many rows at a time, each in memory that the next may take.

        Only a piece of it is in memory, unless the source has to be converted.
        """
        yield from self.read(name).split(rows)

    def transient(self, name: str) -> Tensor | None:
        """A buffer that no checkpoint holds (rotary frequencies), or None if the model leaves it open."""
        from kbitc.checkpoint.skeletons import default_value

        return default_value(self.skeleton(), name)

    def ignored(self) -> list[str]:
        """Tensors of the source, by its own names, that the model has no place for."""
        return []

    def fingerprint(self) -> str:
        """Identity of the source, cheap to take; ``--resume`` compares it."""
        ...

    def save_companions(self, folder: Path) -> None:
        """Write the config, and what generation and tokenizing need, into an existing folder."""
        ...

    def close(self) -> None:
        """Let go of the source. Readers here hold no file open between reads."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
