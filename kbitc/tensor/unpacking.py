"""A model with packed weights back to a dense one: what training, merging or resizing weights asks for.

The one thing to know: the values are those that the packed weights stand for, not those from before packing.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from kbitc.tensor.kbit_tensor import KbitTensor

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def dequantized(model: AnyModule, dtype: torch.dtype | None = None) -> AnyModule:
    """Put the dense weight in the place of each packed one; weights that were tied stay tied.

    Args:
        model: changed in place.
        dtype: of the dense weights; by default the logical one of each.

    Returns:
        The model.
    """
    dense: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for leaf, weight in list(module._parameters.items()):
            if not isinstance(weight, KbitTensor):
                continue
            if id(weight) not in dense:
                dense[id(weight)] = nn.Parameter(weight.dequantize(dtype), requires_grad=False)
            module._parameters[leaf] = dense[id(weight)]
    return model


def read_as(weight: KbitTensor, dtype: torch.dtype) -> KbitTensor:
    """The same packed tensors under another logical dtype; nothing is copied."""
    return weight._like(weight.packed, dtype)
