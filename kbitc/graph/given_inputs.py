"""Inputs that the user gives: by name, and as something to measure on.

The one thing to know: a tensor of one value throughout, as ``torch.zeros`` makes it, says a shape and
nothing else; whatever else is given is data, and stays as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kbitc.errors import UsageError, first_line


def read_inputs(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name.

    Raises:
        UsageError: it is none, or cannot be read.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"--example-inputs {file}: cannot be read as a safetensors file ({first_line(error)}); write it "
            "with safetensors.torch.save_file({'name': tensor, ...}, FILE)"
        ) from error


def named_inputs(
    model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """Inputs by the names of forward's parameters; None where some have none, or hold tensors in containers.

    Args:
        model: any module.
        inputs: positional or keyword ones.
    """
    if inputs is None:
        return None
    signature = inspect.signature(model.forward)
    try:
        bound = (
            signature.bind_partial(*inputs) if isinstance(inputs, tuple) else signature.bind_partial(**inputs)
        )
    except TypeError:
        return None
    kinds = {signature.parameters[name].kind for name in bound.arguments}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return None
    flat = all(isinstance(value, Tensor) or _is_plain(value) for value in bound.arguments.values())
    return dict(bound.arguments) if flat else None


def _is_plain(value: Any) -> bool:
    return all(not isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def drawn_like(inputs: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """Inputs of the same shapes, to measure on.

    Noise of a normal law stands for floats that hold nothing (on the meta device, or one value throughout);
    everything else is as it was, floats in float32.

    Args:
        inputs: by name.
        generator: draws.

    Raises:
        UsageError: whole numbers on the meta device.
    """
    return {
        name: _like(name, value, generator) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def _like(name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    if value.is_floating_point():
        is_empty = value.is_meta or value.numel() == 0 or bool((value == value.flatten()[0]).all())
        if is_empty:
            return torch.randn(value.shape, generator=generator)
        return value.detach().cpu().float()
    if value.is_meta:
        raise UsageError(
            f"example_inputs['{name}'] is on the meta device and holds no values; give real ones to measure "
            "on, or calibrate with none"
        )
    return value.detach().cpu()
