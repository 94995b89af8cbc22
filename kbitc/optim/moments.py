"""`Moment`: where the codes and scales of one state of one parameter lie, in memory or in a page file.

The one thing to know: a step works on pieces of whole blocks, so states of a page file never have to be in
memory all at once, and the result does not depend on how they are cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kbitc.kernels.training import WHOLE
from kbitc.optim.pages import PageFile

MARK = "optim_bits"
"""The attribute of a parameter that says how many bits its states have, whatever the optimizer's."""


@dataclass(frozen=True)
class Layout:
    """The size of a state.

    Attributes:
        count: numbers.
        bits: of each: 4 or 8 (codes), or 32 (plain float32).
        block: numbers that share a scale.
    """

    count: int
    bits: int
    block: int

    @property
    def dtype(self) -> torch.dtype:
        """Of codes."""
        return torch.float32 if self.bits == WHOLE else torch.uint8

    @property
    def codes(self) -> int:
        """Elements of the tensor that holds them."""
        return self.count if self.bits == WHOLE else -(-self.count * self.bits // 8)

    @property
    def scales(self) -> int:
        """Blocks; none of plain numbers."""
        return 0 if self.bits == WHOLE else -(-self.count // self.block)

    def part(self, begin: int, end: int) -> Layout:
        """Of numbers [begin, end), whole blocks but for the last one."""
        return Layout(min(end, self.count) - begin, self.bits, self.block)


@dataclass(frozen=True)
class Held:
    """A state in memory.

    Attributes:
        codes: ``(layout.codes,)`` of ``layout.dtype``.
        scales: ``(layout.scales,)`` float32.
    """

    layout: Layout
    codes: Tensor
    scales: Tensor

    @classmethod
    def zeros(cls, layout: Layout, device: torch.device) -> Held:
        """Of a parameter that was never moved: every block's scale is 0."""
        codes = torch.zeros(layout.codes, dtype=layout.dtype, device=device)
        return cls(layout, codes, torch.zeros(layout.scales, device=device))

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Codes and scales."""
        return self.codes, self.scales


@dataclass(frozen=True)
class Paged:
    """A state in a page file.

    Attributes:
        start: of the codes there, in bytes.
        scales_start: of the scales.
    """

    layout: Layout
    pages: PageFile
    start: int
    scales_start: int

    @classmethod
    def zeros(cls, layout: Layout, pages: PageFile) -> Paged:
        """See `Held.zeros`."""
        start = pages.grow(layout.codes * layout.dtype.itemsize)
        return cls(layout, pages, start, pages.grow(layout.scales * 4))

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Codes and scales, as they stand in the file."""
        return self.part(0, self.layout.count)

    def part(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """The same of numbers [begin, end); ``begin`` is a multiple of the block."""
        part, (codes, scales) = self.layout.part(begin, end), self._starts(begin)
        return (
            self.pages.tensor(codes, part.codes, part.dtype),
            self.pages.tensor(scales, part.scales, torch.float32),
        )

    def prefetch(self, begin: int, end: int) -> None:
        """Has the system read a part soon."""
        part, (codes, scales) = self.layout.part(begin, end), self._starts(begin)
        self.pages.prefetch(codes, part.codes * part.dtype.itemsize)
        self.pages.prefetch(scales, part.scales * 4)

    def _starts(self, begin: int) -> tuple[int, int]:
        codes = begin * self.layout.bits // 8
        return self.start + codes, self.scales_start + begin // self.layout.block * 4


Moment = Held | Paged
