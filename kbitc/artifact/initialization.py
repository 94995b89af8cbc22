"""Packed weights kept out of sight while transformers initializes what a checkpoint lacks.

The one thing to know: a model's ``_init_weights`` may index, fill and measure any weight below its module;
packed ones are initialized already, and show their shapes alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kbitc.tensor.kbit_tensor import KbitTensor

NAME = "_init_weights"


def hide_packed(model: nn.Module) -> None:
    """Until :func:`show_packed` what initializes a model and its parts sees the shapes of packed ones."""
    for part in model.modules():
        if hasattr(part, NAME):
            setattr(part, NAME, _on_shapes(getattr(part, NAME)))


def show_packed(model: nn.Module) -> None:
    """Undo :func:`hide_packed`."""
    for part in model.modules():
        vars(part).pop(NAME, None)


def _on_shapes(initialize: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    @functools.wraps(initialize)
    def run(module: nn.Module) -> Any:
        packed = [
            (part, leaf, weight)
            for part in module.modules()
            for leaf, weight in part._parameters.items()
            if isinstance(weight, KbitTensor)
        ]
        for part, leaf, weight in packed:
            part._parameters[leaf] = _shape_of(weight)
        try:
            return initialize(module)
        finally:
            for part, leaf, weight in packed:
                part._parameters[leaf] = weight

    return run


def _shape_of(weight: Any) -> nn.Parameter:
    return nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device="meta"), requires_grad=False)
