"""Where the elements of a view lie in a row-major matrix: sizes, strides and an offset, without the matrix.

The one thing to know: a view is worked out on a tensor without data, by torch itself; what would have to
copy has no geometry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class Geometry(NamedTuple):
    """Element (i, j, ...) of the view lies at ``offset + i * stride[0] + j * stride[1] + ...``."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    @staticmethod
    def row_major(size: Sequence[int]) -> Geometry:
        """A whole tensor.

        >>> Geometry.row_major((2, 3))
        Geometry(size=(2, 3), stride=(3, 1), offset=0)
        """
        return Geometry(tuple(size), tuple(math.prod(size[i + 1 :]) for i in range(len(size))))

    @staticmethod
    def of_matrix(shape: Sequence[int], *, is_transposed: bool) -> Geometry:
        """A matrix, or a batch of them, as it is or with its last two dimensions swapped."""
        plain = Geometry.row_major(shape)
        return Geometry(_swapped(plain.size), _swapped(plain.stride)) if is_transposed else plain

    def reshaped(self, size: Sequence[int]) -> Geometry | None:
        """The same elements in another shape; None if that takes a copy."""
        moved = self.moved(torch.ops.aten.view.default, [list(size)], {})
        return moved if isinstance(moved, Geometry) else None

    def is_rows(self) -> bool:
        """Whether it is a whole matrix as it is stored."""
        return len(self.size) == 2 and self == Geometry.row_major(self.size)

    def moved(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Geometry | list[Geometry] | None:
        """The geometry of ``func(view, *args)``, a list for several results; None if that is no view."""
        with _disable_current_modes():
            base = torch.empty(0, device="meta").as_strided(*self)
            try:
                out = func(base, *args, **kwargs)
            except RuntimeError:
                return None
            if isinstance(out, Tensor):
                return _of(out, base)
            each = [_of(part, base) for part in out]
        found = [geometry for geometry in each if geometry is not None]
        return found if len(found) == len(each) else None


def _swapped(numbers: tuple[int, ...]) -> tuple[int, ...]:
    return (*numbers[:-2], numbers[-1], numbers[-2])


def _of(out: Tensor, base: Tensor) -> Geometry | None:
    # The storage is the same object where nothing was copied.
    if out.untyped_storage()._cdata != base.untyped_storage()._cdata:
        return None
    return Geometry(tuple(out.shape), tuple(out.stride()), int(out.storage_offset()))
