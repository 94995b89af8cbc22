"""A parameter must be finite, whoever reads it."""

from __future__ import annotations

from torch import Tensor

from kbitc.errors import UsageError


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises UsageError where a parameter holds a NaN or an infinite value."""
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # torch cannot ask float8 itself
    if tensor.is_floating_point() and not bool(values.isfinite().all()):
        raise UsageError(
            f"{name}: holds a NaN or infinite value; a parameter must be finite. Repair the checkpoint"
        )
